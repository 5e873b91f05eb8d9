"""Laws of bounds on mechanisms of known epsilon (benchmarks/audit_coverage.py), and of power."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sottovoce.privacy.audit import gaussian_epsilon, gaussian_mu
from sottovoce.privacy.audit.design import Design
from sottovoce.privacy.audit.membership import split_bound
from sottovoce.privacy.audit.power import half_noise_power

TRIALS, CANARIES = 100, 200


@pytest.fixture(scope="module")
def coverage() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import audit_coverage

    yield audit_coverage
    sys.path[:] = before


def test_no_bound_exceeds_the_truth_more_often_than_in_5_percent(coverage: ModuleType) -> None:
    found = coverage.measure(CANARIES, TRIALS)
    assert not found["broken"], found["broken"]
    assert len(found["bounds"]) > 45 and found["most_alarms"] < 0.2 * TRIALS
    tight = {(row["mechanism"], row["bound"]): row["median"] for row in found["bounds"]}
    assert tight["Gaussian, μ 1.2", "pooled Gaussian"] > 4
    assert tight["randomised response, ε 3", "one run, half chooses"] > 1.5


def test_choosing_on_the_tested_canaries_raises_false_alarms(coverage: ModuleType) -> None:
    known = coverage.mechanisms()[0]
    naive = coverage.false_alarms(
        known, coverage.chosen_on_tested, canaries=CANARIES, trials=TRIALS
    )
    assert naive["alarms"] > coverage.most_alarms(TRIALS)


@pytest.mark.parametrize("trap", [2, 3, 4, 6, 7])
def test_gaussian_bounds_fail_on_other_mechanisms(coverage: ModuleType, trap: int) -> None:
    _, mechanism, bound = coverage.traps()[trap]
    found = coverage.false_alarms(mechanism, bound, canaries=CANARIES, trials=30)
    assert found["rate"] > 0.5


def test_an_exchange_can_show_more_than_a_removal_costs(coverage: ModuleType) -> None:
    _, mechanism, bound = coverage.traps()[-1]
    found = coverage.false_alarms(mechanism, bound, canaries=2000, trials=20)
    assert found["rate"] > 0.5
    twice = next(one for one in coverage.mechanisms() if one.name.startswith("fixed size"))
    assert coverage.false_alarms(twice, bound, canaries=2000, trials=20)["alarms"] == 0


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("declared", [(), (0.05, 0.2)])
def test_power_is_the_rate_at_which_audits_flag_half_the_noise(
    gaussian: bool, declared: tuple[float, ...]
) -> None:
    claimed, delta, canaries, trials = 1.5, 1e-5, 1500, 40
    design = Design(coins=True, declared=declared, gaussian=gaussian)
    generator, mu = np.random.default_rng(3), 2 * gaussian_mu(claimed, delta)
    flagged = 0
    for _ in range(trials):
        coins = generator.random(canaries) < 0.5
        scores = generator.standard_normal(canaries) + mu * coins
        bound, _ = split_bound(
            scores[coins], scores[~coins], delta=delta, confidence=0.95, generator=generator,
            design=design,
        )
        flagged += bound.epsilon > claimed
    power = half_noise_power(
        canaries=canaries, claimed=claimed, delta=delta, confidence=0.95, separation=0.0,
        design=design,
    )
    assert power is not None and power.this <= 0.05
    spread = np.sqrt(max(power.perfect * (1 - power.perfect), 0.02) * (1 / trials + 1 / 400))
    assert abs(flagged / trials - power.perfect) < 5 * spread


def test_power_rises_with_canaries_and_with_the_attacks_separation() -> None:
    def power(canaries: int, separation: float) -> tuple[float, float]:
        found = half_noise_power(
            canaries=canaries, claimed=2.0, delta=1e-6, confidence=0.95, separation=separation,
            design=Design(coins=True),
        )
        assert found is not None
        return found.perfect, found.this

    perfect = [power(n, 0.1)[0] for n in (50, 1000, 100_000)]
    assert perfect == sorted(perfect) and perfect[0] < 0.1 and perfect[-1] > 0.9
    this = [power(1000, d)[1] for d in (0.0, 0.2, 9.0)]
    assert this == sorted(this) and this[-1] == perfect[1]
    assert half_noise_power(
        canaries=100, claimed=np.inf, delta=1e-6, confidence=0.95, separation=0, design=Design()
    ) is None


def test_mu_is_the_inverse_of_its_epsilon() -> None:
    for mu in (1e-3, 0.27, 1.0, 8.0, 40.0):
        for delta in (1e-9, 1e-5, 1e-2):
            epsilon = gaussian_epsilon(mu, delta)
            if epsilon > 0:
                assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-6)
            else:
                assert gaussian_mu(epsilon, delta) >= mu
