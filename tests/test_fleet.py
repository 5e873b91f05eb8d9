"""The fleet's sum equals the slow loop, and depends on nothing but (round, device)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from reference import train_device
from torch import Tensor, nn

from sottovoce.client.batches import BatchPlan, draw_batches, largest
from sottovoce.client.fleet import ExampleClipping, FleetReply, LocalTraining
from sottovoce.client.models import make_model
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.vocabulary import make_vocabulary
from sottovoce.privacy.noise import NoiseSource
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.cohort import draw_cohort
from sottovoce.simulations.fleet import SimulatedFleet
from sottovoce.strategies.levels import activity_levels

SIZES = {
    "bilstm": {"embedding_size": 6, "hidden_size": 5},
    "transformer": {"hidden_size": 8, "heads": 2, "layers": 1},
    "lstm": {"embedding_size": 6, "hidden_size": 5},
    "causal_transformer": {"hidden_size": 8, "heads": 2, "layers": 1},
}
TASK_OF = {"bilstm": "intent_slots", "transformer": "intent_slots"}
CLIPPED = ExampleClipping(clip_norm=0.8, noise_multiplier=0.0)
NOISED = ExampleClipping(clip_norm=0.8, noise_multiplier=0.7)
DEVICES = np.array([3, 17, 40, 41, 77, 80, 99, 120, 121], dtype=np.int64)


@lru_cache
def parts(name: str) -> tuple[AssistantPopulation, Task, nn.Module]:
    population = AssistantPopulation(devices=200, held_out_devices=5, seed=4)
    vocabulary = make_vocabulary("grammar", population)
    task = make_task(
        TASK_OF.get(name, "next_word"), vocabulary=vocabulary, schema=population.schema,
        words=population.words, max_length=12,
    )
    model = make_model(name, task, generator=torch.Generator().manual_seed(5), **SIZES[name])
    return population, task, model


def fleet(
    name: str, example: ExampleClipping | None, update_clip: float | None, size: int = 4
) -> SimulatedFleet:
    population, task, model = parts(name)
    plan = BatchPlan(batch_size=4, local_epochs=1, max_examples=12, poisson=example is not None)
    training = LocalTraining(0.5, plan, example, update_clip)
    return SimulatedFleet(population, task, model, training, NoiseSource.from_seed(9), size)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def slow_sum(fast: SimulatedFleet, devices: np.ndarray, server_round: int) -> dict[str, Tensor]:
    """Every device by itself, by `reference.train_device`, with the fleet's own batches."""
    training, model = fast.training, fast.model
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for draw in draw_cohort(fast.population, devices, training.plan, server_round, fast.source):
        everything = fast.task.collate(fast.population.examples(np.array([draw.device])))

        def losses(m: nn.Module, rows: list[int], batch=everything) -> Tensor:
            return fast.task.losses(m, {k: v[rows] for k, v in batch.items()})

        signal, _, _ = train_device(
            model, losses, [step.tolist() for step in draw.steps],
            learning_rate=training.learning_rate, batch_size=training.plan.batch_size,
            example_clip=training.example.clip_norm if training.example else None,
            update_clip=training.update_clip_norm,
        )
        for name, part in signal.items():
            total[name] += part.detach()
    return total


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    scale = max(float(t.abs().max()) for t in b.values())
    assert scale > 0
    for name in b:
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("example", "update_clip"), [(None, None), (None, 0.05), (CLIPPED, None), (CLIPPED, 0.02)]
)
def test_the_sum_equals_the_slow_loop(
    name: str, example: ExampleClipping | None, update_clip: float | None
) -> None:
    fast = fleet(name, example, update_clip)
    reply = fast.train(parameters_of(fast.model), DEVICES, 3)
    assert_same(reply.sums, slow_sum(fast, DEVICES, 3))
    assert sum(reply.devices_by_level.values()) == len(DEVICES)
    if update_clip is not None:
        assert reply.totals["clipped_devices"] > 0


def noised(size: int, devices: np.ndarray) -> FleetReply:
    fast = fleet("bilstm", NOISED, 0.05, size)
    return fast.train(parameters_of(fast.model), devices, 2)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_sum_does_not_depend_on_the_group_size(size: int) -> None:
    assert_same(noised(size, DEVICES).sums, noised(4, DEVICES).sums)


def test_the_sum_does_not_depend_on_the_order_of_devices() -> None:
    shuffled = np.random.default_rng(0).permutation(DEVICES)
    assert_same(noised(4, shuffled).sums, noised(4, DEVICES).sums)


def test_a_device_is_clipped_to_its_bound() -> None:
    for example in (None, CLIPPED):
        fast = fleet("bilstm", example, 0.01)
        for device in DEVICES:
            reply = fast.train(parameters_of(fast.model), np.array([device]), 1)
            norm = sum(float(t.double().pow(2).sum()) for t in reply.sums.values()) ** 0.5
            assert norm <= 0.01 * (1 + 1e-6)


def test_noise_in_an_update_has_the_declared_variance_in_every_coordinate() -> None:
    """Touched rows, untouched rows and dense layers alike: what the top-up relies on."""
    example = ExampleClipping(clip_norm=1e-4, noise_multiplier=1e4)  # noise 1, next to no signal
    fast = fleet("bilstm", example, 1e-3)
    sums = [fast.train(parameters_of(fast.model), DEVICES, r).sums for r in range(1, 41)]
    levels = activity_levels(fast.population.activity[DEVICES])
    declared = sum(fast.training.noise_variance(int(level)) for level in levels)
    for name in sums[0]:
        values = torch.stack([s[name] for s in sums]).double().flatten()
        error = 5 * (2 / values.numel()) ** 0.5
        assert float(values.pow(2).mean()) == pytest.approx(declared, rel=max(error, 0.01)), name


def test_noise_of_two_rounds_is_uncorrelated() -> None:
    example = ExampleClipping(clip_norm=1e-4, noise_multiplier=1e4)
    fast = fleet("bilstm", example, 1e-3)
    replies = [fast.train(parameters_of(fast.model), DEVICES, r) for r in (1, 2)]
    a, b = (torch.cat([t.flatten() for t in reply.sums.values()]) for reply in replies)
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5


def test_a_device_with_a_broken_update_is_dropped_and_counted() -> None:
    fast = fleet("bilstm", None, 1.0)
    parameters = parameters_of(fast.model)
    whole = fast.train(parameters, DEVICES, 1)
    word = int(fast.task.collate(fast.population.examples(DEVICES[:1]))["tokens"][0, 0])
    parameters["embedding.weight"][word] = float("nan")
    broken = fast.train(parameters, DEVICES, 1)
    assert 0 < broken.dropped < len(DEVICES) or broken.dropped == len(DEVICES)
    assert broken.dropped + sum(broken.devices_by_level.values()) == len(DEVICES)
    assert all(bool(torch.isfinite(t).all()) for t in broken.sums.values())
    assert whole.dropped == 0


def test_an_empty_cohort_sums_to_zero() -> None:
    fast = fleet("bilstm", NOISED, 0.05)
    reply = fast.train(parameters_of(fast.model), np.zeros(0, dtype=np.int64), 1)
    assert reply.devices_by_level == {}
    assert all(float(t.abs().max()) == 0 for t in reply.sums.values())


def test_poisson_batches_include_each_example_at_the_levels_rate() -> None:
    plan = BatchPlan(batch_size=4, local_epochs=2, max_examples=8, poisson=True)
    counts = np.zeros(20)
    trials = 4000
    source = NoiseSource.from_seed(0)
    for trial in range(trials):
        for step in draw_batches(plan, 4, 20, source.generator("b", trial)):
            counts[step] += 1
    steps = plan.steps(4, 20)
    assert steps == plan.steps(4, 31) == 4
    expected = trials * steps * plan.rate(4)
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_contribution_is_bounded() -> None:
    for level in range(12):
        plan = BatchPlan(batch_size=4, local_epochs=1, max_examples=12, poisson=True)
        assert plan.steps(level, 1) * plan.rate(level) * largest(level) <= 12
        epochs = BatchPlan(batch_size=4, local_epochs=2, max_examples=12, poisson=False)
        count = 1 << level
        drawn = draw_batches(epochs, level, count, np.random.default_rng(level))
        assert sum(len(batch) for batch in drawn) == 2 * min(count, 12)
        assert all(0 < len(batch) <= 4 for batch in drawn)
