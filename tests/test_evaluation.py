"""Held-out devices one by one: the distribution of a metric beside its mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_fleets import parts

from sottovoce.client.examples import Examples
from sottovoce.client.tasks import Task
from sottovoce.client.tasks.base import Measured
from sottovoce.server.evaluation import Evaluator, by_device, device_metrics
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.strategies.levels import activity_levels


def only(examples: Examples, device: int) -> Examples:
    first, last = examples.device_offsets[device : device + 2]
    return examples.take(np.arange(first, last))


@pytest.mark.parametrize("name", ["bilstm", "lstm"])
def test_each_devices_metric_is_that_of_the_device_evaluated_alone(name: str) -> None:
    _, task, model = parts(name)
    examples = AssistantPopulation(devices=200, held_out_devices=25, seed=4).held_out_devices()
    own, known = by_device(task, task.measure(model, examples), examples)
    assert known.all()
    for device in range(examples.devices):
        alone = task.evaluate(model, only(examples, device))[task.headline]
        assert own[device] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["bilstm", "lstm"])
def test_all_devices_together_give_the_metric_of_all_examples(name: str) -> None:
    _, task, model = parts(name)
    examples = AssistantPopulation(devices=200, held_out_devices=25, seed=4).held_out_devices()
    measured = task.measure(model, examples)
    whole = task.headline_of(measured.score.sum(keepdims=True), measured.weight.sum(keepdims=True))
    assert float(whole[0]) == pytest.approx(measured.metrics[task.headline], rel=1e-12)
    assert task.evaluate(model, examples) == measured.metrics


def made_up(task: Task, values: list[float], empty: int = 0) -> tuple[Measured, Examples]:
    """One example of weight 4 a device, whose metric is given; then devices without examples."""
    count = len(values)
    offsets = np.concatenate([np.arange(count + 1), np.full(empty, count)])
    examples = Examples(np.zeros(count, np.int32), np.arange(count + 1), offsets)
    scores = 4 * (np.log(values) if task.headline == "perplexity" else np.array(values))
    return Measured({}, scores, np.full(count, 4.0)), examples


@pytest.mark.parametrize(("name", "worst"), [("bilstm", 1.5), ("lstm", 29.5)])
def test_the_worst_tenth_is_the_mean_of_the_devices_served_worst(name: str, worst: float) -> None:
    _, task, _ = parts(name)
    values = [float(v) for v in range(1, 21)]
    order = np.random.default_rng(1).permutation(20)
    if task.headline == "perplexity":
        values = [v + 10 for v in values]
    measured, examples = made_up(task, [values[k] for k in order])
    found = device_metrics(task, measured, examples, np.zeros(20, np.uint8))
    assert found[f"{task.headline}_worst_decile"] == pytest.approx(worst)
    assert found[f"{task.headline}_median"] == pytest.approx(np.median(values))
    tenth = np.quantile(values, 0.1 if task.higher_is_better else 0.9)
    assert found[f"{task.headline}_p10"] == pytest.approx(tenth)


def test_levels_are_apart_and_devices_without_examples_are_left_out() -> None:
    _, task, _ = parts("bilstm")
    measured, examples = made_up(task, [0.2, 0.4, 1.0], empty=2)
    levels = np.array([3, 3, 5, 7, 7], np.uint8)
    found = device_metrics(task, measured, examples, levels)
    assert found["accuracy_by_level"] == {
        "3": pytest.approx(0.3), "5": pytest.approx(1.0)
    }
    assert found["accuracy_worst_decile"] == pytest.approx(0.2)


def test_levels_are_those_of_all_a_device_has_not_of_what_is_evaluated() -> None:
    population = AssistantPopulation(
        devices=200, held_out_devices=300, seed=4, max_held_out_examples=2
    )
    counts = np.diff(population.held_out_devices().device_offsets)
    activity = population.held_out_activity()
    assert np.array_equal(counts, np.minimum(activity, 2))
    _, task, model = parts("bilstm")
    found = Evaluator(population, task, model, devices=300, examples=10)(
        {name: p.detach() for name, p in model.named_parameters()}
    )
    assert set(found["accuracy_by_level"]) == {str(k) for k in activity_levels(activity)}


def test_the_same_devices_are_evaluated_every_time() -> None:
    population, task, model = parts("bilstm")
    evaluator = Evaluator(population, task, model, devices=5, examples=10)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert evaluator(parameters) == evaluator(parameters)


def test_a_diverged_model_still_has_finite_device_perplexities() -> None:
    _, task, _ = parts("lstm")
    found = task.headline_of(np.array([1e6]), np.array([1.0]))
    assert math.isfinite(float(found[0])) and torch.isfinite(torch.tensor(found)).all()
