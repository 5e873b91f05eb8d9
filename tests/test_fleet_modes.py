"""Every clipping mode in the fleet: the slow loop's sums, bounded signals, honest noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_modes import MODES, SlowDevice
from small_fleets import (
    DEVICES,
    OPTIMIZERS,
    PLAIN,
    SIZES,
    TASK_OF,
    assert_same,
    fleet,
    of_device,
    parameters_of,
    parts,
    trained,
)
from torch import Tensor

from sottovoce.client.cohort import draw_cohort
from sottovoce.client.descents import LocalDescent, stacked_norms
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import DeviceOptimizer, ExampleClipping, FleetReply
from sottovoce.client.models import make_model
from sottovoce.client.thresholds import QuantileThresholds
from sottovoce.client.training import sparse_table
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.optimizer.descent import AdamBC
from sottovoce.simulations.fleet import SimulatedFleet
from sottovoce.strategies.levels import activity_levels

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
ROUND = 3


def reply(
    example: ExampleClipping | None, size: int = 4, engine: str = "grouped",
    optimizer: DeviceOptimizer = PLAIN,
) -> FleetReply:
    fast = fleet("bilstm", example, 0.05, size, optimizer, engine)
    return fast.train(parameters_of(fast.model), DEVICES[:6], 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("update_clip", [None, 0.1])
def test_every_mode_moves_a_device_as_the_slow_loop_does(
    mode: str, update_clip: float | None
) -> None:
    fast = fleet("bilstm", MODES[mode], update_clip, optimizer=OPTIMIZERS["momentum"], epochs=2)
    draws = draw_cohort(fast.population, DEVICES[[5, 6]], fast.training.plan, ROUND, fast.source)
    table, _ = sparse_table(fast.model, fast.training)
    assert len({len(draw.steps) for draw in draws}) > 1
    for group, data, updates in trained(fast, parameters_of(fast.model), draws, ROUND):
        for k, draw in enumerate(group):
            touched = data.touched[k, : data.touched_counts[k]]
            slow = SlowDevice(fast, draw, touched, ROUND)
            signal, drift = slow.update()
            assert len(set(slow.clips)) == (len(draw.steps) if slow.joined else 0)
            assert (updates.noise is None) == slow.joined
            for found, expected in ((updates.signal, signal), (updates.noise, drift)):
                if found is not None:
                    assert_same(of_device(found, k, table, touched, expected), expected, 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_of_any_mode_does_not_depend_on_the_group_size(mode: str) -> None:
    alone, together = reply(MODES[mode], 1), reply(MODES[mode], 7)
    assert_same(alone.sums, together.sums)
    assert alone.totals == pytest.approx(together.totals, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_opacus_gives_the_same_sum_in_every_mode(mode: str) -> None:
    pytest.importorskip("opacus")
    ours, theirs = (reply(MODES[mode], engine=engine) for engine in ("grouped", "opacus"))
    assert_same(theirs.sums, ours.sums)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_device_is_clipped_to_its_bound_in_every_mode(mode: str, optimizer: str) -> None:
    fast = fleet("bilstm", MODES[mode], 0.01, optimizer=OPTIMIZERS[optimizer])
    draws = draw_cohort(fast.population, DEVICES[:6], fast.training.plan, 1, fast.source)
    clipped = 0
    for group, _, updates in trained(fast, parameters_of(fast.model), draws, 1):
        norms = stacked_norms({n: t.double() for n, t in updates.signal.items()})
        assert float(norms.max()) <= 0.01 * (1 + 1e-6)
        clipped += int(updates.clipped[: len(group)].sum())
    assert clipped > 0


@pytest.mark.parametrize("mode", ["micro_batch", "automatic", "layer_wise", "decay", "quantile"])
def test_noise_beside_the_signal_has_the_variance_declared_for_its_round(mode: str) -> None:
    fast = fleet("bilstm", MODES[mode], 1e-6)
    training, parameters = fast.training.at(ROUND), parameters_of(fast.model)
    levels = activity_levels(fast.population.activity[DEVICES])
    declared = sum(training.noise_variance(int(level)) for level in levels)
    if mode == "quantile":
        assert declared == 0
        return
    sums = fast.train(parameters, DEVICES, ROUND).sums
    for name in sums:
        values = sums[name].double().flatten()
        error = 5 * (2 / values.numel()) ** 0.5
        assert float(values.pow(2).mean()) == pytest.approx(declared, rel=max(error, 0.01)), name


def test_thresholds_start_again_in_every_participation() -> None:
    fast = fleet("bilstm", MODES["quantile"], None)
    parameters = parameters_of(fast.model)
    first = fast.train(parameters, DEVICES[:3], 1).sums
    fast.train(parameters, DEVICES[3:], 2)
    again = fast.train(parameters, DEVICES[:3], 1).sums
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_adam_is_freed_of_each_devices_own_noise() -> None:
    """Thresholds differ from device to device and step to step, and with them the bias."""
    fast = fleet("bilstm", MODES["quantile"], None, optimizer=OPTIMIZERS["adam"])
    steps = np.array([3, 3])
    deviations = torch.tensor([[0.1, 0.3], [0.2, 0.1], [0.4, 0.1]])
    gradients = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))
    both = LocalDescent(fast.training, {"w": torch.zeros(2, 5)}, steps, noised=True)
    for step, deviation in enumerate(deviations):
        both.step(step, {"w": gradients[step].clone()}, None, deviation)
    optimizer = fast.training.optimizer
    for k in range(2):
        alone = AdamBC(0.5, optimizer.beta1, optimizer.beta2, eps_floor=1e-3)
        mean, place = 0.0, torch.zeros(5)
        for step in range(3):
            mean = optimizer.beta2 * mean + (1 - optimizer.beta2) * float(deviations[step, k]) ** 2
            alone.noise_variance = mean / (1 - optimizer.beta2 ** (step + 1))
            place -= alone.step({"w": gradients[step, k].clone()})["w"]
        assert torch.allclose(both.weights["w"][k], place, atol=1e-6)


def test_an_empty_micro_batch_counts_like_one_without_gradient() -> None:
    """Or an example more would move the count by up to half of the micro-batches."""
    example = MODES["quantile of micro-batches, with decay"].at(1)
    none, zeros = (
        QuantileThresholds(example, 8, 1, [np.random.default_rng(0)]) for _ in range(2)
    )
    zeros.count(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    one = QuantileThresholds(example, 8, 1, [np.random.default_rng(0)])
    one.count(torch.tensor([9.0, 0.0, 0.0, 0.0]), torch.ones(4, dtype=torch.bool))
    assert float(zeros._counts - one._counts) == 1.0
    assert float(none._counts) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_cohort_and_empty_batches_are_ordinary_steps(mode: str) -> None:
    fast = fleet("bilstm", MODES[mode], 0.05)
    parameters = parameters_of(fast.model)
    assert fast.train(parameters, DEVICES[:0], 1).devices_by_level == {}
    draws = draw_cohort(fast.population, DEVICES[:2], fast.training.plan, 1, fast.source)
    for draw in draws:
        draw.steps[:] = [step[:0] for step in draw.steps]
    for group, data, updates in trained(fast, parameters, draws, 1):
        quiet = updates.signal if updates.noise is not None else {}
        assert all(float(t.abs().max()) == 0 for t in quiet.values())
        if updates.noise is None:
            slow = SlowDevice(fast, group[0], np.zeros(1, dtype=np.int64), 1).update()[0]
            assert_same(of_device(updates.signal, 0, None, data.touched[0], slow), slow, 1e-4)
        assert bool(updates.finite.all())


def test_a_round_past_the_last_is_refused_while_noise_decays() -> None:
    with pytest.raises(ValueError, match=r"round=5 .*rounds=4"):
        MODES["decay"].at(5)
    with pytest.raises(ConfigError, match="needs rounds"):
        ExampleClipping(1.0, 1.0, noise_decay=0.9)


def test_a_count_that_spends_more_than_the_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"count_noise=0\.5 must be above half of .*=1"):
        ExampleClipping(1.0, 1.0, threshold="quantile", count_noise=0.5)
    unset = ExampleClipping(1.0, 50.0, threshold="quantile")
    assert unset.deviation(4) < 50 / 4 * 1.16


# -- dropout ---------------------------------------------------------------------------------------


def dropping(name: str, size: int, workers: int = 1, engine: str = "grouped") -> SimulatedFleet:
    plain = fleet(name, ExampleClipping(0.8, 0.7), 0.05)
    population, task, _ = parts(name)
    sizes = SIZES[name] | {"dropout": 0.3}
    if "lstm" in name and engine == "grouped":
        sizes["layers"] = 2  # dropout between the layers too
    model = make_model(name, task, generator=torch.Generator().manual_seed(5), **sizes)
    return SimulatedFleet(
        population, task, model, plain.training, NoiseSource.from_seed(9), size, workers, engine
    )


def sums_of(fast: SimulatedFleet, devices: np.ndarray = DEVICES) -> dict[str, Tensor]:
    torch.manual_seed(np.random.default_rng().integers(2**31))  # must not matter
    return fast.train(parameters_of(fast.model), devices, 2).sums


@pytest.mark.parametrize("name", [*TASK_OF, "lstm"])
def test_dropout_does_not_depend_on_group_size_order_or_padding(name: str) -> None:
    expected = sums_of(dropping(name, 5))
    assert_same(sums_of(dropping(name, 1)), expected)
    assert_same(sums_of(dropping(name, 5), DEVICES[::-1].copy()), expected)
    unseeded = dropping(name, 5)
    unseeded.drops = False  # masks from torch's generator: seeds are what makes the difference
    with pytest.raises(AssertionError):
        assert_same(sums_of(unseeded), expected)


def test_dropout_gives_the_same_bytes_from_any_number_of_workers() -> None:
    first, second = (sums_of(dropping("bilstm", 2, workers)) for workers in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_is_the_same_under_both_engines() -> None:
    pytest.importorskip("opacus")
    ours, theirs = (
        sums_of(dropping("transformer", 3, engine=engine), DEVICES[:3])
        for engine in ("grouped", "opacus")
    )
    assert_same(theirs, ours)


def test_each_step_and_round_has_masks_of_its_own() -> None:
    fast = dropping("bilstm", 2)
    draws = draw_cohort(fast.population, DEVICES[:2], fast.training.plan, 1, fast.source)
    seeds = [
        data.seeds
        for server_round in (1, 2)
        for _, data, _ in trained(fast, parameters_of(fast.model), draws, server_round)
    ]
    real = np.concatenate([found[:-1].ravel() for found in seeds if found is not None])
    assert len(np.unique(real[real != 0])) == np.count_nonzero(real)
    assert np.count_nonzero(real) > len(real) / 2
