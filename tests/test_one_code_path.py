"""A live cohort and a simulated one with the same devices, data and coins make the same sum.

Tolerances are of float32: groups of another size add up in another order.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from live_devices import live_update, spec_of, stored
from small_fleets import CLIPPED, DEVICES, NOISED, OPTIMIZERS, SIZES, fleet, parts
from torch import Tensor

from sottovoce.client.agent.store import StoredExample
from sottovoce.client.agent.work import DeviceData, Held, step_cost, train_task
from sottovoce.client.batches import BatchPlan
from sottovoce.client.example_clipping import ExampleClipping
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.protocol.device_pb2 import Task as Order
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.strategies.levels import activity_levels

ROUND = 3
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def globals_of(name: str) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in parts(name)[2].named_parameters()}


def live_sum(
    name: str, example: ExampleClipping | None, clip: float | None, **options: object
) -> dict[str, Tensor]:
    population, task, model = parts(name)
    training = fleet(name, example, clip, **options).training  # type: ignore[arg-type]
    spec = spec_of(task, model, name, SIZES[name], training)
    levels = activity_levels(population.activity[DEVICES])
    total = {n: torch.zeros(s, dtype=torch.float64) for n, s in spec.parameters}
    for device, level in zip(DEVICES.tolist(), levels.tolist(), strict=True):
        found = live_update(
            spec, population, globals_of(name), device, level, ROUND, NoiseSource.from_seed(9)
        )
        for key, tensor in found.update.items():
            total[key] += tensor
    return total


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].float(), expected[name].float(), **TOLERANCE)


@pytest.mark.parametrize("name", ["bilstm", "transformer", "lstm", "causal_transformer"])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("example", [None, CLIPPED])
def test_live_devices_sum_up_to_the_simulated_cohort(
    name: str, clip: float | None, example: ExampleClipping | None
) -> None:
    simulated = fleet(name, example, clip).train(globals_of(name), DEVICES, ROUND)
    assert_equal(live_sum(name, example, clip), simulated.sums)


@pytest.mark.parametrize("optimizer", ["momentum", "all of them", "adam"])
def test_they_do_with_any_optimiser(optimizer: str) -> None:
    options = {"optimizer": OPTIMIZERS[optimizer], "epochs": 2}
    simulated = fleet("bilstm", None, 0.3, **options).train(globals_of("bilstm"), DEVICES, ROUND)
    assert_equal(live_sum("bilstm", None, 0.3, **options), simulated.sums)


@pytest.mark.parametrize("name", ["bilstm", "lstm"])
@pytest.mark.parametrize("example", [
    NOISED,
    replace(NOISED, mode="micro_batch", micro_batch_size=2),
    replace(NOISED, threshold="quantile"),
    replace(NOISED, noise_decay=0.9, rounds=10),
])  # fmt: skip
def test_with_their_own_noise_they_sum_up_to_simulated_fleets_of_one(
    name: str, example: ExampleClipping
) -> None:
    total: dict[str, Tensor] = {}
    for device in DEVICES:
        reply = fleet(name, example, 0.5, size=1).train(globals_of(name), device[None], ROUND)
        for key, tensor in reply.sums.items():
            total[key] = total.get(key, torch.zeros(())) + tensor.double()
    assert_equal(live_sum(name, example, 0.5), total)


def test_rates_and_steps_follow_the_declared_level_whatever_the_device_holds() -> None:
    population, task, model = parts("bilstm")
    plan = BatchPlan(4, 1, 1000, poisson=True)
    spec = spec_of(task, model, "bilstm", SIZES["bilstm"], LocalTraining(0.5, plan, NOISED, None))
    rows = [row for device in range(60) for row in stored(population, device)][:300]
    for level, held in ((3, rows), (5, rows[:2]), (4, [])):
        seen: list[int] = []
        update = live_counts(spec, held, level, seen)
        assert seen[0] == plan.steps(level, 0) == step_cost(spec, 1, level).steps
        expected = plan.rate(level) * len(held) * seen[0]
        assert abs(seen[1] - expected) <= 6 * np.sqrt(expected + 1)
        assert all(bool(tensor.isfinite().all()) for tensor in update.values())
        assert any(bool(tensor.any()) for tensor in update.values())  # its noise, if nothing else


def live_counts(
    spec: object, held: list[StoredExample], level: int, seen: list[int]
) -> dict[str, Tensor]:
    """An update, and in `seen` the steps and visits that were drawn for it."""
    from sottovoce.client.agent import work

    draw = work.draw_at

    def watched(*arguments: object) -> object:
        draws = draw(*arguments)  # type: ignore[arg-type]
        seen.extend([len(draws[0].steps), draws[0].rows])
        return draws

    order = Order(id="0" * 32, run="r", round=1, number=7, level=level)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "draw_at", watched)
        data = DeviceData(held, level, NoiseSource.from_seed(2))
        return train_task(spec, order, globals_of("bilstm"), data).update  # type: ignore[arg-type]


def test_a_device_whose_examples_are_gone_hands_over_nothing_or_noise() -> None:
    population, task, model = parts("lstm")
    plan = BatchPlan(4, 1, 12, poisson=False)
    spec = spec_of(task, model, "lstm", SIZES["lstm"], LocalTraining(0.5, plan, None, 0.3))
    order = Order(id="0" * 32, run="r", round=1, number=7, level=2)
    found = train_task(
        spec, order, globals_of("lstm"), DeviceData([], 2, NoiseSource.from_seed(1))
    )
    assert not any(bool(tensor.any()) for tensor in found.update.values())


def test_examples_with_labels_that_are_not_public_are_left_out() -> None:
    population, task, model = parts("bilstm")
    plan = BatchPlan(4, 1, 12, poisson=False)
    spec = spec_of(task, model, "bilstm", SIZES["bilstm"], LocalTraining(0.5, plan, None, None))
    good = stored(population, 3)
    odd = [
        replace(good[0], id=90, intent="LaunchRocket"),
        replace(good[0], id=91, intent=None),
        replace(good[0], id=92, slots=tuple("B-planet" for _ in good[0].tokens)),
        replace(good[0], id=93, slots=None),
    ]
    order = Order(id="0" * 32, run="r", round=1, number=3, level=2)
    updates = [
        train_task(
            spec, order, globals_of("bilstm"), DeviceData(held, 2, NoiseSource.from_seed(1))
        ).update
        for held in (good, [*odd[:2], *good, *odd[2:]])
    ]
    assert len(Held.of(spec, [*good, *odd])) == len(good)
    for name, tensor in updates[0].items():
        assert torch.equal(tensor, updates[1][name])


def test_words_that_the_vocabulary_lacks_are_unknown_ones() -> None:
    population, task, model = parts("bilstm")
    plan = BatchPlan(4, 1, 12, poisson=False)
    spec = spec_of(task, model, "bilstm", SIZES["bilstm"], LocalTraining(0.5, plan, None, None))
    row = stored(population, 3)[0]
    order = Order(id="0" * 32, run="r", round=1, number=3, level=0)
    updates = [
        train_task(
            spec, order, globals_of("bilstm"), DeviceData([held], 0, NoiseSource.from_seed(1))
        ).update
        for held in (
            replace(row, tokens=tuple(f"zzqx{k}" for k in range(len(row.tokens)))),
            replace(row, tokens=tuple(f"qqzy{k}" for k in range(len(row.tokens)))),
        )
    ]
    for name, tensor in updates[0].items():
        assert torch.equal(tensor, updates[1][name])


def test_the_orders_bound_stands_for_the_specifications() -> None:
    population, task, model = parts("bilstm")
    plan = BatchPlan(4, 1, 12, poisson=False)
    spec = spec_of(task, model, "bilstm", SIZES["bilstm"], LocalTraining(5.0, plan, None, 0.5))
    order = Order(
        id="0" * 32, run="r", round=1, number=3, level=2, clips=True, clip_norm=0.01
    )
    data = DeviceData(stored(population, 3), 2, NoiseSource.from_seed(1))
    found = train_task(spec, order, globals_of("bilstm"), data)
    norm = torch.sqrt(sum((t.double() ** 2).sum() for t in found.update.values()))  # type: ignore[arg-type]
    assert found.clipped and float(norm) <= 0.01 * (1 + 1e-6)
