"""Laws of the checks: a faulty run is flagged by the check that names its fault, no other is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats
from test_device_canaries import synthetic

from sottovoce.privacy.audit.checks import LEVEL, Check, Outcome, shared
from sottovoce.privacy.audit.claims import Claim
from sottovoce.privacy.audit.contribution_checks import clipping, divisor, weighting
from sottovoce.privacy.audit.device_record import DeviceRecord
from sottovoce.privacy.audit.release_checks import noise_level, noise_reuse
from sottovoce.privacy.audit.verdict import Verdict, judge_claim

SIZE = 512


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import audit_faults

    yield audit_faults
    sys.path[:] = before


@pytest.mark.parametrize(
    "fault",
    ["none", "noise_halved", "noise_over_root_n", "no_noise", "noise_reused_once", "no_clipping",
     "weighted_by_examples", "realised_divisor"],
)
def test_a_real_run_is_flagged_by_the_check_that_names_its_fault(
    fault: str, faults: ModuleType, tmp_path: Path
) -> None:
    checks = faults.run_with(fault, 3, tmp_path / "run")
    flagged = {check.name for check in checks if check.flagged}
    named = set(faults.FAULTS[fault][1])
    assert flagged & named or not named
    assert flagged <= named | ({"weighting"} if fault == "realised_divisor" else set())


# -- false alarms, whatever the signals are --------------------------------------------------------


def with_signals(signal: float, seed: int, *, follows: bool = False) -> DeviceRecord:
    """Ten rounds of noise 1 with a common signal of some norm, or one that follows past noise."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((10, SIZE))
    common = np.full(SIZE, signal / np.sqrt(SIZE))
    rows = noise + common
    if follows:
        rows[1:] -= signal * noise[:-1] / np.sqrt(SIZE)
    return synthetic(
        10, 20, rate=0.5, shift=1.0, sample=rows, squares=(rows**2).sum(1, keepdims=True)
    )


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("signal", [0.0, 5.0, 20.0, 200.0])
def test_no_signal_makes_independent_noise_of_the_claimed_size_suspicious(
    signal: float, follows: bool
) -> None:
    for seed in range(50):
        record = with_signals(signal, seed, follows=follows)
        assert not noise_level(record, np.ones(10)).flagged
        assert not noise_reuse(record, correlated=False).flagged


def test_p_values_of_short_noise_are_those_of_chi_square() -> None:
    low = 0
    for seed in range(400):
        rows = np.random.default_rng(seed).standard_normal((1, SIZE))
        record = synthetic(
            1, 4, rate=1.0, shift=1.0, sample=rows, squares=(rows**2).sum(1, keepdims=True)
        )
        found = noise_level(record, None)
        assert found.p_value is not None
        low += found.p_value <= 0.1
    assert 5 <= low <= 60  # two tests of one number at the Bonferroni level: 20 expected


def test_signals_that_drown_the_noise_are_said_to_hide_faults() -> None:
    drowned = with_signals(200.0, 1)
    assert noise_level(drowned, None).outcome is Outcome.CANNOT_TELL
    assert noise_reuse(drowned, correlated=False).outcome is Outcome.CANNOT_TELL
    assert "might go unseen" in str(noise_level(drowned, None))


def test_a_coordinator_that_states_less_noise_than_its_ledger_is_flagged() -> None:
    record = with_signals(0.0, 1)
    assert noise_level(record, np.full(10, 1.01)).flagged
    assert not noise_level(record, np.full(10, 0.5)).flagged


def test_noise_used_again_with_the_other_sign_is_flagged_too() -> None:
    rows = np.random.default_rng(2).standard_normal((6, 4096))
    squares = (rows**2).sum(1, keepdims=True)
    clean = synthetic(6, 20, rate=0.5, shift=1.0, sample=rows, squares=squares)
    assert noise_reuse(clean, correlated=False).outcome is Outcome.NOT_FLAGGED
    rows = rows.copy()
    rows[4] = -rows[1]
    again = synthetic(6, 20, rate=0.5, shift=1.0, sample=rows, squares=squares)
    assert noise_reuse(again, correlated=False).flagged
    assert noise_reuse(again, correlated=True).outcome is Outcome.NOT_APPLICABLE


def test_correct_canaries_raise_no_alarm_and_wrong_ones_do() -> None:
    for seed in range(60):
        record = synthetic(20, 100, rate=0.3, shift=1.0, seed=seed)
        assert not clipping(record).flagged and not weighting(record).flagged
        assert not divisor(record, poisson=True).flagged
    assert clipping(record).outcome is Outcome.NOT_FLAGGED
    present, loud = record.drawn & record.inside, record.loudness > 1
    loud_dots = record.dots + 9.0 * (present & loud)
    assert clipping(synthetic(20, 100, rate=0.3, shift=1.0, seed=59, dots=loud_dots)).flagged
    twice = weighting(synthetic(20, 100, rate=0.3, shift=1.0, seed=59,
                                dots=record.dots + 1.0 * present))
    half = weighting(synthetic(20, 100, rate=0.3, shift=1.0, seed=59,
                               dots=record.dots - 0.5 * present))
    assert twice.flagged and twice.violates
    assert half.flagged and not half.violates


def test_canaries_that_are_in_the_same_rounds_raise_no_more_alarms_than_allowed() -> None:
    trials = 800
    found = [weighting(synthetic(3, 100, rate=1.0, shift=1.0, seed=s)).p_value or 0.0
             for s in range(trials)]
    assert (np.array(found) <= 0.01).sum() <= stats.binom.ppf(1 - 1e-6, trials, 0.01)


def test_few_loud_canaries_in_few_rounds_raise_no_more_alarms_than_allowed() -> None:
    trials, generator = 2000, np.random.default_rng(5)
    loud = np.arange(13) < 3
    drawn = np.ones((10, 13), dtype=bool)
    drawn[1:, loud] = False
    usual = synthetic(10, 13, rate=1.0, shift=1.0)
    loudness = np.where(loud, 10.0, 1.0)
    usual = replace(usual, inside=np.ones(13, dtype=bool), drawn=drawn, loudness=loudness)
    found = [clipping(replace(usual, dots=generator.standard_normal((10, 13)))).p_value or 0.0
             for _ in range(trials)]
    assert (np.array(found) <= 1e-3).sum() <= stats.binom.ppf(1 - 1e-6, trials, 1e-3)


def test_a_sum_over_its_own_cohort_is_flagged() -> None:
    record = synthetic(20, 10, rate=0.3, shift=1.0)
    scale = (record.divisor / record.answered) ** 2
    shrunk = synthetic(20, 10, rate=0.3, shift=1.0, squares=record.squares * scale[:, None])
    assert divisor(shrunk, poisson=True).flagged
    assert divisor(shrunk, poisson=False).outcome is Outcome.NOT_APPLICABLE


# -- what comes of it ------------------------------------------------------------------------------


def flagged(*, violates: bool) -> Check:
    return Check("noise_level", "sums", "deviation", "half the noise", "Gaussian noise").found(
        0.5, 1.0, 0.0, resolves=True, violates=violates
    )


def test_a_flagged_check_refutes_the_claim_it_is_about_and_no_other() -> None:
    device = Claim("device", "release", 4.0, 1e-5)
    example = Claim("example", "release", 4.0, 1e-5)
    found = judge_claim(device, [], [flagged(violates=True)])
    assert found.verdict is Verdict.VIOLATION and "noise_level" in found.reason
    assert judge_claim(example, [], [flagged(violates=True)]).verdict is Verdict.INCONCLUSIVE
    other = judge_claim(device, [], [flagged(violates=False)])
    assert other.verdict is Verdict.INVALID and "ledger" in other.reason


def test_checks_share_one_level() -> None:
    checks = shared([flagged(violates=True)] * 4)
    assert {check.level for check in checks} == {LEVEL / 4}
    record = checks[0].record()
    assert record["verdict"] == "FLAGGED" and record["p_value"] == 0.0
