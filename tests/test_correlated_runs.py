"""Runs without a sampling promise: schedules that hold, one release for a whole plan, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import metrics, model, resume, run, run_until_killed, strict, summary

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.privacy.accounting.accountants import by_level, epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.accounting.tracker import EpsilonTracker
from sottovoce.privacy.mechanisms.correlated import PURPOSE, CorrelatedMechanism, from_claims
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.optimised import NAMES, make_factorisation
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.server import callbacks
from sottovoce.server.claims import unit_claim
from sottovoce.server.limits import validate
from sottovoce.server.settings import compose
from sottovoce.strategies.levels import MAX_LEVEL
from sottovoce.strategies.noised_sum import NoisedSum
from sottovoce.strategies.participation import Participation
from sottovoce.strategies.rates import ActivityWeight
from sottovoce.strategies.separated import SeparatedSampler, check_population

DELTA = 1e-6
SUMS = {"w": torch.zeros(300, 40), "b": torch.zeros(()), "a": torch.zeros(7)}


def of_round(number: int) -> np.random.Generator:
    return NoiseSource.from_seed(8).generator("central noise", number)


def mechanism(name: str, schedule: Schedule, noise: float = 3.0) -> CorrelatedMechanism:
    return CorrelatedMechanism(0.5, noise, make_factorisation(name, schedule), schedule)


# -- participation ---------------------------------------------------------------------------------

drawn = st.lists(st.sets(st.integers(0, 15)), min_size=1, max_size=25)


def sorted_ids(cohort: set[int]) -> np.ndarray:
    return np.array(sorted(cohort), dtype=np.int64)


@given(drawn, st.integers(1, 6), st.integers(1, 4))
def test_whatever_is_drawn_no_device_comes_too_soon_or_too_often(
    cohorts: list[set[int]], apart: int, most: int
) -> None:
    ours = Participation(most, apart)
    rounds: dict[int, list[int]] = {}
    for number, cohort in enumerate(cohorts, start=1):
        devices = sorted_ids(cohort)
        allowed = ours.allowed(devices, number)
        for device in devices.tolist():
            before = rounds.get(device, [])
            may = len(before) < most and (not before or number - before[-1] >= apart)
            assert (device in allowed) == may
            assert (device in ours.barred(number)) == (not may)
        ours.add(allowed, np.zeros(len(allowed), dtype=np.uint8), number)
        for device in allowed.tolist():
            rounds.setdefault(device, []).append(number)
        again = Participation(most, apart)
        again.load({name: tensor.clone() for name, tensor in ours.state().items()})
        assert np.array_equal(again.barred(number + 1), ours.barred(number + 1))
    schedule = Schedule(len(cohorts), min(apart, len(cohorts)), most)
    allowed_sets = {tuple(n - 1 for n in taken) for taken in rounds.values()}
    assert len(cohorts) > 12 or allowed_sets <= set(schedule.all_allowed())


def test_older_checkpoints_without_last_rounds_still_load() -> None:
    old = Participation(3)
    old.add(np.array([1, 4]), np.zeros(2, dtype=np.uint8), 1)
    state = {name: tensor for name, tensor in old.state().items() if name != "last"}
    ours = Participation(3)
    ours.load(state)
    assert np.array_equal(ours.counts, old.counts) and len(ours.last) == 2


# -- the sampler -----------------------------------------------------------------------------------


def levels_of(devices: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 6, devices).astype(np.uint8)


def play(sampler: SeparatedSampler, rounds: int) -> list[np.ndarray]:
    cohorts = []
    for number in range(1, rounds + 1):
        cohort = sampler.sample(number)
        assert (np.diff(cohort) > 0).all(), "sorted and unique"
        assert np.array_equal(sampler.participation.allowed(cohort, number), cohort)
        sampler.participation.add(cohort, sampler.levels[cohort], number)
        cohorts.append(cohort)
    return cohorts


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 6), st.booleans(), st.integers(0, 100))
def test_cohorts_are_full_as_long_as_enough_devices_have_rested(
    cohort: int, apart: int, weighted: bool, seed: int
) -> None:
    """The tightest population: every device that has rested is needed."""
    devices = cohort * apart
    weight = ActivityWeight("linear") if weighted else None
    sampler = SeparatedSampler(
        levels_of(devices), cohort, Participation(None, apart), weight=weight, seed=seed
    )
    cohorts = play(sampler, 3 * apart)
    assert {len(one) for one in cohorts} == {cohort}
    if apart > 1:
        assert len(np.unique(np.concatenate(cohorts[:apart]))) == devices


def test_cohorts_shrink_when_devices_are_used_up() -> None:
    sampler = SeparatedSampler(levels_of(10), 4, Participation(1, 1), seed=0)
    assert [len(one) for one in play(sampler, 4)] == [4, 4, 2, 0]


def test_a_cohort_is_a_function_of_seed_round_and_participation() -> None:
    one, two = (
        SeparatedSampler(levels_of(60), 5, Participation(3, 4), seed=9) for _ in range(2)
    )
    first = play(one, 6)
    for number, cohort in enumerate(first, start=1):
        assert np.array_equal(two.sample(number), cohort)
        two.participation.add(cohort, two.levels[cohort], number)


def test_active_devices_are_preferred_if_so_asked() -> None:
    levels = levels_of(600)
    means = []
    for kind in ("uniform", "linear"):
        sampler = SeparatedSampler(
            levels, 20, Participation(None, 2), weight=ActivityWeight(kind), seed=2
        )
        means.append(np.mean([levels[one].mean() for one in play(sampler, 30)]))
    assert means[0] == pytest.approx(levels.mean(), abs=0.2)
    assert means[1] > means[0] + 1


def test_no_amplification_is_promised() -> None:
    sampler = SeparatedSampler(levels_of(60), 5, Participation(3, 4), seed=9)
    assert sampler.sampling == "none"
    assert sampler.rates == dict.fromkeys(range(MAX_LEVEL + 1), 1.0)
    assert sampler.describe()["min_separation"] == 4


@pytest.mark.parametrize(
    ("devices", "cohort", "schedule", "words"),
    [
        (99, 10, Schedule(100, 10), "needs 100 devices, and there are 99"),
        (100, 10, Schedule(100, 5, 9), r"need 1000 participations.*give 900.*at most 9\)"),
    ],
)
def test_populations_that_are_too_small_are_refused(
    devices: int, cohort: int, schedule: Schedule, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_population(devices, cohort, schedule)
    check_population(1000, cohort, schedule)


# -- the mechanism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_releases_add_up_with_the_noise_of_the_closed_form(name: str) -> None:
    schedule = Schedule(9, 3, 2)
    ours = mechanism(name, schedule)
    factorisation = ours.factorisation
    close = 6 * math.sqrt(2 / 12_008)
    total = {key: torch.zeros_like(tensor) for key, tensor in SUMS.items()}
    for number in range(1, 10):
        signal = {key: torch.full_like(tensor, number) for key, tensor in SUMS.items()}
        released = ours.release(signal, 5.0, of_round(number))
        assert list(released) == list(SUMS)
        spread = factorisation.row_variances()[number - 1] ** 0.5
        assert ours.deviation == pytest.approx(1.5 * spread)
        for key, tensor in released.items():
            assert tensor.shape == SUMS[key].shape
            total[key] += tensor - number
        noise = torch.cat([tensor.flatten() for tensor in total.values()]).double()
        truth = 1.5**2 * factorisation.prefix_variances()[number - 1]
        assert float(noise.pow(2).mean()) == pytest.approx(truth, rel=close)


@pytest.mark.parametrize("name", NAMES)
def test_noise_does_not_depend_on_the_order_of_names_or_on_the_signal(name: str) -> None:
    schedule = Schedule(4, 2)
    one, two = mechanism(name, schedule), mechanism(name, schedule)
    turned = {key: SUMS[key] + 2.0 for key in reversed(SUMS)}
    for number in range(1, 5):
        first = one.release(SUMS, 0.0, of_round(number))
        second = two.release(turned, 1.0, of_round(number))
        for key in SUMS:
            torch.testing.assert_close(first[key] + 2.0, second[key])


def test_noise_past_the_plan_is_refused() -> None:
    ours = mechanism("banded", Schedule(2))
    for number in (1, 2):
        ours.event(number)
        ours.release(SUMS, 0.0, of_round(number))
    with pytest.raises(RunError, match="beyond the 2 rounds"):
        ours.release(SUMS, 0.0, of_round(3))


def test_a_round_out_of_turn_is_refused() -> None:
    ours = mechanism("blt", Schedule(5))
    with pytest.raises(RunError, match="round 2 has no noise: the next one is round 1"):
        ours.event(2)


def test_a_mechanism_survives_its_claims_exactly() -> None:
    import json

    for name in NAMES:
        ours = mechanism(name, Schedule(12, 3, 2))
        other = from_claims(json.loads(json.dumps(ours.claims())))
        assert (other.worth, other.sensitivity) == (ours.worth, ours.sensitivity)
        a, b = (m.release(SUMS, 0.0, of_round(1)) for m in (ours, other))
        assert all(torch.equal(a[key], b[key]) for key in SUMS)


# -- the ledger ------------------------------------------------------------------------------------


def events_of(ours: CorrelatedMechanism, rounds: int) -> list[GaussianEvent]:
    found = []
    for number in range(1, rounds + 1):
        found.append(ours.event(number))
        ours.release({"w": torch.zeros(2)}, 0.0, of_round(number))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_first_release_pays_for_the_whole_plan(name: str) -> None:
    schedule = Schedule(20, 5, 3)
    ours = mechanism(name, schedule)
    truth = epsilon(GaussianEvent(noise_multiplier=3.0 / ours.sensitivity), DELTA)
    tracker = EpsilonTracker(DELTA)
    assert tracker.would_exceed(ours.event(None), truth * 0.999)
    assert not tracker.would_exceed(ours.event(None), truth * 1.001)
    events = events_of(ours, 20)
    for rounds in (1, 2, 20):
        assert epsilon(events[:rounds], DELTA) == pytest.approx(truth, rel=1e-12)
        assert epsilon(events[:rounds], DELTA, accountant="rdp") >= truth
    tracker.add(events[0])
    assert not tracker.would_exceed(events[1], truth * 1.001)
    assert len({event.round for event in events}) == 20, "every release stands in the ledger"
    rows = by_level(Ledger(events, levels={0: 5, 7: 2}), DELTA)
    assert {row["epsilon"] for row in rows} == {epsilon(events, DELTA)}, "equal for all"


@given(st.sampled_from(NAMES), st.integers(2, 40), st.floats(1.0, 20.0), st.data())
@settings(max_examples=30)
def test_epsilon_falls_with_noise_and_separation_and_grows_with_participations(
    name: str, rounds: int, noise: float, data: st.DataObject
) -> None:
    apart, most = data.draw(st.integers(1, rounds - 1)), data.draw(st.integers(1, 5))
    factorisation = make_factorisation(name, Schedule(rounds, apart, most))

    def of(noise: float, apart: int, most: int) -> float:
        schedule = Schedule(rounds, apart, most)
        ours = CorrelatedMechanism(1.0, noise, factorisation, schedule)
        return epsilon(ours.event(1), DELTA)

    base = of(noise, apart, most)
    assert of(noise * 1.1, apart, most) < base
    assert of(noise, apart + 1, most) <= base * (1 + 1e-9)
    assert of(noise, apart, most + 1) >= base * (1 - 1e-9)


def test_it_composes_with_what_else_was_released() -> None:
    event = mechanism("tree", Schedule(10, 2)).event(1)
    histogram = GaussianEvent(noise_multiplier=10.0, purpose="activity histogram")
    worth = (event.noise_multiplier**-2 + 0.01) ** -0.5
    both = epsilon([histogram, event], DELTA)
    assert both == pytest.approx(epsilon(GaussianEvent(noise_multiplier=worth), DELTA))


# -- runs ------------------------------------------------------------------------------------------

RUN = (
    "rounds=6", "seed=4", "run.evaluate_every=6", "privacy.device.min_separation=3",
    "cohort_size=3", "population.max_examples_per_round=4", "run.evaluation_devices=1",
)


def with_mechanism(name: str) -> tuple[str, ...]:
    return ("privacy=device", f"privacy.device.mechanism={name}", *RUN)


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics(folder)]


@pytest.mark.parametrize("name", ["tree", "banded", "bisr", "blt"])
def test_killed_and_resumed_it_ends_as_if_it_had_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(whole, *with_mechanism(name)) == 0
    run_until_killed(folder, *with_mechanism(name), at=4)
    assert resume(folder) == 0
    assert model(folder) == model(whole)
    assert without_seconds(folder) == without_seconds(whole)
    assert Ledger.load(folder / "ledger.json") == Ledger.load(whole / "ledger.json")
    claimed = strict((whole / "ledger.json").read_text())["claims"]["correlated_noise"]
    assert claimed["max_participations"] == 2 and claimed["rounds"] == 6
    found = summary(whole)["epsilon"]["device"]
    assert 3.99 < found["epsilon"] <= 4
    assert len({row["epsilon"] for row in found["by_level"]}) == 1


def test_the_coordinator_keeps_to_the_schedule_whatever_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: dict[int, list[int]] = {}
    asked = NoisedSum.configure_train

    def watched(self: NoisedSum, server_round: int, *rest: Any) -> Any:
        messages = asked(self, server_round, *rest)
        assert self.current is not None
        for device in self.current.devices.tolist():
            seen.setdefault(device, []).append(server_round)
        return messages

    monkeypatch.setattr(NoisedSum, "configure_train", watched)
    settings_ = ("privacy=both", *RUN, "rounds=9", "privacy.device.max_participations=2",
                 "privacy.device.mechanism=banded", "strategy.activity_weight=linear")
    assert run(tmp_path / "run", *settings_) == 0
    assert sum(map(len, seen.values())) == 27, "cohorts are full"
    assert max(map(len, seen.values())) <= 2
    for rounds in seen.values():
        assert all(b - a >= 3 for a, b in zip(rounds, rounds[1:], strict=False))
    ledger = Ledger.load(tmp_path / "run" / "ledger.json")
    facts = {fact.term: fact.text for fact in unit_claim(
        "device", summary(tmp_path / "run"), ledger.to_json(), {}).facts}
    assert "no device takes part more than 2 times, at least 3 rounds apart, in 9 rounds" in (
        facts["Sampling, as run"])
    assert "(banded, sensitivity" in facts["Noise multiplier"]
    assert facts["Neighbouring relation"].startswith("Zero-out")
    relations = {e.relation for e in ledger if isinstance(e, GaussianEvent) and e.unit == "device"}
    assert relations == {"zero_out"}
    assert any(event.unit == "example" for event in ledger)
    assert [e.round for e in ledger if getattr(e, "purpose", "") == PURPOSE] == list(range(1, 10))


def test_a_budget_below_the_plan_ends_the_run_before_any_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    assert run(folder, *with_mechanism("blt"), "privacy.device.max_epsilon=3") == 0
    found = summary(folder)
    assert (found["status"], found["rounds"]) == ("budget_spent", 0)
    assert found["epsilon"]["device"]["epsilon"] == 0


def test_a_plan_cannot_be_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.Bar, "on_round", _interrupt_at_two)
        assert run(folder, *with_mechanism("bisr")) == 130
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("rounds: 6", "rounds: 8"))
    assert resume(folder) == 1
    error = capsys.readouterr().err
    assert "rounds=8 is not the 6 that the run's noise was planned for" in " ".join(error.split())


def _interrupt_at_two(self: Any, state: Any, record: Any) -> None:
    if state.round == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.device.mechanism=tree"], "give privacy.device.min_separation"),
        (["privacy.device.mechanism=fourier"], "mechanism=fourier does not exist"),
        (["privacy.device.max_participations=3"], "only used with privacy.device.min_separation"),
        (["privacy.device.min_separation=61"], "more than rounds=60"),
        (["privacy.device.min_separation=0"], "min_separation=0 must be at least 1"),
        (["privacy.device.min_separation=5", "strategy.max_rate=0.1"], "claims none: set it to"),
        (["privacy.device.min_separation=5", "privacy.device.bands=4"], "no meaning with"),
        (["privacy.device.min_separation=5", "privacy.device.mechanism=banded",
          "privacy.device.bands=6"], "must be at most privacy.device.min_separation=5"),
        (["privacy.device.min_separation=5", "privacy.device.mechanism=bisr",
          "privacy.device.bands=61"], "must be at most rounds=60"),
        (["privacy=none", "privacy.device.min_separation=5"], "does nothing while"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        validate(compose(["privacy=device", *overrides]))
    assert "\n" not in str(caught.value)
