"""Every on-device optimiser: the slow loop's moves, bounded signals, declared noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_fleets import (
    CLIPPED,
    DEVICES,
    NOISED,
    OPTIMIZERS,
    assert_same,
    fleet,
    noised,
    of_device,
    parameters_of,
    slow_update,
    trained,
)

from sottovoce.client.batches import BatchPlan
from sottovoce.client.cohort import draw_cohort
from sottovoce.client.descents import stacked_norms
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import DeviceOptimizer, ExampleClipping, LocalTraining
from sottovoce.client.training import sparse_table
from sottovoce.strategies.levels import activity_levels


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("example", "update_clip"),
    [(None, None), (None, 0.05), (CLIPPED, 0.02), (NOISED, None), (NOISED, 0.1)],
)
def test_every_optimiser_moves_a_device_as_the_slow_loop_does(
    name: str, example: ExampleClipping | None, update_clip: float | None
) -> None:
    """Signal and own noise, device by device; the noise passes through the whole training."""
    fast = fleet("bilstm", example, update_clip, optimizer=OPTIMIZERS[name], epochs=2)
    devices = DEVICES[[5, 6]]  # with 2 and 4 steps
    plan, source = fast.training.plan, fast.source
    draws = draw_cohort(fast.population, devices, plan, 3, source)
    table, _ = sparse_table(fast.model, fast.training)
    assert len({len(draw.steps) for draw in draws}) > 1
    for group, data, updates in trained(fast, parameters_of(fast.model), draws, 3):
        for k, draw in enumerate(group):
            touched = data.touched[k, : data.touched_counts[k]]
            signal, drift = slow_update(fast, draw, touched, 3)
            for found, expected in ((updates.signal, signal), (updates.noise, drift)):
                if found is not None:
                    full = of_device(found, k, table, touched, expected)
                    assert_same(full, expected, 1e-4)
            if updates.noise is None:
                assert all(float(d.abs().max()) == 0 for d in drift.values()) or "adam" in name


@pytest.mark.parametrize("name", ["all of them", "adam with pulls"])
def test_the_sum_of_any_optimiser_does_not_depend_on_the_group_size(name: str) -> None:
    alone, together = (noised(size, DEVICES, OPTIMIZERS[name]).sums for size in (1, 7))
    assert_same(alone, together)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("example", [None, CLIPPED, NOISED])
def test_a_device_is_clipped_to_its_bound(name: str, example: ExampleClipping | None) -> None:
    fast = fleet("bilstm", example, 0.01, optimizer=OPTIMIZERS[name], epochs=2)
    plan, source = fast.training.plan, fast.source
    draws = draw_cohort(fast.population, DEVICES, plan, 1, source)
    clipped = 0
    for group, _, updates in trained(fast, parameters_of(fast.model), draws, 1):
        norms = stacked_norms({n: t.double() for n, t in updates.signal.items()})
        assert float(norms.max()) <= 0.01 * (1 + 1e-6)
        clipped += int(updates.clipped[: len(group)].sum())
    assert clipped > 0


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "adam" not in name])
def test_noise_in_an_update_has_the_declared_variance_in_every_coordinate(name: str) -> None:
    """Touched rows, untouched rows and dense layers alike: what the top-up relies on."""
    example = ExampleClipping(clip_norm=1e-4, noise_multiplier=1e4)  # noise 1, next to no signal
    optimizer = OPTIMIZERS[name]
    fast = fleet("bilstm", example, 1e-3, optimizer=optimizer, epochs=2)
    devices = DEVICES[:4]
    sums = [fast.train(parameters_of(fast.model), devices, r).sums for r in range(1, 13)]
    levels = activity_levels(fast.population.activity[devices])
    declared = sum(fast.training.noise_variance(int(level)) for level in levels)
    for name in sums[0]:
        values = torch.stack([s[name] for s in sums]).double().flatten()
        error = 5 * (2 / values.numel()) ** 0.5
        assert float(values.pow(2).mean()) == pytest.approx(declared, rel=max(error, 0.01)), name


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "adam" in name])
def test_adam_leaves_no_noise_outside_of_the_bound(name: str) -> None:
    fast = fleet("bilstm", NOISED, 0.05, optimizer=OPTIMIZERS[name])
    assert {fast.training.noise_variance(level) for level in range(12)} == {0.0}
    for device in DEVICES[:4]:
        reply = fast.train(parameters_of(fast.model), np.array([device]), 1)
        norm = sum(float(t.double().pow(2).sum()) for t in reply.sums.values()) ** 0.5
        assert norm <= 0.05 * (1 + 1e-6)


@given(
    steps=st.integers(0, 40), momentum=st.floats(0, 0.99), pull=st.floats(0, 1.9),
    other=st.integers(0, 40),
)
def test_step_weights_are_the_reach_of_a_single_push(
    steps: int, momentum: float, pull: float, other: int
) -> None:
    plan = BatchPlan(4, local_epochs=1, max_examples=12, poisson=True)
    optimizer = DeviceOptimizer(momentum=momentum, proximal=pull / 2, weight_decay=pull / 2)
    training = LocalTraining(0.5, plan, None, None, optimizer)
    weights = training.step_weights(steps)
    assert len(weights) == steps
    for at in range(min(other, steps), min(other + 1, steps)):
        place = velocity = 0.0
        for step in range(steps):
            velocity = momentum * velocity + (step == at)
            place = (1 - 0.5 * pull) * place + velocity
        assert weights[at] == pytest.approx(place, rel=1e-9)


def test_a_pull_that_overshoots_is_refused() -> None:
    plan = BatchPlan(4, local_epochs=1, max_examples=12, poisson=True)
    with pytest.raises(ConfigError, match=r"= 1\.5 must be below 1"):
        LocalTraining(0.5, plan, None, None, DeviceOptimizer(proximal=2, weight_decay=1))
