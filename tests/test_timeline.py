"""Timelines: what devices hold in each period, who is sampled at what rate, and what that costs."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_runs import FIXED_NOISE, metrics, model, resume, run, run_until_killed, summary

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError, RunError
from sottovoce.client.examples import Examples
from sottovoce.client.fleet import ExampleClipping, LocalTraining
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.limits import validate
from sottovoce.server.settings import compose
from sottovoce.server.setup import local_noise_bound
from sottovoce.simulations.arrival_sources import GeneratedSource
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.continual import ContinualPopulation
from sottovoce.simulations.jsonl import JsonlPopulation
from sottovoce.simulations.timeline import Arrival, Timeline, make_timeline
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels, row_text
from sottovoce.strategies.periods import PeriodSampler, make_period_sampler
from sottovoce.strategies.windowed import WindowedParticipation

PLAIN = Arrival(variation=0.5, late=0.2, leave=0.1, drift=0.2)
CONTINUAL = ("timeline=continual", "timeline.periods=2", "timeline.rounds_per_period=2", "rounds=4")


def continual(
    timeline: Timeline, devices: int = 500, arrival: Arrival = PLAIN
) -> ContinualPopulation:
    return ContinualPopulation(AssistantPopulation(devices, 20, seed=3), timeline, arrival)


def spoken(examples: Examples) -> list[tuple[int, ...]]:
    """Every example's tokens."""
    starts = examples.offsets
    return [tuple(examples.tokens[a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]


def by_user(folder: Path, sizes: Sequence[int]) -> JsonlPopulation:
    """Users with so many lines each, no two of which are the same."""
    lines = [
        json.dumps({"user_id": f"u{user}", "text": f"user{user} line{line}"})
        for user, size in enumerate(sizes) for line in range(size)
    ]
    path = folder / "lines.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return JsonlPopulation(path, held_out_fraction=0)


# --- what devices hold ----------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_every_round_is_in_one_period_and_windows_end_with_it(
    periods: int, each: int, retention: int
) -> None:
    timeline = Timeline(periods, each, retention)
    rounds = periods * each
    found = [timeline.period_of(number) for number in range(1, rounds + 1)]
    assert found == sorted(found) and set(found) == set(range(periods))
    assert sum(timeline.rounds_in(period, rounds) for period in range(periods)) == rounds
    for period in range(periods):
        window = timeline.window(period)
        assert window[-1] == period and len(window) == min(retention, period + 1)


@pytest.mark.parametrize("retention", [1, 2, 4])
def test_what_devices_hold_is_what_arrived_less_what_was_deleted(retention: int) -> None:
    timeline = Timeline(6, 5, retention)
    population = continual(timeline)
    everyone = np.arange(len(population), dtype=np.int64)
    arrived = [population.source.arrived(everyone, period) for period in range(6)]
    held = np.zeros(len(population), dtype=np.int64)
    for period in range(6):
        held += arrived[period]
        if period >= retention:
            held -= arrived[period - retention]
        assert np.array_equal(population.at(period).activity, held)
    assert sum(a.sum() for a in arrived) > 0 and (arrived[0] == 0).any()


def test_arrivals_of_a_window_have_the_static_activity_as_their_mean() -> None:
    timeline = Timeline(8, 1, 2)
    population = continual(timeline, 20_000, Arrival(0.5, 0, 0, 0))
    held = population.at(5).activity.astype(float)
    assert held.mean() == pytest.approx(population.base.activity.mean(), rel=0.03)


def test_a_device_is_silent_before_it_joins_and_after_it_leaves() -> None:
    population = continual(Timeline(8, 1, 1), 4000, Arrival(0.0, 0.3, 0.2, 0))
    everyone = np.arange(4000, dtype=np.int64)
    speaks = np.array([population.source.arrivals._here(everyone, p) for p in range(8)])
    changes = np.abs(np.diff(speaks.astype(int), axis=0)).sum(axis=0)
    assert changes.max() <= 2  # joins once, leaves once
    assert (~speaks[0]).mean() == pytest.approx(0.3, abs=0.05)


def test_numbers_of_a_window_are_the_arrivals_of_its_periods_in_order() -> None:
    population = continual(Timeline(5, 1, 2))
    device = np.array([int(np.argmax(population.at(2).activity))])
    first, second = (population.source.arrived(device, p)[0] for p in (1, 2))
    of_both = spoken(population.at(2).examples(device))
    assert len(of_both) == first + second
    assert of_both[:first] == spoken(population.at(1).examples(device))[-first:]
    assert of_both[first:] == spoken(population.at(3).examples(device))[:second]


def test_examples_are_the_same_whatever_else_is_asked_for() -> None:
    view = continual(Timeline(5, 1, 3)).at(3)
    devices = np.flatnonzero(view.activity > 4)[:6].astype(np.int64)
    asked = [np.array([3, 0, 2]), np.array([1]), np.zeros(0, dtype=np.int64)] * 2
    together = view.examples(devices, asked)
    apart = [spoken(view.examples(devices[k : k + 1], asked[k : k + 1])) for k in range(6)]
    assert spoken(together) == [example for own in apart for example in own]
    assert np.diff(together.device_offsets).tolist() == [3, 1, 0] * 2


@pytest.mark.parametrize("order", ["lines", "shuffled"])
def test_real_devices_may_be_asked_in_any_order(tmp_path: Path, order: str) -> None:
    base = by_user(tmp_path, [1, 3, 17, 40, 2, 9])
    view = ContinualPopulation(base, Timeline(4, 1, 2), Arrival(order=order)).at(2)
    devices = np.array([3, 5, 2], dtype=np.int64)
    asked = [np.array([1, 4, 0]), np.array([2]), np.array([3, 1])]
    alone = [
        [spoken(view.examples(np.array([device])))[k] for k in numbers]
        for device, numbers in zip(devices, asked, strict=True)
    ]
    assert spoken(view.examples(devices, asked)) == sum(alone, [])


def test_what_is_outside_of_the_window_cannot_be_asked_for() -> None:
    population = continual(Timeline(4, 1, 1))
    view = population.at(1)
    device = np.array([5])
    with pytest.raises(IndexError, match="beyond what its device holds"):
        view.examples(device, [np.array([int(view.activity[5])])])
    with pytest.raises(IndexError, match="period 4"):
        population.at(4)
    with pytest.raises(RunError, match="timeline=static"):
        population.examples(device)
    with pytest.raises(RunError, match="timeline=static"):
        _ = population.activity


@pytest.mark.parametrize("order", ["lines", "shuffled"])
def test_real_lines_arrive_once_each_and_stay_for_their_window(tmp_path: Path, order: str) -> None:
    base = by_user(tmp_path, [1, 3, 17, 40, 2])
    population = ContinualPopulation(base, Timeline(4, 1, 1), Arrival(order=order))
    everyone = np.arange(len(base), dtype=np.int64)
    dealt = [spoken(population.at(period).examples(everyone)) for period in range(4)]
    assert sorted(sum(dealt, [])) == sorted(spoken(base.examples(everyone)))
    kept = ContinualPopulation(base, Timeline(4, 1, 2), Arrival(order=order)).at(2)
    assert sorted(spoken(kept.examples(everyone))) == sorted(dealt[1] + dealt[2])
    assert kept.activity.sum() == len(dealt[1]) + len(dealt[2])


def test_real_lines_come_in_their_order_and_evenly(tmp_path: Path) -> None:
    base = by_user(tmp_path, [10])
    population = ContinualPopulation(base, Timeline(4, 1, 1), Arrival())
    device = np.zeros(1, dtype=np.int64)
    dealt = [spoken(population.at(period).examples(device)) for period in range(4)]
    assert [len(own) for own in dealt] == [3, 2, 3, 2]
    assert sum(dealt, []) == spoken(base.examples(device))


def test_topics_drift_from_period_to_period_and_only_if_asked() -> None:
    def shares(drift: float, period: int) -> NDArray[np.float64]:
        population = continual(Timeline(8, 1, 1), 2000, Arrival(0.5, 0, 0, drift))
        found = population.at(period).examples(np.arange(2000))
        assert found.intent is not None
        counts = np.bincount(found.intent, minlength=len(population.schema.intents))
        return counts / counts.sum()

    still = np.abs(shares(0.0, 7) - shares(0.0, 0)).sum()
    moved = np.abs(shares(0.4, 7) - shares(0.4, 0)).sum()
    assert moved > 3 * still


def test_a_million_devices_and_twelve_periods_stay_in_little_memory() -> None:
    population = continual(Timeline(12, 1, 2), 1_000_000)
    strategy = compose(["timeline=continual"]).strategy
    source = NoiseSource.from_seed(1)
    tracemalloc.start()
    sampler = make_period_sampler(strategy, population, 500, source=source, private=True)
    for number in range(1, 13):
        assert len(sampler.sample(number)) > 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6  # an array of 8 bytes for every period would be 96 MB, of examples 20 GB


# --- who is sampled -------------------------------------------------------------------------------


def sampler_of(population: ContinualPopulation, *overrides: str, private: bool) -> PeriodSampler:
    strategy = compose(["strategy.max_rate=1", *overrides]).strategy
    source = NoiseSource.from_seed(5)
    return make_period_sampler(strategy, population, 60, source=source, private=private)


@pytest.mark.parametrize("weight", ["uniform", "linear", "power", "log"])
def test_devices_are_drawn_at_the_rates_that_the_accountant_is_told(weight: str) -> None:
    timeline = Timeline(3, 150, 2)
    population = continual(timeline, 1500)
    choice = ["strategy.sampler=uniform"] if weight == "uniform" else [
        "strategy.sampler=activity", f"strategy.activity_weight={weight}"]
    sampler = sampler_of(population, *choice, private=True)
    plan = sampler.plan(450)
    for period in range(3):
        first = timeline.first_round(period)
        held = population.at(period).activity
        drawn = np.zeros(len(held), dtype=np.int64)
        for number in range(first, first + 150):
            drawn[sampler.sample(number)] += 1
        assert drawn[held == 0].sum() == 0
        levels = activity_levels(np.maximum(held, 1))
        for level, rate in sampler.rates_at(first).items():
            here = (levels == level) & (held > 0)
            draws = 150 * int(here.sum())
            error = 6 * np.sqrt(draws * rate * (1 - rate)) + 1e-9
            assert abs(drawn[here].sum() - draws * rate) <= error
        known = {level: rate for level, rate, _ in plan[16 * period : 16 * (period + 1)]}
        assert known == sampler.rates_at(first)


@pytest.mark.parametrize("sampler", ["uniform", "activity"])
def test_cohorts_have_the_expected_size_in_every_period(sampler: str) -> None:
    timeline = Timeline(4, 100, 2)
    found = sampler_of(continual(timeline, 4000), f"strategy.sampler={sampler}", private=True)
    for period in range(4):
        first = timeline.first_round(period)
        sizes = [len(found.sample(first + k)) for k in range(100)]
        assert np.mean(sizes) == pytest.approx(60, rel=0.15)
        assert found.at(first).expected_cohort_size == pytest.approx(60)


def test_public_counts_are_close_and_their_bounds_hold() -> None:
    population = continual(Timeline(4, 1, 2), 50_000)
    for period in range(4):
        known, true = population.level_counts(period), population.at(period).exact_level_counts()
        assert known is not None and known.source == "model" and not known.events
        assert sum(known.counts.values()) == pytest.approx(sum(true.counts.values()), rel=0.02)
        assert all(true.counts[level] <= known.most[level] for level in range(MAX_LEVEL + 1))


def test_private_counts_are_noised_once_a_period_at_the_price_of_one(tmp_path: Path) -> None:
    base = by_user(tmp_path, [20] * 300)
    population = ContinualPopulation(base, Timeline(5, 3, 2), Arrival())
    found = sampler_of(population, private=True)
    assert [event.round for event in found.events] == [1, 4, 7, 10, 13]
    one = GaussianEvent(noise_multiplier=10.0, unit="device", purpose="activity histogram")
    assert epsilon(found.events, 1e-5) == pytest.approx(epsilon(one, 1e-5))
    assert found.rates_at(1) == sampler_of(population, private=True).rates_at(1)  # asked twice
    assert not sampler_of(population, private=False).events


def test_no_level_has_a_higher_rate_than_the_last_one() -> None:
    found = sampler_of(continual(Timeline(6, 1, 2)), private=True)
    for known in found.known:
        assert max(known.rates.values()) == known.rates[MAX_LEVEL]
    broken = found.known[0].rates | {MAX_LEVEL: 0.0}
    entry = type(found.known[0])(
        found.known[0].counts, type(found.known[0].found)(broken, 60.0, (), 15, True)
    )
    with pytest.raises(ConfigError, match="do not rise with activity"):
        PeriodSampler(found.population, [entry] * 6, found.weight)


# --- what it costs --------------------------------------------------------------------------------


def test_the_headline_bounds_devices_on_any_path_through_the_levels() -> None:
    timeline = Timeline(6, 10, 2)
    sampler = sampler_of(continual(timeline), "strategy.sampler=activity", private=True)

    def release(number: int) -> GaussianEvent:
        entries = tuple((level, rate, 1) for level, rate in sampler.rates_at(number).items())
        return GaussianEvent(noise_multiplier=1.1, sampling="poisson", by_level=entries)

    headline = epsilon([release(number) for number in range(1, 61)], 1e-5)
    generator = np.random.default_rng(8)
    for _ in range(2):
        path = generator.integers(0, MAX_LEVEL + 1, 6)
        own = [
            GaussianEvent(
                noise_multiplier=1.1, sampling="poisson",
                sampling_rate=sampler.rates_at(number)[int(path[timeline.period_of(number)])],
            )
            for number in range(1, 61)
        ]
        assert epsilon(own, 1e-5) <= headline * (1 + 1e-9)


def test_the_bound_on_devices_own_noise_holds_in_every_period() -> None:
    sampler = sampler_of(continual(Timeline(4, 1, 2)), "strategy.sampler=activity", private=True)
    example = ExampleClipping(clip_norm=1.0, noise_multiplier=0.5)
    training = LocalTraining(0.1, PLAN, example, 0.2)
    bound = local_noise_bound(training, sampler)
    for known in sampler.known:
        mean = sum(
            known.counts.counts[level] * rate * training.noise_variance(level)
            for level, rate in known.rates.items()
        )
        assert 0 < mean < bound


PLAN = BatchPlan(batch_size=8, local_epochs=1, max_examples=32, poisson=True)


def step_events(levels: Sequence[int]) -> list[GaussianEvent]:
    """What an example goes through that its device trains on at these levels."""
    return [
        GaussianEvent(
            noise_multiplier=2.0, sampling="poisson", sampling_rate=PLAN.rate(level),
            count=PLAN.steps(level, 1 << level), unit="example", observer="server",
        )
        for level in levels
    ]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_ledger_bounds_every_example_whatever_levels_its_device_goes_through(
    seed: int, retention: int, each: int
) -> None:
    generator = np.random.default_rng(seed)
    timeline, devices = Timeline(5, each, retention), np.arange(30)
    levels = np.clip(
        generator.integers(0, 5, 30) + np.cumsum(generator.integers(-1, 2, (5, 30)), axis=0), 0, 15
    ).astype(np.uint8)
    participation, booked = WindowedParticipation(timeline), list[GaussianEvent]()
    lived: dict[tuple[int, int], list[int]] = {}  # (device, period of arrival) -> levels
    for number in range(1, 5 * each + 1):
        period = timeline.period_of(number)
        cohort = devices[generator.random(30) < 0.3]
        ahead = participation.ahead(lambda ids, p=period: levels[p][ids].astype(np.int64))
        rows = participation.raised(cohort, levels[period][cohort], number)
        assert {r for own in rows for r in own} <= {r for own in ahead for r in own}
        for own in rows:
            entries = tuple(
                (row, PLAN.rate(at), PLAN.steps(at, 1 << at)) for row, at in own
            )
            booked.append(GaussianEvent(
                noise_multiplier=2.0, sampling="poisson", by_level=entries, unit="example",
                observer="server",
            ))
        for device in cohort.tolist():
            for born in timeline.window(period):
                lived.setdefault((device, born), []).append(int(levels[period][device]))
    if not lived:
        return
    counts = np.array([np.bincount(own, minlength=16) for own in lived.values()])
    assert all((own <= participation.rows).all(axis=1).any() for own in counts)
    most = max(lived.values(), key=len)
    stated = epsilon(Ledger(booked), 1e-5, unit="example", observer="server")
    assert epsilon(step_events(most), 1e-5, unit="example", observer="server") <= stated * 1.0001


def test_devices_that_stay_at_their_level_cost_what_their_busiest_window_does() -> None:
    participation = WindowedParticipation(Timeline(3, 2, 1))
    level = np.array([4], dtype=np.uint8)
    rises = [len(participation.raised(np.array([7]), level, n)) for n in range(1, 7)]
    assert rises == [1, 1, 0, 0, 0, 0]  # deleted after each period: no example sees more than two
    assert participation.rows.sum() == 2 and participation.rows[4, 4] == 2
    assert participation.counts.tolist() == [6]


def test_rows_of_devices_that_moved_are_named_after_their_levels() -> None:
    participation = WindowedParticipation(Timeline(2, 1, 2))
    participation.raised(np.array([7]), np.array([3], dtype=np.uint8), 1)
    ((row, level),) = participation.raised(np.array([7]), np.array([5], dtype=np.uint8), 2)[0]
    assert row_text(row) == "3 to 5" and level in (3, 5)
    assert row_text(5) == "5"


def test_windowed_participation_is_restored_from_its_state() -> None:
    timeline, generator = Timeline(3, 2, 2), np.random.default_rng(2)
    whole, stopped = WindowedParticipation(timeline), WindowedParticipation(timeline)
    for number in range(1, 7):
        cohort = np.flatnonzero(generator.random(9) < 0.5)
        levels = generator.integers(0, 4, len(cohort)).astype(np.uint8)
        expected = whole.raised(cohort, levels, number)
        again = WindowedParticipation(timeline)
        again.load(stopped.state())
        assert again.raised(cohort, levels, number) == expected
        stopped = again


# --- runs -----------------------------------------------------------------------------------------


def test_a_timeline_of_one_period_is_the_static_setting(tmp_path: Path) -> None:
    assert run(tmp_path / "a", *FIXED_NOISE, "seed=3", "rounds=2") == 0
    one = ("timeline=continual", "timeline.periods=1")
    assert run(tmp_path / "b", *FIXED_NOISE, "seed=3", "rounds=2", *one) == 0
    assert model(tmp_path / "a") == model(tmp_path / "b")
    same = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in metrics(tmp_path / name)]
        for name in "ab"
    ]
    assert same[0] == same[1] and "period" not in same[0][-1]


def test_a_run_reads_its_windows_alone_and_resumes_across_a_period(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    told = GeneratedSource.read

    def recording(
        self: GeneratedSource, owners: NDArray[np.int64], periods: NDArray[np.int64],
        places: NDArray[np.int64],
    ) -> Examples:
        training = owners < len(self.base)
        arrived = np.stack([self.arrived(owners[training], p) for p in range(2)])
        beyond = places[training] >= arrived[periods[training], np.arange(training.sum())]
        read.extend((int(p), int(b)) for p, b in zip(periods[training], beyond, strict=True))
        return told(self, owners, periods, places)

    monkeypatch.setattr(GeneratedSource, "read", recording)
    settings = (*FIXED_NOISE, *CONTINUAL, "timeline.retention=1", "seed=4", "run.workers=1",
                "run.evaluate_every=2", "run.evaluation_devices=2")
    assert run(tmp_path / "whole", *settings) == 0
    trained = [period for period, beyond in read if not beyond]
    assert trained == sorted(trained) and set(trained) == {0, 1}  # never back to what was deleted
    run_until_killed(tmp_path / "killed", *settings, at=3)
    assert resume(tmp_path / "killed") == 0
    assert model(tmp_path / "killed") == model(tmp_path / "whole")
    ledgers = [(tmp_path / name / "ledger.json").read_bytes() for name in ("killed", "whole")]
    assert ledgers[0] == ledgers[1]
    records = metrics(tmp_path / "whole")
    assert [record["period"] for record in records] == [0, 0, 0, 1, 1]
    assert "accuracy_all_periods" in records[-1]
    events = [e for e in Ledger.load(tmp_path / "whole" / "ledger.json") if e.unit == "device"]
    rates = [e.by_level for e in events if isinstance(e, GaussianEvent)]
    assert rates[0] == rates[1] != rates[2] == rates[3]


def test_a_target_epsilon_is_met_over_all_periods(tmp_path: Path) -> None:
    assert run(tmp_path / "run", "privacy=device", "privacy.device.epsilon=3", *CONTINUAL) == 0
    assert 2.9 < summary(tmp_path / "run")["epsilon"]["device"]["epsilon"] <= 3


@pytest.mark.parametrize("setting", [
    "strategy.sampler=fixed_size", "strategy.total_weight=100", "strategy.level_epsilon=1",
    "privacy.device.min_separation=2", "privacy.example.noise=decay", "noise_cohort_size=5000",
    "timeline.retention=0", "timeline.order=backwards", "timeline.leave=1", "rounds=61",
])
def test_what_cannot_be_accounted_on_a_timeline_is_refused(setting: str) -> None:
    base = ["timeline=continual", "timeline.rounds_per_period=10", "cohort_size=100"]
    validate(compose(base))
    with pytest.raises(ConfigError, match=setting.split("=")[0].split(".")[-1]):
        validate(compose([*base, setting]))


def test_older_settings_have_no_timeline() -> None:
    assert make_timeline(None, 10) is None
    assert make_timeline({"name": "static"}, 10) is None
