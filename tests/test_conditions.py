"""Conditions of devices: who answers, how it is accounted, and what a projection claims."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_fleets import CLIPPED, DEVICES, NOISED, assert_same, fleet, parameters_of, slow_update
from small_runs import FIXED_NOISE, metrics, resume, run, run_until_killed

from sottovoce.client.batches import BatchPlan
from sottovoce.client.cohort import Draw, draw_cohort
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import FleetReply
from sottovoce.privacy import Ledger, epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.server.account import AccountConfig
from sottovoce.server.account_run import of_run, statement_of_run
from sottovoce.server.conditions_limits import asked_cohort
from sottovoce.server.limits import validate
from sottovoce.server.settings import compose
from sottovoce.simulations.attendance import Attendance, attendance
from sottovoce.simulations.conditions import (
    Conditions,
    ConditionsConfig,
    SpeedClassConfig,
    Work,
    make_conditions,
)
from sottovoce.strategies.projection import ProjectedSampler, projected
from sottovoce.strategies.samplers import FixedSizeSampler, UniformSampler

MANY = np.arange(100_000, dtype=np.int64)
CURVE = [0.05 + 0.03 * hour for hour in range(24)]
CLASSES = {
    "fast": SpeedClassConfig(share=1, speed=2.0, down_mbps=50, up_mbps=20),
    "slow": SpeedClassConfig(share=3, speed=0.2, down_mbps=4, up_mbps=1),
}
PLAN = BatchPlan(4, local_epochs=2, max_examples=12, poisson=False)
WORK = Work(PLAN, 40_000, 40_000)
PHONES = ConditionsConfig(
    seed=3, availability=CURVE, time_zones=[-8, 0, 5.5], dropout=0.1, deadline_s=1.0, jitter=0.6,
    classes=CLASSES, reference_examples_per_second=30, round_minutes=20,
)
HARD = (  # for runs: most things go wrong
    "conditions.availability=[" + ",".join(["0.7"] * 24) + "]", "conditions.dropout=0.1",
    "conditions.over_selection=1.5", "conditions.deadline_s=2", "conditions.jitter=0.5",
    "+conditions.classes={slow: {share: 1, speed: 0.3, down_mbps: 20, up_mbps: 5}}",
)


def close(found: float, probability: float, trials: int) -> bool:
    """Whether a frequency is within six standard deviations, and a rounding, of its mean."""
    return abs(found - probability) <= 6 * math.sqrt(
        probability * (1 - probability) / trials
    ) + 1e-9


def cohort(devices: np.ndarray, levels: np.ndarray, steps: int) -> list[Draw]:
    batches = [np.arange(4) + 4 * s for s in range(steps)]
    return [Draw(d, lv, batches) for d, lv in zip(devices.tolist(), levels.tolist(), strict=True)]


# -- the world -------------------------------------------------------------------------------------


def test_every_choice_is_a_function_of_seed_device_and_round_alone() -> None:
    whole, again = Conditions(PHONES), Conditions(PHONES)
    part = MANY[::-7]
    for server_round in (1, 2, 9):
        for name in ("available", "fails", "jitter"):
            of_all = getattr(whole, name)(MANY, server_round)
            assert np.array_equal(getattr(again, name)(part, server_round), of_all[part]), name
    assert np.array_equal(again.time_zone(part), whole.time_zone(MANY)[part])
    assert np.array_equal(again.speed_class(part), whole.speed_class(MANY)[part])
    other = Conditions(replace(PHONES, seed=4))
    assert not np.array_equal(other.available(MANY, 1), whole.available(MANY, 1))


@pytest.mark.parametrize("server_round", [1, 4, 30, 72])
def test_availability_follows_the_curve_at_the_devices_own_hour(server_round: int) -> None:
    conditions = Conditions(replace(PHONES, start_hour=7.5))
    zones, here = conditions.time_zone(MANY), conditions.available(MANY, server_round)
    for zone in (-8, 0, 5.5):
        mine = zones == zone
        hour = math.floor(7.5 + (server_round - 1) / 3 + zone) % 24
        assert close(mine.mean(), 1 / 3, len(MANY))
        assert close(here[mine].mean(), CURVE[hour], int(mine.sum()))


def test_a_device_that_can_be_reached_stays_so_within_the_hour_only() -> None:
    conditions = Conditions(replace(PHONES, time_zones=[]))
    rounds = [conditions.available(MANY, number) for number in range(1, 5)]
    assert np.array_equal(rounds[0], rounds[1]) and np.array_equal(rounds[0], rounds[2])
    both = (rounds[0] & rounds[3]).mean()
    assert close(both, CURVE[0] * CURVE[1], len(MANY))


def test_dropouts_classes_and_jitter_have_their_frequencies() -> None:
    conditions = Conditions(PHONES)
    assert close(conditions.fails(MANY, 3).mean(), 0.1, len(MANY))
    assert close((conditions.speed_class(MANY) == 1).mean(), 0.75, len(MANY))
    logs = np.log(conditions.jitter(MANY, 3))
    assert abs(logs.mean()) < 6 * 0.6 / math.sqrt(len(MANY))
    assert abs(logs.std() - 0.6) < 6 * 0.6 / math.sqrt(2 * len(MANY))
    joint = conditions.available(MANY, 3) & conditions.fails(MANY, 3)
    assert close(joint.mean(), conditions.available(MANY, 3).mean() * 0.1, len(MANY))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("level", [0, 2, 5])
def test_the_public_share_of_replies_is_what_the_fleet_sees(level: int, partial: bool) -> None:
    conditions = Conditions(replace(PHONES, partial_work=partial))
    seen = Attendance(conditions, WORK)
    rounds = 6
    shares = []
    for number in range(1, rounds + 1):
        devices = np.arange(8000 * number, 8000 * (number + 1))
        kept, counts = seen.apply(
            cohort(devices, np.full(8000, level), WORK.steps(level)), number
        )
        assert len(kept) + sum(counts[n] for n in ("unavailable", "failed", "late")) == 8000
        shares.append(len(kept) / 8000)
    expected = conditions.reply_share(WORK, level, rounds)
    assert 0 < expected < 1
    assert close(float(np.mean(shares)), expected, 8000 * rounds)


# -- who takes part --------------------------------------------------------------------------------


def test_attendance_does_not_depend_on_a_devices_examples_within_its_level() -> None:
    for partial in (False, True):
        seen = Attendance(Conditions(replace(PHONES, partial_work=partial)), WORK)
        devices, levels = np.arange(3000), np.full(3000, 3)
        few, counts = seen.apply(cohort(devices, levels, 3), 2)
        many, same = seen.apply(cohort(devices, levels, 6), 2)
        assert [d.device for d in sorted(few, key=lambda d: d.device)] == [
            d.device for d in sorted(many, key=lambda d: d.device)
        ]
        assert {**counts, "partial": 0} == {**same, "partial": 0}


def test_a_late_device_hands_in_the_first_steps_that_fit_and_no_others() -> None:
    alone = ConditionsConfig(
        deadline_s=1.0, partial_work=True, reference_examples_per_second=10,
        classes={"one": SpeedClassConfig(1, 1.0, 1e6, 1e6)},
    )
    plan = BatchPlan(4, local_epochs=1, max_examples=100, poisson=False)
    seen = Attendance(Conditions(alone), Work(plan, 0, 0))
    # Level 4: 23.5 examples in 6 steps take 2.35 s, a step 0.39 s: two fit into a second.
    kept, counts = seen.apply(cohort(np.array([1]), np.array([4]), 6), 1)
    assert len(kept[0].steps) == 2 and counts["partial"] == 1
    assert [s.tolist() for s in kept[0].steps] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    whole = Attendance(Conditions(replace(alone, partial_work=False)), Work(plan, 0, 0))
    kept, counts = whole.apply(cohort(np.array([1]), np.array([4]), 6), 1)
    assert not kept and counts["late"] == 1
    kept, counts = whole.apply(cohort(np.array([1]), np.array([2]), 2), 1)
    assert len(kept[0].steps) == 2 and not any(counts.values())


@pytest.mark.parametrize("partial", [False, True])
def test_a_fleets_sum_is_that_of_the_devices_and_steps_that_made_it(partial: bool) -> None:
    settings = replace(PHONES, availability=[0.8] * 24, partial_work=partial, deadline_s=0.7)
    fast = fleet("bilstm", None, 0.05, epochs=2)
    draws = draw_cohort(fast.population, DEVICES, fast.training.plan, 2, fast.source)
    fast.attendance = attendance(Conditions(settings), fast.training, 40_000)
    assert fast.attendance is not None
    kept, counts = fast.attendance.apply(draws, 2)
    assert 0 < len(kept) < len(DEVICES) and bool(counts["partial"]) == partial
    reply = fast.train(parameters_of(fast.model), DEVICES, 2)
    slow = {n: torch.zeros_like(p) for n, p in fast.model.named_parameters()}
    for draw in kept:
        signal, _ = slow_update(fast, draw, np.zeros(0, dtype=np.int64), 2)
        for name, part in signal.items():
            slow[name] += part.detach()
    assert_same(reply.sums, slow)
    assert sum(reply.devices_by_level.values()) == len(kept)
    assert reply.dropped == len(DEVICES) - len(kept)
    assert {name: reply.totals[name] for name in counts} == counts


def test_a_fleet_whose_devices_are_all_away_answers_with_zeros() -> None:
    fast = fleet("bilstm", CLIPPED, 0.05)
    away = Conditions(ConditionsConfig(availability=[0.0] * 24))
    fast.attendance = attendance(away, fast.training, 1.0)
    reply = fast.train(parameters_of(fast.model), DEVICES, 1)
    assert all(not tensor.any() for tensor in reply.sums.values())
    assert reply.dropped == len(DEVICES) and reply.devices_by_level == {}


def test_partial_work_is_refused_where_devices_add_noise_that_is_counted_on() -> None:
    partial = Conditions(replace(PHONES, partial_work=True))
    with pytest.raises(ConfigError, match="partial_work"):
        attendance(partial, fleet("bilstm", NOISED, 0.05).training, 1.0)
    with pytest.raises(ConfigError, match=r"privacy\.example"):
        validate(compose(["conditions=phones", "conditions.partial_work=true"]))
    validate(compose(["conditions=phones", "conditions.partial_work=true", "privacy=device"]))


def test_a_laboratory_needs_no_attendance() -> None:
    assert make_conditions(None).lossless
    assert attendance(make_conditions({}), fleet("bilstm", None, None).training, 1.0) is None
    assert not make_conditions(compose(["conditions=phones"]).conditions).lossless


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("conditions.availability=[0.5]", "24 probabilities"),
        ("conditions.deadline_s=5", "conditions=phones"),
        ("conditions.partial_work=true", "deadline_s"),
        ("conditions.over_selection=0.5", "at least 1"),
        ("conditions.over_selection=5000", "lower"),
        ("conditions.dropout=1", "below 1"),
        ("conditions.time_zones=[20]", "-12 to 14"),
        ("noise_cohort_size=999", "below cohort_size"),
        ("noise_cohort_size=5000", "privacy=device"),
    ],
)
def test_impossible_conditions_are_refused_in_one_line(setting: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        validate(compose([setting]))
    assert "\n" not in str(caught.value)
    assert setting.split("=")[0] in str(caught.value)


# -- runs: the accountant sees who was asked -------------------------------------------------------


def ledger_of(folder: Path) -> Ledger:
    return Ledger.load(folder / "ledger.json")


def rounds_of(ledger: Ledger) -> list[GaussianEvent]:
    return [e for e in ledger if isinstance(e, GaussianEvent) and e.round and e.unit == "device"]


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_over_selection_is_accounted_like_the_larger_cohort_whoever_answers(
    tmp_path: Path,
) -> None:
    assert run(tmp_path / "hard", *FIXED_NOISE, *HARD, "seed=1") == 0
    assert run(tmp_path / "large", *FIXED_NOISE, "cohort_size=15", "seed=1") == 0
    hard, large = ledger_of(tmp_path / "hard"), ledger_of(tmp_path / "large")
    assert [e.by_level for e in rounds_of(hard)] == [e.by_level for e in rounds_of(large)]
    assert epsilon(hard, 1e-5, unit="device") == epsilon(large, 1e-5, unit="device")
    said = hard.claims["conditions"]
    assert said["asked_cohort_size"] == pytest.approx(15)
    assert 0 < said["expected_replies"] < 0.7 * 0.9 * 15 + 1e-9
    records = [r for r in metrics(tmp_path / "hard") if r["round"]]
    assert all(r["dropped"] == 0 for r in records)
    asked = [sum(r["devices_by_level"].values()) for r in records]
    answered = [r["devices"] + r["unavailable"] + r["failed"] + r["late"] for r in records]
    assert asked == answered
    paragraph = statement_of_run(AccountConfig(), tmp_path / "hard")["paragraph"]
    assert "not all answer" in paragraph


@pytest.mark.parametrize("privacy", ["both", "device"])
def test_a_resumed_run_under_conditions_equals_one_that_never_stopped(
    tmp_path: Path, privacy: str
) -> None:
    chosen = [*HARD, f"privacy={privacy}", "privacy.device.epsilon=null",
              "privacy.device.noise_multiplier=1.5", "seed=3"]
    if privacy == "device":
        chosen.append("conditions.partial_work=true")
    assert run(tmp_path / "whole", *chosen) == 0
    run_until_killed(tmp_path / "cut", *chosen, at=2)
    assert resume(tmp_path / "cut") == 0
    for name in ("model.safetensors", "ledger.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_without_conditions_a_run_is_what_settings_of_an_older_run_give(tmp_path: Path) -> None:
    assert run(tmp_path / "now", *FIXED_NOISE, "seed=2") == 0
    from omegaconf import OmegaConf
    from small_runs import SMALL

    from sottovoce.server.simulate import simulate

    older = compose([*SMALL, *FIXED_NOISE, "seed=2"])
    OmegaConf.set_struct(older, False)
    del older["conditions"], older["noise_cohort_size"]
    (tmp_path / "old").mkdir()
    assert simulate(older, tmp_path / "old") == 0
    for name in ("model.safetensors", "ledger.json"):
        assert (tmp_path / "now" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()


def test_a_schedule_counts_devices_that_were_asked_whether_they_answered_or_not(
    tmp_path: Path,
) -> None:
    chosen = ["privacy=device", "privacy.device.epsilon=null", "strategy.max_rate=null",
              "privacy.device.noise_multiplier=3", "privacy.device.min_separation=3", *HARD[:3]]
    assert run(tmp_path / "r", *chosen, "seed=5") == 0
    cost = summary_of(tmp_path / "r")["cost"]
    assert cost["asked_a_round"] == 15 and cost["answers_a_round"] < 15
    assert cost["participations"]["worst"] == 1


# -- noise cohorts ---------------------------------------------------------------------------------


def test_a_projected_sampler_is_the_large_cohorts_thinned() -> None:
    whole = UniformSampler(10_000, 500, seed=1)
    small = ProjectedSampler(whole, 0.1)
    assert small.rates == whole.rates and small.expected_cohort_size == 500
    sizes = []
    for number in range(200):
        drawn = small.sample(number)
        assert np.isin(drawn, whole.sample(number)).all()
        assert np.array_equal(drawn, small.sample(number))
        sizes.append(len(drawn))
    assert abs(np.mean(sizes) - 50) < 6 * math.sqrt(50 / 200)


def test_projected_sums_keep_the_mean_and_one_is_no_projection() -> None:
    total = FleetReply({"w": torch.tensor([3.0])}, {2: 4}, 1, {"loss": 2.0})
    assert projected(total, 1) is total
    large = projected(total, 12.5)
    assert float(large.sums["w"]) / (12.5 * 4) == float(total.sums["w"]) / 4
    assert large.devices_by_level == {2: 50} and large.totals == {"loss": 25.0}


def test_a_noise_cohort_has_the_epsilon_and_noise_of_the_large_one_and_says_so(
    tmp_path: Path,
) -> None:
    quiet = ["privacy=device", "privacy.device.epsilon=null", "strategy=fedavg",
             "privacy.device.noise_multiplier=1.5", "seed=4", "rounds=2"]
    assert run(tmp_path / "large", *quiet, "cohort_size=50") == 0
    assert run(tmp_path / "small", *quiet, "cohort_size=5", "noise_cohort_size=50") == 0
    large, small = ledger_of(tmp_path / "large"), ledger_of(tmp_path / "small")
    assert [e.by_level for e in rounds_of(small)] == [e.by_level for e in rounds_of(large)]
    assert small.claims["projection"] == {"cohort_size": 5, "noise_cohort_size": 50}
    trained = [r["devices"] for r in metrics(tmp_path / "small") if r["round"]]
    assert max(trained) < 20
    summary = summary_of(tmp_path / "small")
    assert any("does not have this epsilon" in line for line in summary["warnings"])
    assert summary["projection"] == {"cohort_size": 5, "noise_cohort_size": 50}
    assert all(r["projection"] is True for r in metrics(tmp_path / "small"))
    assert not any("projection" in r for r in metrics(tmp_path / "large"))
    assert "projection" not in summary["metrics"]
    assert "does not have this ε" in summary["statement"]
    facts = of_run(AccountConfig(), tmp_path / "small")
    assert "does not have this ε" in facts["projection"]
    assert "projection" not in of_run(AccountConfig(), tmp_path / "large")
    assert "does not have this ε" in (tmp_path / "small" / "MODEL_CARD.md").read_text()


def test_the_noise_on_a_projections_mean_is_that_of_the_large_cohort() -> None:
    from sottovoce.client.fleet import LocalTraining
    from sottovoce.client.messages import to_record
    from sottovoce.privacy.mechanisms.device import DeviceMechanism
    from sottovoce.privacy.mechanisms.noise import NoiseSource
    from sottovoce.strategies.noised_sum import NoisedSum, Round
    from sottovoce.strategies.optimizers import FedAvg
    from sottovoce.strategies.participation import Participation

    zeros = {"w": torch.zeros(40_000)}
    found = {}
    for factor in (1.0, 10.0):
        whole = UniformSampler(1000, 50, seed=1)
        strategy = NoisedSum(
            sampler=ProjectedSampler(whole, 1 / factor), activity=np.ones(1000, np.uint16),
            optimizer=FedAvg(1.0), mechanism=DeviceMechanism(0.5, 2.0),
            training=LocalTraining(0.1, PLAN, None, 0.5), ledger=Ledger(),
            participation=Participation(), source=NoiseSource.from_seed(1), settings="",
            projection=factor,
        )
        none = np.zeros(0, dtype=np.int64)
        strategy.current = Round(1, zeros, none, none.astype(np.uint8))
        arrays, _ = strategy.aggregate_train(1, [])
        found[factor] = arrays["w"].numpy()
        assert to_record(zeros).keys() == arrays.keys()
    assert np.array_equal(found[1.0], found[10.0])
    assert abs(found[1.0].std() - 2.0 * 0.5 / 50) < 6 * 0.02 / math.sqrt(2 * 40_000)


@pytest.mark.parametrize(
    "others", [["privacy=both"], ["privacy=example"], ["privacy=none"],
               ["privacy=device", "privacy.device.private_metrics=true"]],
)
def test_noise_cohorts_that_cannot_be_accounted_are_refused(others: list[str]) -> None:
    with pytest.raises(ConfigError, match="noise_cohort_size"):
        validate(compose(["cohort_size=100", "noise_cohort_size=1000", *others]))


def test_cohorts_of_fixed_size_are_asked_in_whole_numbers() -> None:
    chosen = ["privacy=device", "strategy.sampler=fixed_size", "cohort_size=10"]
    assert asked_cohort(compose([*chosen, "conditions.over_selection=1.25"])) == 13
    assert asked_cohort(compose([*chosen])) == 10
    assert FixedSizeSampler(100, 13, seed=1).expected_cohort_size == 13
    assert asked_cohort(compose(["cohort_size=10", "conditions.over_selection=1.25"])) == 12.5


def test_an_audit_of_a_projection_refuses_to_hold_its_epsilon_against_attacks() -> None:
    from sottovoce.privacy.audit.claims import read_claims
    from sottovoce.privacy.audit.verdict import Verdict, judge

    said = {"projection": {"cohort_size": 5, "noise_cohort_size": 50}}
    event = GaussianEvent(noise_multiplier=1.0, unit="device", purpose="a sum")
    verdicts = {}
    for claims in ({}, said):
        ledger = Ledger(deltas={"device": 1e-5}, claims=claims)
        ledger.append(event)
        found = read_claims(ledger, {}, epsilon)
        verdicts[bool(claims)] = judge(found, [])
    assert verdicts[True].verdict is Verdict.INVALID
    assert "does not have this epsilon" in verdicts[True].reason
    assert "projection" not in verdicts[False].reason


def test_conditions_that_leave_nobody_end_a_run_before_it_begins(tmp_path: Path) -> None:
    nobody = "conditions.availability=[" + ",".join(["0"] * 24) + "]"
    with pytest.raises(ConfigError, match="nobody who could answer"):
        run(tmp_path / "r", *FIXED_NOISE, nobody)
    assert not list((tmp_path / "r").iterdir())
