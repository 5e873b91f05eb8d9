"""Activity levels by randomised response: reports, the rates that follow, and what a run claims."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fleets import DEVICES, fleet, parameters_of
from small_runs import metrics, run, summary

from sottovoce.client.batches import BatchPlan
from sottovoce.client.cohort import draw_cohort
from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.limits import validate
from sottovoce.server.settings import compose
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.strategies.levels import activity_levels
from sottovoce.strategies.rates import ActivityWeight
from sottovoce.strategies.reports import (
    OPTIONS,
    level_report,
    reported_counts,
    reported_levels,
    reported_weight,
    true_shares,
)
from sottovoce.strategies.samplers import ActivitySampler

POPULATION = AssistantPopulation(devices=60_000, held_out_devices=0, seed=1)
LEVELS = activity_levels(POPULATION.activity)
SHARES = np.bincount(LEVELS, minlength=OPTIONS) / len(LEVELS)


def reports(local: float, levels: np.ndarray = LEVELS, seed: int = 0) -> np.ndarray:
    return reported_levels(levels, level_report(local), np.random.default_rng(seed))


# -- reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [0.5, 2.0, 6.0])
def test_a_report_tells_two_levels_apart_by_at_most_its_epsilon(local: float) -> None:
    """Frequencies of every report under two true levels, against e^epsilon."""
    devices = 200_000
    found = [
        np.bincount(reports(local, np.full(devices, level, np.uint8)), minlength=OPTIONS)
        for level in (3, 9)
    ]
    expected = level_report(local).keep + (1 - level_report(local).keep) / OPTIONS
    assert found[0][3] / devices == pytest.approx(expected, abs=0.005)
    assert found[1][9] / devices == pytest.approx(expected, abs=0.005)
    other = (1 - level_report(local).keep) / OPTIONS
    assert expected / other == pytest.approx(math.exp(local))
    for counts, level in zip(found, (3, 9), strict=True):
        lies = np.delete(counts, level) / devices
        assert np.abs(lies - other).max() < 5 * math.sqrt(other / devices) + 2 * 2**-16


def test_a_report_is_the_same_every_time_and_no_business_of_the_neighbours() -> None:
    others = LEVELS.copy()
    others[::2] = 0
    assert (reports(1.0) == reports(1.0)).all()
    assert (reports(1.0)[1::2] == reports(1.0, others)[1::2]).all()
    assert (reports(1.0) != reports(1.0, seed=1)).any()


@pytest.mark.parametrize("local", [1.0, 3.0])
def test_the_true_shares_come_back_from_the_reports(local: float) -> None:
    found = true_shares(reports(local), level_report(local))
    assert found.sum() == pytest.approx(1.0) and (found >= 0).all()
    assert np.abs(found - SHARES).max() < 0.03


# -- rates -----------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.floats(0.1, 8), st.sampled_from(["linear", "log"]))
def test_what_a_report_weighs_is_the_mean_weight_of_those_who_make_it(
    local: float, weight: Any
) -> None:
    plain, report = ActivityWeight(weight), level_report(local)
    ours = reported_weight(plain, SHARES, report)
    for reported in range(OPTIONS):
        behind = [
            SHARES[level] * (report.keep * (level == reported) + (1 - report.keep) / OPTIONS)
            for level in range(OPTIONS)
        ]
        slow = sum(p * plain.of(level) for level, p in enumerate(behind)) / sum(behind)
        assert ours.of(reported) == pytest.approx(slow, rel=1e-9)


def sampler(local: float, shares: np.ndarray | None = None, cohort: float = 600) -> ActivitySampler:
    return ActivitySampler(
        reports(local), cohort, max_rate=0.2, report=level_report(local), shares=shares, seed=5
    )


@pytest.mark.parametrize("shares", [None, SHARES])
def test_the_expected_cohort_is_met_and_the_rate_follows_the_report(shares: Any) -> None:
    ours = sampler(2.0, shares)
    assert ours.reported is not None and ours.public_rates
    rates = np.array([ours.rates[level] for level in range(OPTIONS)])
    assert rates[ours.reported].sum() == pytest.approx(600, rel=1e-6)
    assert ours.devices_by_level == Counter(ours.reported.tolist())
    drawn = np.concatenate([ours.sample(number) for number in range(60)])
    got = np.bincount(ours.reported[drawn], minlength=OPTIONS)
    wanted = 60 * rates * np.bincount(ours.reported, minlength=OPTIONS)
    assert (np.abs(got - wanted) < 6 * np.sqrt(wanted) + 1).all()


def test_much_truth_gives_the_rates_of_true_levels_and_little_gives_equal_ones() -> None:
    true = ActivitySampler(LEVELS, 600, max_rate=0.2, seed=5).rates
    open_, shy = sampler(20.0, SHARES).rates, sampler(0.01, SHARES).rates
    for level in range(9):  # where devices are
        assert open_[level] == pytest.approx(true[level], rel=0.02)
    assert max(shy.values()) / min(shy.values()) < 1.1


# -- the account -----------------------------------------------------------------------------------


def test_the_headline_is_that_of_the_report_and_the_rounds_together() -> None:
    report = level_report(1.0)
    rounds = GaussianEvent(
        noise_multiplier=1.0, sampling="poisson", by_level=tuple((n, 0.01, 1) for n in range(3))
    )
    both = [report, *[rounds] * 50]
    alone = epsilon([rounds] * 50, 1e-6)
    assert max(alone, 1.0) < epsilon(both, 1e-6, observer="release") <= alone + 1.0 + 1e-3


def test_counts_cost_the_reports_and_nothing_else() -> None:
    report = level_report(1.5)
    assert reported_counts(reports(1.5), report).events == (report,)
    assert report.unit == "device" and report.relation == "zero_out"
    assert report.epsilon == pytest.approx(1.5)


# -- runs ------------------------------------------------------------------------------------------

RUN = (
    "privacy=device", "privacy.device.epsilon=null", "privacy.device.noise_multiplier=1.5",
    "strategy.level_epsilon=2", "seed=4", "rounds=2", "run.evaluate_every=2", "cohort_size=30",
    "population.max_examples_per_round=4", "run.evaluation_devices=1", "run.workers=1",
)  # fmt: skip


def test_a_run_samples_counts_and_accounts_by_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours, open_ = tmp_path / "ours", tmp_path / "open"
    assert run(ours, *RUN, "run.report=true") == 0
    assert run(open_, *RUN, "strategy.level_epsilon=null") == 0
    ledger = Ledger.load(ours / "ledger.json")
    told = [event for event in json.loads((ours / "ledger.json").read_text())["events"]
            if event["type"] == "randomised_report"]
    assert len(told) == 1 and told[0]["observer"] == "server"
    generator = NoiseSource.from_seed(4).generator("activity level reports")
    population = AssistantPopulation(devices=100, held_out_devices=5)
    reported = reported_levels(
        activity_levels(population.activity), level_report(2.0), generator
    )
    assert ledger.levels == Counter(reported.tolist())
    for record in metrics(ours)[1:]:
        for level, count in record["devices_by_level"].items():
            assert count <= ledger.levels[int(level)]
    assert summary(ours)["epsilon"]["device"]["epsilon"] > 2
    assert "randomised response" in summary(ours)["statement"]
    assert "zero-out relation" in summary(ours)["statement"]
    page = (ours / "report.html").read_text()
    assert "every device reports its own to the coordinator" not in page
    assert "is then one of a fixed level" in page


def test_noise_is_found_for_reports_and_rounds_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("privacy.device.noise_multiplier=null", "privacy.device.epsilon=6")
    assert run(tmp_path / "run", *RUN, *words) == 0
    assert 5.9 < summary(tmp_path / "run")["epsilon"]["device"]["epsilon"] <= 6


def test_a_fleet_counts_devices_by_what_it_is_told_and_trains_them_as_before() -> None:
    fast = fleet("bilstm", None, 0.3)
    levels = np.arange(len(DEVICES), dtype=np.uint8)
    plain = fast.train(parameters_of(fast.model), DEVICES, 2)
    told = fast.train(parameters_of(fast.model), DEVICES, 2, levels)
    assert told.devices_by_level == Counter(levels.tolist()) != plain.devices_by_level
    assert told.totals["examples"] == plain.totals["examples"]
    assert all((told.sums[name] == tensor).all() for name, tensor in plain.sums.items())


# -- refusals --------------------------------------------------------------------------------------


def test_poisson_batches_refuse_reports() -> None:
    plan, source = BatchPlan(4, 1, 12, poisson=True), NoiseSource.from_seed(1)
    with pytest.raises(ConfigError, match="cannot stand for true ones"):
        draw_cohort(POPULATION, DEVICES, plan, 1, source, np.zeros(len(DEVICES), dtype=np.uint8))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy=both"], "noised steps are counted by its level"),
        (["privacy=none"], "protects nothing while"),
        (["privacy=device", "strategy.sampler=uniform"], "only used by strategy.sampler=activity"),
        (["privacy=device", "strategy.total_weight=9"], "changes what strategy.total_weight=9"),
        (["privacy=device", "privacy.device.min_separation=4"], "read levels as public"),
        (["privacy=device", "privacy.device.epsilon=1"], "spends all of privacy.device.epsilon=1"),
        (["privacy=device", "strategy.level_epsilon=0"], "must be above 0"),
        (["privacy=device", "strategy.level_epsilon=99"], "at most 20"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        validate(compose(["strategy.level_epsilon=1", *overrides]))
    assert "\n" not in str(caught.value)
