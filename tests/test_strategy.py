"""A round of the strategy: who is asked, what is summed, what is released, what is written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import RunError
from sottovoce.client.fleet import ExampleClipping, FleetReply, LocalTraining
from sottovoce.client.messages import read_reply, read_train_content, reply_content, to_record
from sottovoce.privacy import Ledger, epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.mechanisms.correlated import CorrelatedMechanism
from sottovoce.privacy.mechanisms.device import DeviceMechanism
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.optimised import make_factorisation
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.server.budget import RunBudget, touched
from sottovoce.server.callbacks import RequestLog
from sottovoce.server.checkpoints import RunState, load_checkpoint, save_checkpoint
from sottovoce.server.schedule_setup import take_up
from sottovoce.server.training import book_interrupted, book_lost, keep_releases
from sottovoce.simulations.grid import LocalGrid
from sottovoce.strategies.levels import activity_levels
from sottovoce.strategies.noised_sum import NoisedSum
from sottovoce.strategies.optimizers import FedAvg
from sottovoce.strategies.participation import Participation
from sottovoce.strategies.samplers import UniformSampler

DEVICES, COHORT = 60, 20
ACTIVITY = np.random.default_rng(5).integers(1, 40, DEVICES)
PARAMETERS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(-1.0)}
PLAN = BatchPlan(batch_size=4, local_epochs=1, max_examples=16, poisson=True)
EXAMPLE = ExampleClipping(clip_norm=1.0, noise_multiplier=2.5)

Answer = Callable[[np.ndarray, int], FleetReply]


# -- participation ---------------------------------------------------------------------------------

cohorts = st.lists(st.sets(st.integers(0, 30)), max_size=25)


def level_of(device: int) -> int:
    return device % 4


def sorted_ids(cohort: set[int]) -> tuple[np.ndarray, np.ndarray]:
    devices = np.array(sorted(cohort), dtype=np.int64)
    return devices, np.array([level_of(d) for d in devices.tolist()], dtype=np.uint8)


def worst(counts: Counter[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for device, count in counts.items():
        found[level_of(device)] = max(found.get(level_of(device), 0), count)
    return found


@given(cohorts)
def test_participation_counts_like_a_counter(rounds: list[set[int]]) -> None:
    ours, counter = Participation(), Counter[int]()
    for cohort in rounds:
        before = worst(counter)
        risen = ours.add(*sorted_ids(cohort))
        counter.update(cohort)
        assert dict(zip(ours.devices.tolist(), ours.counts.tolist(), strict=True)) == counter
        assert ours.worst == worst(counter)
        assert risen == sorted(lv for lv, n in worst(counter).items() if n > before.get(lv, 0))
        assert len(ours) == len(counter)


@given(cohorts, st.integers(1, 4))
def test_no_device_takes_part_more_often_than_the_limit(
    rounds: list[set[int]], limit: int
) -> None:
    ours, counter = Participation(limit), Counter[int]()
    for cohort in rounds:
        allowed = ours.allowed(sorted_ids(cohort)[0])
        assert set(allowed.tolist()) == {device for device in cohort if counter[device] < limit}
        ours.add(allowed, np.array([level_of(d) for d in allowed.tolist()], dtype=np.uint8))
        counter.update(allowed.tolist())
        for level in range(4):
            assert ours.may_rise(level) == (worst(counter).get(level, 0) < limit)
    assert max(counter.values(), default=0) <= limit


@given(cohorts)
def test_participation_survives_its_state(rounds: list[set[int]]) -> None:
    ours, loaded = Participation(), Participation()
    for cohort in rounds:
        ours.add(*sorted_ids(cohort))
    loaded.load(ours.state())
    cohort = sorted_ids({1, 2, 3})
    assert loaded.add(*cohort) == ours.add(*cohort)
    assert loaded.worst == ours.worst
    assert np.array_equal(loaded.devices, ours.devices)
    assert np.array_equal(loaded.counts, ours.counts)


def test_a_saved_state_is_not_moved_by_later_rounds(tmp_path: Path) -> None:
    ours = Participation()
    ours.add(*sorted_ids({1, 2}))
    state = RunState(1, PARAMETERS, participation=ours.state())
    ours.add(*sorted_ids({1, 2, 5}))
    kept = Participation()
    kept.load(load_checkpoint(save_checkpoint(tmp_path, state, keep=1)).participation)
    assert dict(zip(kept.devices.tolist(), kept.counts.tolist(), strict=True)) == {1: 1, 2: 1}


# -- a round ---------------------------------------------------------------------------------------


def honest(devices: np.ndarray, node: int) -> FleetReply:
    """Every device adds its own id to every coordinate."""
    total = float(devices.sum())
    levels = Counter(activity_levels(ACTIVITY[devices]).tolist())
    sums = {name: torch.full_like(tensor, total) for name, tensor in PARAMETERS.items()}
    return FleetReply(sums, dict(levels), 0, {"examples": 2.0 * len(devices), "loss": 1.0})


def fleets(answer: Answer, nodes: int, tamper: Callable[[Message], Message] | None = None) -> Any:
    """A grid of `nodes` fleets; `tamper` is done to the last one's reply."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        _, devices, _, _ = read_train_content(message.content)
        reply = Message(reply_content(answer(devices, context.node_id)), reply_to=message)
        return tamper(reply) if tamper and context.node_config["last"] else reply

    return LocalGrid(app, {}, [{"last": place == nodes - 1} for place in range(nodes)])


def strategy(
    mechanism: DeviceMechanism | CorrelatedMechanism | None = None,
    example: ExampleClipping | None = None,
    limit: int | None = None,
) -> NoisedSum:
    return NoisedSum(
        sampler=UniformSampler(DEVICES, COHORT, seed=11),
        activity=ACTIVITY,
        optimizer=FedAvg(1.0),
        mechanism=mechanism,
        training=LocalTraining(0.5, PLAN, example, None),
        ledger=Ledger(),
        participation=Participation(limit),
        source=NoiseSource.from_seed(4),
        settings="",
    )


def one_round(
    ours: NoisedSum, grid: Any, number: int = 1
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parameters and metrics after a round from PARAMETERS."""
    arrays = to_record(PARAMETERS)
    messages = ours.configure_train(number, arrays, ConfigRecord(), grid)
    record, found = ours.aggregate_train(number, grid.send_and_receive(messages))
    return {name: torch.from_numpy(a.numpy().copy()) for name, a in record.items()}, dict(found)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("nodes", [1, 2, 7])
def test_sums_are_divided_by_the_expected_cohort_however_many_fleets(nodes: int) -> None:
    ours = strategy()
    after, found = one_round(ours, fleets(honest, nodes))
    cohort = ours.sampler.sample(1)
    assert len(cohort) != COHORT
    move = float(cohort.sum()) / COHORT
    assert_close(after, {name: tensor + move for name, tensor in PARAMETERS.items()})
    assert (found["devices"], found["dropped"]) == (len(cohort), 0)
    assert found["examples"] == 2 * len(cohort)
    counted = dict(zip(found["levels"], found["devices_by_level"], strict=True))
    assert counted == Counter(activity_levels(ACTIVITY[cohort]).tolist())


def dropping(devices: np.ndarray, node: int) -> FleetReply:
    """Half of the devices have no finite update."""
    kept = devices[: len(devices) // 2]
    reply = honest(kept, node)
    reply.dropped = len(devices) - len(kept)
    return reply


def all_dropped(devices: np.ndarray, node: int) -> FleetReply:
    reply = honest(devices[:0], node)
    reply.dropped = len(devices)
    return reply


@pytest.mark.parametrize("answer", [honest, dropping, all_dropped])
def test_dropped_devices_change_neither_divisor_nor_noise(answer: Answer) -> None:
    mechanism = DeviceMechanism(clip_norm=1.0, noise_multiplier=5.0)
    after, found = one_round(strategy(mechanism), fleets(answer, 1))
    plain, _ = one_round(strategy(), fleets(answer, 1))
    generator = NoiseSource.from_seed(4).generator("central noise", 1)
    for name in sorted(PARAMETERS):
        drawn = generator.standard_normal(tuple(PARAMETERS[name].shape), dtype=np.float32)
        noise = torch.as_tensor(drawn) * 5.0 / COHORT
        torch.testing.assert_close(after[name] - plain[name], noise, rtol=1e-4, atol=1e-5)
    asked = len(strategy().sampler.sample(1))
    assert found["devices"] + found["dropped"] == asked
    assert found["dropped"] == {honest: 0, dropping: asked - asked // 2, all_dropped: asked}[answer]


def test_an_empty_cohort_is_a_round_of_pure_noise() -> None:
    mechanism = DeviceMechanism(1.0, 2.0)
    ours = strategy(mechanism, EXAMPLE)
    ours.sampler = UniformSampler(DEVICES, 1e-9, seed=1)
    after, found = one_round(ours, fleets(honest, 2))
    assert (found["devices"], found["dropped"], found["examples"]) == (0, 0, 0)
    assert all(bool((after[name] != PARAMETERS[name]).all()) for name in PARAMETERS)
    assert [event.unit for event in ours.ledger] == ["device"]


def test_without_any_fleet_it_says_so() -> None:
    with pytest.raises(RunError, match="no fleet is connected"):
        one_round(strategy(), fleets(honest, 0))


# -- bad replies -----------------------------------------------------------------------------------


def replaced(name: str, value: np.ndarray) -> Callable[[Message], Message]:
    def tamper(message: Message) -> Message:
        message.content.array_records["sums"][name] = Array(value)
        return message

    return tamper


def missing_key(message: Message) -> Message:
    del message.content.array_records["sums"]["b"]
    return message


def unknown_key(message: Message) -> Message:
    message.content.array_records["sums"]["c"] = Array(np.zeros(1, dtype=np.float32))
    return message


def garbled(message: Message) -> Message:
    array = message.content.array_records["sums"]["w"]
    array.data = array.data[: len(array.data) // 2]
    return message


def without(record: str) -> Callable[[Message], Message]:
    def tamper(message: Message) -> Message:
        del message.content[record]
        return message

    return tamper


def counting(change: Callable[[MetricRecord], None]) -> Callable[[Message], Message]:
    def tamper(message: Message) -> Message:
        change(message.content.metric_records["metrics"])
        return message

    return tamper


def failed(message: Message) -> Message:
    return Message(Error(code=0, reason="the node ran out of memory"), reply_to=message)


def _shift(found: MetricRecord, by: int) -> None:
    found["levels"] = [level + by for level in found["levels"]]  # type: ignore[union-attr]


BAD = {
    "missing key": missing_key,
    "unknown key": unknown_key,
    "wrong shape": replaced("w", np.zeros((3, 2), dtype=np.float32)),
    "broadcastable shape": replaced("w", np.zeros((1, 3), dtype=np.float32)),
    "float64": replaced("w", np.zeros((2, 3))),
    "float16": replaced("w", np.zeros((2, 3), dtype=np.float16)),
    "whole numbers": replaced("b", np.zeros((), dtype=np.int64)),
    "text": replaced("w", np.full((2, 3), "x")),
    "NaN": replaced("w", np.full((2, 3), np.nan, dtype=np.float32)),
    "infinity in a scalar": replaced("b", np.array(np.inf, dtype=np.float32)),
    "garbled bytes": garbled,
    "no sums": without("sums"),
    "no metrics": without("metrics"),
    "no count of the dropped": counting(lambda found: found.pop("dropped")),
    "levels without counts": counting(lambda found: found.update(devices=[1])),
    "more devices than asked": counting(
        lambda found: found.update(devices=[n + 1 for n in found["devices"]])
    ),
    "fewer devices than asked": counting(
        lambda found: found.update(devices=[n - 1 for n in found["devices"]])
    ),
    "a negative count": counting(
        lambda found: found.update(devices=[-n for n in found["devices"]])
    ),
    "levels nobody has": counting(lambda found: _shift(found, 10)),
    "levels that do not exist": counting(lambda found: _shift(found, -100)),
    "an error": failed,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_costs_its_devices_and_not_the_round(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = strategy(DeviceMechanism(1.0, 1e-6))
    after, found = one_round(ours, fleets(honest, 2, BAD[kind]))
    cohort = ours.sampler.sample(1)
    good = cohort[cohort % 2 == 0]
    move = float(good.sum()) / COHORT
    assert_close(after, {name: tensor + move for name, tensor in PARAMETERS.items()})
    assert (found["devices"], found["dropped"]) == (len(good), len(cohort) - len(good))
    assert found["bad_replies"] == 1
    assert len(ours.ledger) == 1
    assert "round 1: " in caplog.text


def test_a_reply_that_comes_twice_counts_once() -> None:
    ours, grid = strategy(), fleets(honest, 2)
    messages = ours.configure_train(1, to_record(PARAMETERS), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    record, found = ours.aggregate_train(1, [*replies, replies[0]])
    assert found["devices"] == len(ours.sampler.sample(1))
    single, _ = one_round(strategy(), fleets(honest, 2))
    assert_close({n: torch.from_numpy(a.numpy().copy()) for n, a in record.items()}, single)


def test_a_fleet_that_never_answers_costs_its_devices() -> None:
    ours, grid = strategy(), fleets(honest, 2)
    messages = ours.configure_train(1, to_record(PARAMETERS), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    _, found = ours.aggregate_train(1, replies[:1])
    cohort = ours.sampler.sample(1)
    assert found["devices"] == int((cohort % 2 == 0).sum())
    assert found["devices"] + found["dropped"] == len(cohort)


@pytest.mark.parametrize("order", [["w", "b"], ["b", "w"]])
def test_a_reply_is_read_in_the_order_of_the_model(order: list[str]) -> None:
    reply = honest(np.array([1, 2]), 0)
    reply.sums = {name: reply.sums[name] for name in order}
    assert list(read_reply(reply_content(reply), PARAMETERS).sums) == list(PARAMETERS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_total_that_is_not_finite_moves_neither_sums_nor_clip_norm(value: float) -> None:
    reply = honest(np.array([1, 2]), 0)
    reply.totals |= {"clipped_devices": value, "late": value}
    found = read_reply(reply_content(reply), PARAMETERS)
    assert found.totals["clipped_devices"] == found.totals["late"] == 0.0
    assert all(bool((found.sums[name] == reply.sums[name]).all()) for name in PARAMETERS)


# -- what is written down --------------------------------------------------------------------------


def test_every_round_is_one_event_and_a_risen_level_another() -> None:
    ours = strategy(DeviceMechanism(1.0, 2.0), EXAMPLE)
    grid, counter = fleets(honest, 2), Counter[int]()
    levels = activity_levels(ACTIVITY)

    def highest() -> dict[int, int]:
        found: dict[int, int] = {}
        for device, count in counter.items():
            found[int(levels[device])] = max(found.get(int(levels[device]), 0), count)
        return found

    for number in range(1, 13):
        before, seen = highest(), len(ours.ledger)
        one_round(ours, grid, number)
        counter.update(ours.sampler.sample(number).tolist())
        new = ours.ledger.events[seen:]
        device, *examples = [event for event in new if isinstance(event, GaussianEvent)]
        assert (device.unit, device.round, device.noise_multiplier) == ("device", number, 2.0)
        assert device.by_level == tuple((lv, COHORT / DEVICES, 1) for lv in range(16))
        risen = sorted(lv for lv, n in highest().items() if n > before.get(lv, 0))
        expected = tuple((lv, PLAN.rate(lv), PLAN.steps(lv, 1)) for lv in risen)
        assert [event.by_level for event in examples] == ([expected] if risen else [])
        assert all(event.observer == "server" and event.round == number for event in examples)
    assert len([event for event in ours.ledger if event.unit == "device"]) == 12


def test_example_epsilon_is_that_of_the_busiest_device_of_the_worst_level() -> None:
    ours = strategy(None, EXAMPLE)
    for number in range(1, 9):
        one_round(ours, fleets(honest, 1), number)
    counts = Counter(d for r in range(1, 9) for d in ours.sampler.sample(r).tolist())
    levels = activity_levels(ACTIVITY)
    delta = 1e-5
    by_level = {}
    for device, count in counts.items():
        level = int(levels[device])
        by_level[level] = max(by_level.get(level, 0), count)
    expected = max(
        epsilon(
            GaussianEvent(
                noise_multiplier=2.5, sampling="poisson", unit="example", observer="server",
                sampling_rate=PLAN.rate(level), count=PLAN.steps(level, 1) * busiest,
            ),
            delta,
        )
        for level, busiest in by_level.items()
    )
    budget = RunBudget(ours.ledger, {"example": delta}, {})
    assert epsilon(ours.ledger, delta) == pytest.approx(expected, rel=1e-9)
    assert budget.spent(ours.ledger)["epsilon_example"] == pytest.approx(expected, rel=2e-3)


def test_a_device_at_its_limit_is_not_asked_again() -> None:
    ours, grid, asked = strategy(None, EXAMPLE, limit=1), fleets(honest, 2), Counter[int]()
    for number in range(1, 13):
        one_round(ours, grid, number)
        assert ours.current is not None
        asked.update(ours.current.devices.tolist())
    assert set(asked.values()) == {1}
    assert ours.participation.worst == dict.fromkeys(ours.participation.worst, 1)


def test_a_budget_reckons_with_what_the_next_round_may_cost_at_most() -> None:
    ours = strategy(DeviceMechanism(1.0, 2.0), EXAMPLE)
    for number in range(1, 4):
        ahead = ours.events_ahead()
        one_round(ours, fleets(honest, 1), number)
        new = ours.ledger.events[-2:]
        assert {event.unit for event in ahead} == {"device", "example"}
        for event, planned in zip(new, ahead, strict=True):
            assert isinstance(event, GaussianEvent) and isinstance(planned, GaussianEvent)
            assert set(event.by_level or ()) <= set(planned.by_level or ())


def test_levels_whose_devices_are_all_at_their_limit_cost_nothing_more() -> None:
    ours = strategy(None, EXAMPLE, limit=1)
    one_round(ours, fleets(honest, 1))
    reached = set(ours.participation.worst)
    (event,) = ours.events_ahead()
    assert isinstance(event, GaussianEvent)
    assert {level for level, _, _ in event.by_level or ()} == set(range(16)) - reached


def test_before_anything_was_released_nothing_is_spent() -> None:
    ours = strategy(None, EXAMPLE)
    budget = RunBudget(ours.ledger, {"example": 1e-5}, {"example": 1.0})
    assert not touched(ours.ledger, "example")
    assert budget.spent(ours.ledger) == {"epsilon_example": 0.0}
    one_round(ours, fleets(honest, 1))
    assert touched(ours.ledger, "example")
    assert (budget.spent(ours.ledger)["epsilon_example"] or 0) > 0


def test_without_noise_epsilon_is_infinite_and_said_so() -> None:
    ours = strategy(DeviceMechanism(1.0, 0.0))
    budget = RunBudget(ours.ledger, {"device": 1e-5}, {"device": 100.0})
    assert "privacy.device.max_epsilon=100" in (budget.exceeded_by(ours) or "")
    one_round(ours, fleets(honest, 1))
    assert budget.spent(ours.ledger) == {"epsilon_device": None}


def test_messages_hold_no_more_than_parameters_devices_round_and_settings() -> None:
    ours = strategy()
    (message,) = ours.configure_train(3, to_record(PARAMETERS), ConfigRecord(), fleets(honest, 1))
    parameters, devices, number, settings = read_train_content(message.content)
    assert_close(parameters, PARAMETERS)
    assert np.array_equal(devices, ours.sampler.sample(3))
    assert (number, settings) == (3, "")
    assert set(message.content) == {"parameters", "cohort", "config"}
    assert isinstance(message.content["parameters"], ArrayRecord)


# -- rounds asked for twice ------------------------------------------------------------------------


def test_a_round_whose_sums_were_lost_is_booked_for_every_level() -> None:
    ours = strategy(example=EXAMPLE)
    one_round(ours, fleets(honest, 1))
    once = epsilon(ours.ledger, 1e-5, unit="example", observer="server")
    ours.book_lost(2)
    event = ours.ledger.events[-1]
    assert isinstance(event, GaussianEvent) and event.by_level is not None
    assert {level for level, _, _ in event.by_level} == set(ours.sampler.rates)
    assert epsilon(ours.ledger, 1e-5, unit="example", observer="server") > once
    assert event.noise_multiplier == EXAMPLE.noise_multiplier and event.round == 2


def test_a_lost_round_is_booked_with_its_own_decayed_noise() -> None:
    decaying = ExampleClipping(clip_norm=1.0, noise_multiplier=2.0, noise_decay=0.5, rounds=3)
    ours = strategy(example=decaying)
    ours.book_lost(3)
    event = ours.ledger.events[-1]
    assert isinstance(event, GaussianEvent) and event.noise_multiplier == 0.5


def test_without_noise_on_devices_a_lost_round_books_nothing() -> None:
    ours = strategy()
    ours.book_lost(1)
    assert not ours.ledger.events


def released(ours: NoisedSum, number: int) -> tuple[list[int], Tensor]:
    """Who was asked in a round, and what was released of it."""
    parameters, _ = one_round(ours, fleets(all_dropped, 1), number)  # pure noise, then
    assert ours.current is not None
    return ours.current.devices.tolist(), torch.cat([t.flatten() for t in parameters.values()])


def test_a_round_done_again_has_other_coins_and_other_noise() -> None:
    """With the same noise, the difference of two releases would show their sums' difference."""
    mechanism = DeviceMechanism(1.0, 1.0, 0.0)
    first, noise = released(strategy(mechanism), 2)
    same, same_noise = released(strategy(mechanism), 2)
    assert same == first and torch.equal(noise, same_noise)
    seen = [noise]
    for times in (1, 2):
        ours = strategy(mechanism)
        for _ in range(times):
            ours.book_lost(2)
        devices, again = released(ours, 2)
        assert devices != first
        assert all(bool((again != other).all()) for other in seen)
        seen.append(again)
        _, next_round = released(ours, 3)
        assert torch.equal(next_round, released(strategy(mechanism), 3)[1])


def test_correlated_noise_of_a_lost_round_is_what_later_rounds_and_a_second_resume_take_off() -> (
    None
):
    """Other noise for round 2 than a replay draws would void the proof for all that follow."""
    schedule = Schedule(4, min_separation=1, max_participations=4)

    def correlated() -> CorrelatedMechanism:
        return CorrelatedMechanism(1.0, 1.0, make_factorisation("bisr", schedule, 3), schedule)

    def rounds(ours: NoisedSum, *numbers: int) -> list[Tensor]:
        return [released(ours, number)[1] for number in numbers]

    never_stopped = strategy(correlated())
    whole = rounds(never_stopped, 1, 2, 3, 4)
    lossy = strategy(correlated())
    first = rounds(lossy, 1)
    lossy.book_lost(2)
    assert all(map(torch.equal, first + rounds(lossy, 2, 3), whole[:3]))
    again = correlated()
    take_up(again, RunState(3, PARAMETERS), NoiseSource.from_seed(4))
    assert torch.equal(rounds(strategy(again), 4)[0], whole[3])


def test_a_budget_reckons_with_lost_rounds_before_the_first_one_of_a_resumed_run() -> None:
    deltas = {"example": 1e-5}
    ours = strategy(example=EXAMPLE)
    one_round(ours, fleets(honest, 1))
    spent = epsilon(ours.ledger, 1e-5, unit="example", observer="server")
    once_more = Ledger(ours.ledger.events)
    for event in ours.events_ahead():
        once_more.append(event)
    limit = epsilon(once_more, 1e-5, unit="example", observer="server") * 1.01
    assert limit > spent
    budget = RunBudget(ours.ledger, deltas, {"example": limit})
    assert budget.exceeded_by(ours) is None
    ours.book_lost(2)
    assert "max_epsilon" in (budget.exceeded_by(ours) or "")


def test_a_resumed_run_keeps_the_releases_that_its_checkpoint_does_not_know(
    tmp_path: Path,
) -> None:
    ours = strategy(DeviceMechanism(1.0, 1.0, 0.0))
    one_round(ours, fleets(honest, 1), 1)
    state = RunState(1, PARAMETERS, ledger=Ledger(ours.ledger.events))
    one_round(ours, fleets(honest, 1), 2)
    ours.ledger.save(tmp_path / "ledger.json")
    keep_releases(tmp_path / "ledger.json", state)
    assert state.ledger.events == ours.ledger.events and len(state.ledger) == 2


def test_an_interrupted_live_run_counts_what_it_asked_for_and_a_resume_not_once_more(
    tmp_path: Path,
) -> None:
    """A report of it as it stands may be all that is ever written."""
    (tmp_path / "checkpoints").mkdir()
    requests, path = RequestLog(tmp_path / "checkpoints"), tmp_path / "ledger.json"
    ours = strategy(example=EXAMPLE)
    requests.on_request(1)
    one_round(ours, fleets(honest, 1))
    ours.ledger.save(path)
    kept = ours.ledger.events

    def stopped() -> tuple[Any, RunState]:
        """What is there after the checkpoint of round 1, and of a resumed process."""
        state = RunState(1, PARAMETERS, ledger=Ledger(kept))
        keep_releases(path, state)
        found = strategy(example=EXAMPLE)
        found.ledger = state.ledger
        return SimpleNamespace(strategy=found), state

    for times in (1, 2):
        setup, state = stopped()
        book_lost(tmp_path, setup, state)
        assert len(state.ledger) == times and setup.strategy.lost[2] == times - 1
        requests.on_request(2)
        setup, state = stopped()
        book_interrupted(tmp_path, setup, state)
        ledger = Ledger.load(path)
        assert [event.round for event in ledger.events] == [1] + [2] * times


def test_correlated_noise_cannot_be_drawn_anew(tmp_path: Path) -> None:
    ahead = Ledger([], claims={"correlated_noise": {}})
    ahead.append(GaussianEvent(noise_multiplier=1.0, sampling="none", by_level=((0, 1.0, 1),),
                               unit="device", relation="zero_out", observer="release"))
    ahead.save(tmp_path / "ledger.json")
    with pytest.raises(RunError, match="start a new run"):
        keep_releases(tmp_path / "ledger.json", RunState(1, PARAMETERS))


def test_every_request_is_on_disk_before_a_message_leaves(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    for number in (1, 2, 3, 3):
        log.on_request(number)
        assert RequestLog(tmp_path).after(number - 1)[-1] == number
    assert log.after(1) == [2, 3, 3]
    assert RequestLog(tmp_path / "none").after(0) == []


@pytest.mark.parametrize("torn", ["1", "12", "-", "-1"])
def test_a_request_whose_line_was_torn_was_never_made(tmp_path: Path, torn: str) -> None:
    log = RequestLog(tmp_path)
    log.on_request(11)
    with log.path.open("a") as file:
        file.write(torn)
    assert log.after(0) == [11]
    log.on_request(12)
    assert log.after(0) == [11, 12]


def test_figures_that_devices_do_not_report_are_not_made_up() -> None:
    """Real devices hand over updates and next to nothing else: no loss is not a loss of 0."""
    def silent(devices: np.ndarray, node: int) -> FleetReply:
        return replace(honest(devices, node), totals={"examples": 2.0 * len(devices)})

    _, said = one_round(strategy(), fleets(honest, 1))
    _, unsaid = one_round(strategy(), fleets(silent, 1))
    assert "train_loss" in said and "train_loss" not in unsaid
    assert not {name for name in unsaid if "clipped" in name or "norm" in name} - {"update_norm"}
    assert unsaid["examples"] == said["examples"]
