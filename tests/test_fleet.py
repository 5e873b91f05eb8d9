"""The fleet's sum equals the slow loop, and depends on nothing but (round, device)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_fleets import (
    CLIPPED,
    DEVICES,
    NOISED,
    OPTIMIZERS,
    SIZES,
    assert_same,
    fleet,
    noised,
    parameters_of,
    parts,
    slow_sum,
)

from sottovoce.client.batches import BatchPlan, draw_batches, largest
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import ExampleClipping
from sottovoce.client.training import GroupTrainer
from sottovoce.privacy.mechanisms.noise import NoiseSource

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

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


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_sum_does_not_depend_on_the_group_size(size: int) -> None:
    assert_same(noised(size, DEVICES).sums, noised(4, DEVICES).sums)


def test_the_sum_does_not_depend_on_the_order_of_devices() -> None:
    shuffled = np.random.default_rng(0).permutation(DEVICES)
    assert_same(noised(4, shuffled).sums, noised(4, DEVICES).sums)


@pytest.mark.parametrize("name", ["sgd", "adam with pulls"])
def test_opacus_gives_the_same_sum_from_the_same_seed(name: str) -> None:
    pytest.importorskip("opacus")
    ours, theirs = (
        noised(4, DEVICES, OPTIMIZERS[name], engine) for engine in ("grouped", "opacus")
    )
    assert_same(theirs.sums, ours.sums)
    assert theirs.totals == pytest.approx(ours.totals, rel=1e-4)


def test_opacus_gives_the_same_sum_from_any_number_of_workers() -> None:
    pytest.importorskip("opacus")
    sums = []
    for workers in (1, 3):
        fast = fleet("bilstm", NOISED, 0.05, engine="opacus")
        fast.workers = workers
        sums.append(fast.train(parameters_of(fast.model), DEVICES, 2).sums)
    assert all(torch.equal(sums[0][name], sums[1][name]) for name in sums[0])


def test_an_engine_that_does_not_exist_is_refused() -> None:
    fast = fleet("bilstm", NOISED, 0.05)
    _, task, model = parts("bilstm")
    with pytest.raises(ConfigError, match="engine=jax .*grouped or opacus"):
        GroupTrainer(model, task, fast.training, 1, "jax")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("example", "update_clip"), [(None, None), (NOISED, 0.02)])
def test_opacus_takes_every_model(
    name: str, example: ExampleClipping | None, update_clip: float | None
) -> None:
    pytest.importorskip("opacus")
    replies = []
    for engine in ("grouped", "opacus"):
        fast = fleet(name, example, update_clip, engine=engine)
        replies.append(fast.train(parameters_of(fast.model), DEVICES[:4], 3))
    assert_same(replies[1].sums, replies[0].sums)


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
