"""Laws of the audit's bounds: published values, coverage on known mechanisms, monotonicity."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from dp_accounting import dp_event, get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from sottovoce.privacy.audit import (
    Estimate,
    LowerBound,
    best_one_run_lower_bound,
    binomial_interval,
    clopper_pearson_ceiling,
    clopper_pearson_lower_bound,
    exposure,
    gaussian_epsilon,
    gaussian_mu,
    one_run_ceiling,
    one_run_gaussian_lower_bound,
    one_run_lower_bound,
    one_run_p_value,
    pooled_gaussian_estimate,
    pooled_gaussian_lower_bound,
    two_gaussians_epsilon,
)
from sottovoce.privacy.audit.pooled import _least_noncentrality

TRIALS = 400
# At most 5 % false alarms: the count that 400 trials exceed with probability below 1e-3.
MOST_ALARMS = int(stats.binom.ppf(0.999, TRIALS, 0.05))


@pytest.mark.parametrize(
    ("m", "guesses", "correct", "delta", "epsilon"),
    [
        (1000, 100, 90, 1e-5, 1.62614),
        (1000, 1000, 750, 0.0, 0.97667),
        (10000, 500, 450, 1e-5, 1.93545),
        (500, 50, 45, 1e-3, 0.48269),
        (1000, 100, 75, 1e-4, 0.67298),  # arXiv:2305.08846, Appendix D
        (100_000, 1510, 1439, 1e-5, 2.67585),  # the same, section 7
    ],
)
def test_one_run_bound_equals_published_values(
    m: int, guesses: int, correct: int, delta: float, epsilon: float
) -> None:
    assert one_run_lower_bound(m, guesses, correct, delta, 0.95) == pytest.approx(
        epsilon, abs=1e-5
    )


@pytest.mark.parametrize(
    ("m", "guesses", "correct", "epsilon"),
    [(1000, 100, 90, 2.4564), (1000, 1000, 600, 0.58354)],
)
def test_gaussian_one_run_bound_equals_published_values(
    m: int, guesses: int, correct: int, epsilon: float
) -> None:
    found = one_run_gaussian_lower_bound(m, guesses, correct, 1e-5, 0.95)
    assert found == pytest.approx(epsilon, abs=1e-5)


def test_clopper_pearson_bound_equals_published_values() -> None:
    assert clopper_pearson_lower_bound(90, 100, 10, 100, 0.0, 0.95) == pytest.approx(
        1.542152, abs=1e-6
    )
    assert clopper_pearson_lower_bound(500, 500, 0, 500, 1e-5, 0.95) == pytest.approx(
        4.905584, abs=1e-6
    )


def test_epsilon_of_two_gaussians_equals_the_accountants() -> None:
    assert two_gaussians_epsilon(0, 1, 1, 1, 1e-5) == pytest.approx(4.377178, abs=1e-6)
    for sigma, delta in ((0.3, 1e-7), (1.0, 1e-5), (7.0, 1e-3), (0.03, 1e-5)):
        assert gaussian_epsilon(1 / sigma, delta) == pytest.approx(
            get_epsilon_gaussian(sigma, delta), rel=1e-6
        )
    event = dp_event.GaussianDpEvent(2.0)
    assert gaussian_epsilon(0.5, 1e-6) == pytest.approx(
        PLDAccountant().compose(event).get_epsilon(1e-6), abs=1e-3
    )


def test_epsilon_of_unequal_gaussians_equals_numerical_integration() -> None:
    out, inside = (0.3, 1.0), (1.1, 1.4)
    epsilon = two_gaussians_epsilon(*out, *inside, 1e-3)
    x = np.linspace(-30, 30, 2_000_001)
    p, q = (stats.norm.pdf(x, *normal) for normal in (out, inside))
    delta = max(np.trapezoid(np.maximum(a - math.exp(epsilon) * b, 0), x) for a, b in
                ((p, q), (q, p)))
    assert delta == pytest.approx(1e-3, rel=1e-4)


def _slow_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    pmf = stats.binom.pmf(np.arange(r + 1), r, 1 / (1 + math.exp(-epsilon)))
    alpha = max((pmf[v - i : v].sum() / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, float(pmf[v:].sum() + 2 * m * delta * alpha))


counts = st.integers(1, 400).flatmap(
    lambda m: st.integers(0, m).flatmap(
        lambda r: st.integers(0, r).map(lambda v: (m, r, v))
    )
)
deltas = st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1])


@given(counts, deltas, st.floats(0, 8))
def test_p_value_equals_its_slow_definition(
    mrv: tuple[int, int, int], delta: float, epsilon: float
) -> None:
    assert one_run_p_value(*mrv, epsilon, delta) == pytest.approx(
        _slow_p_value(*mrv, epsilon, delta), rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("correct", [1, 2400, 3000, 3990, 4000])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.386, 5.0])
def test_p_value_of_many_guesses_equals_its_slow_definition(correct: int, epsilon: float) -> None:
    counted = (5000, 4000, correct, epsilon, 1e-3)
    assert one_run_p_value(*counted) == pytest.approx(_slow_p_value(*counted), rel=1e-6, abs=1e-12)


@given(counts, deltas)
def test_bound_is_the_largest_refuted_epsilon(
    mrv: tuple[int, int, int], delta: float
) -> None:
    bound = one_run_lower_bound(*mrv, delta, 0.95)
    assert one_run_p_value(*mrv, bound + 1e-6, delta) > 0.05
    if bound > 0:
        assert one_run_p_value(*mrv, bound - 1e-6, delta) <= 0.05


@settings(max_examples=60)
@given(counts, deltas)
def test_bound_rises_with_right_guesses_and_falls_with_delta_confidence_and_canaries(
    mrv: tuple[int, int, int], delta: float
) -> None:
    m, r, v = mrv
    bound = one_run_lower_bound(m, r, v, delta, 0.9)
    slack = bound + 1e-9
    if v < r:
        assert one_run_lower_bound(m, r, v + 1, delta, 0.9) >= bound - 1e-9
    assert one_run_lower_bound(m, r, v, min(0.9, 2 * delta + 1e-6), 0.9) <= slack
    assert one_run_lower_bound(m, r, v, delta, 0.95) <= slack
    assert one_run_lower_bound(2 * m, r, v, delta, 0.9) <= slack
    assert 0 <= bound <= one_run_ceiling(m, delta, 0.9) + 1e-9


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), deltas, st.data())
def test_clopper_pearson_bound_rises_with_hits_falls_with_false_alarms_and_has_a_ceiling(
    positives: int, negatives: int, delta: float, data: st.DataObject
) -> None:
    tp = data.draw(st.integers(0, positives))
    fp = data.draw(st.integers(0, negatives))
    bound = clopper_pearson_lower_bound(tp, positives, fp, negatives, delta, 0.95)
    if tp < positives:
        more = clopper_pearson_lower_bound(tp + 1, positives, fp, negatives, delta, 0.95)
        assert more >= bound
    if fp < negatives:
        fewer = clopper_pearson_lower_bound(tp, positives, fp + 1, negatives, delta, 0.95)
        assert fewer <= bound
    assert bound <= clopper_pearson_ceiling(positives, negatives, delta, 0.95)


@given(st.integers(1, 500), st.data())
def test_interval_equals_scipys(trials: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, trials))
    theirs = stats.binomtest(hits, trials).proportion_ci(0.9, method="exact")
    assert binomial_interval(hits, trials, 0.9) == pytest.approx((theirs.low, theirs.high))


def test_bounds_of_no_or_half_right_guesses_are_zero() -> None:
    assert one_run_lower_bound(100, 0, 0, 1e-5, 0.95) == 0.0
    assert one_run_lower_bound(100, 100, 50, 1e-5, 0.95) == 0.0
    assert one_run_gaussian_lower_bound(100, 100, 50, 1e-5, 0.95) == 0.0
    assert clopper_pearson_lower_bound(0, 0, 0, 0, 0.0, 0.95) == 0.0


def _tail_counts(scores: NDArray[np.float64], coins: NDArray[np.bool_], k: int) -> int:
    """Right guesses when the k highest scores are called members, the k lowest non-members."""
    order = np.argsort(scores)
    return int(coins[order[-k:]].sum() + (~coins[order[:k]]).sum())


@pytest.mark.parametrize("mechanism", ["nothing", "randomised response", "gaussian", "correlated"])
def test_one_run_bounds_exceed_the_truth_in_at_most_5_percent(mechanism: str) -> None:
    m, k, delta = 300, 60, 1e-5
    generator = np.random.default_rng(7)
    gaussian = gaussian_epsilon(0.5, delta)
    truth = {"nothing": 0.0, "randomised response": 1.0}.get(mechanism, gaussian)
    plain = cache(lambda v: one_run_lower_bound(m, 2 * k, v, delta, 0.95))
    shaped = cache(lambda v: one_run_gaussian_lower_bound(m, 2 * k, v, delta, 0.95))
    alarms = gaussian_alarms = 0
    for _ in range(TRIALS):
        coins = generator.random(m) < 0.5
        noise = generator.standard_normal(m)
        if mechanism == "nothing":
            scores = noise
        elif mechanism == "randomised response":
            kept = generator.random(m) < 1 / (1 + math.exp(-1.0))
            scores = np.where(kept, coins, ~coins) + 1e-9 * noise
        else:
            scores = noise + 0.5 * coins
            scores += 3 * generator.standard_normal() * (mechanism == "correlated")
        right = _tail_counts(scores, coins, k)
        alarms += plain(right) > truth
        gaussian_alarms += mechanism != "randomised response" and shaped(right) > truth
    assert alarms <= MOST_ALARMS
    assert gaussian_alarms <= MOST_ALARMS


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_clopper_pearson_exceeds_the_truth_in_at_most_5_percent(epsilon: float) -> None:
    generator = np.random.default_rng(3)
    right = 1 / (1 + math.exp(-epsilon))
    hits = generator.binomial(200, right, TRIALS)
    false = generator.binomial(200, 1 - right, TRIALS)
    alarms = sum(
        clopper_pearson_lower_bound(int(tp), 200, int(fp), 200, 0.0, 0.95) > epsilon
        for tp, fp in zip(hits, false, strict=True)
    )
    assert alarms <= MOST_ALARMS


def test_bounds_come_close_to_the_truth_with_many_canaries() -> None:
    generator = np.random.default_rng(1)
    right = int(generator.binomial(20_000, 1 / (1 + math.exp(-2.0))))
    assert 1.9 < one_run_lower_bound(20_000, 20_000, right, 0.0, 0.95) < 2.0


def test_the_gaussian_bound_is_the_tighter_one_on_a_gaussian_mechanism() -> None:
    args = (1000, 100, 90, 1e-5, 0.95)
    assert one_run_gaussian_lower_bound(*args) > one_run_lower_bound(*args)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1000, 100, 101, 1e-5, 0.95), "correct=101 must be between 0 and guesses=100"),
        ((1000, 1001, 90, 1e-5, 0.95), "guesses=1001 must be between 0 and m=1000"),
        ((1000, 100, -1, 1e-5, 0.95), "correct=-1"),
        ((0, 0, 0, 1e-5, 0.95), "m=0"),
        ((1000, 100, 90, 1.0, 0.95), "delta=1.0 must be in"),
        ((1000, 100, 90, -1e-9, 0.95), "delta=-1e-09 must be in"),
        ((1000, 100, 90, math.nan, 0.95), "delta=nan must be in"),
        ((1000, 100, 90, 1e-5, 1.0), "confidence=1.0 must be between"),
        ((1000, 100, 90, 1e-5, 0.0), "confidence=0.0 must be between"),
        ((1000, 100, 89.5, 1e-5, 0.95), "correct=89.5 is not a count"),
    ],
)
def test_impossible_input_is_refused_in_one_line_by_name_and_value(
    arguments: tuple[int, int, int, float, float], words: str
) -> None:
    for bound in (one_run_lower_bound, one_run_gaussian_lower_bound):
        with pytest.raises(ValueError, match=words) as caught:
            bound(*arguments)
        assert "\n" not in str(caught.value)


def test_impossible_counts_and_deltas_of_other_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="11 true positives of 10"):
        clopper_pearson_lower_bound(11, 10, 0, 10, 0.0, 0.95)
    with pytest.raises(ValueError, match="-1 false positives of 10"):
        clopper_pearson_lower_bound(1, 10, -1, 10, 0.0, 0.95)
    with pytest.raises(ValueError, match="delta=0 leaves"):
        one_run_gaussian_lower_bound(10, 10, 10, 0.0, 0.95)
    with pytest.raises(ValueError, match="std_out=0"):
        two_gaussians_epsilon(0, 0, 1, 1, 1e-5)


def test_a_bound_never_looks_like_an_estimate() -> None:
    bound = LowerBound(1.6269, 0.95, "one run", 5.8, "coins")
    generator = np.random.default_rng(0)
    members, others = generator.normal(1, 1, 5000), generator.normal(0, 1, 5000)
    estimate = pooled_gaussian_estimate(members, others, 1e-5)
    assert isinstance(estimate, Estimate) and not isinstance(estimate, LowerBound)
    assert estimate.epsilon == pytest.approx(4.377, abs=0.3)
    assert str(bound) == "≥ 1.62" and str(estimate).startswith("≈") and "no bound" in str(estimate)
    assert pooled_gaussian_estimate(np.zeros(3), np.zeros(3), 1e-5).epsilon == 0
    assert str(pooled_gaussian_lower_bound(members, others, 1e-5, 0.95)).startswith("≥")
    known = exposure(3.0, generator.standard_normal(999), candidates=10_000)
    assert str(known).startswith("≈") and "no bound" in str(known)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_one_side_never_proves_more_than_two_and_equals_its_formula(
    positives: int, negatives: int, data: st.DataObject
) -> None:
    tp = data.draw(st.integers(0, positives))
    fp = data.draw(st.integers(0, negatives))
    delta = data.draw(deltas)
    one = clopper_pearson_lower_bound(tp, positives, fp, negatives, delta, 0.95, sides=1)
    mirrored = clopper_pearson_lower_bound(
        negatives - fp, negatives, positives - tp, positives, delta, 0.95, sides=1
    )
    both = clopper_pearson_lower_bound(tp, positives, fp, negatives, delta, 0.95)
    assert both == pytest.approx(max(one, mirrored), abs=1e-12)
    least = stats.beta.ppf(0.025, tp, positives - tp + 1) if tp else 0.0
    most = stats.beta.ppf(0.975, fp + 1, negatives - fp) if fp < negatives else 1.0
    assert one == pytest.approx(max(0.0, math.log(max(least - delta, 1e-300) / most)), abs=1e-9)


def test_a_confidence_of_next_to_nothing_certifies_no_infinite_epsilon() -> None:
    with pytest.raises(ValueError, match="confidence=1e-300"):
        one_run_lower_bound(10, 10, 10, 0.0, 1e-300)


def test_sides_other_than_one_or_two_are_refused() -> None:
    with pytest.raises(ValueError, match="sides=3 must be 1 or 2"):
        clopper_pearson_lower_bound(1, 2, 1, 2, 0.0, 0.95, sides=3)  # type: ignore[arg-type]


def test_the_best_of_declared_guesses_is_made_at_the_bonferroni_level() -> None:
    declared = [(50, 40), (100, 90), (1000, 600)]
    found = best_one_run_lower_bound(1000, declared, 1e-5, 0.95)
    single = [one_run_lower_bound(1000, r, v, 1e-5, 1 - 0.05 / 3) for r, v in declared]
    assert found == pytest.approx(max(single))
    assert found < one_run_lower_bound(1000, 100, 90, 1e-5, 0.95)
    with pytest.raises(ValueError, match="holds no guesses"):
        best_one_run_lower_bound(1000, [], 1e-5, 0.95)


@pytest.mark.parametrize(
    ("m", "guesses", "correct"), [(1, 1, 1), (10**6, 10**6, 9 * 10**5), (10**6, 3, 3)]
)
@pytest.mark.parametrize("confidence", [1e-9, 0.5, 1 - 1e-12])
def test_extreme_counts_and_confidences_give_finite_bounds_below_the_ceiling(
    m: int, guesses: int, correct: int, confidence: float
) -> None:
    for delta in (0.0, 1e-9, 0.5):
        bound = one_run_lower_bound(m, guesses, correct, delta, confidence)
        assert 0 <= bound <= one_run_ceiling(m, delta, confidence) + 1e-9 < 60
    if guesses < 10**6:
        assert math.isfinite(one_run_gaussian_lower_bound(m, guesses, correct, 1e-5, confidence))


# -- canary statistics -----------------------------------------------------------------------------

CANARIES, OTHERS = 100, 1000


def _statistics(mu: float, generator: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
    return generator.normal(mu, 1, CANARIES), generator.normal(0, 1, OTHERS)


def test_the_pooled_estimate_is_not_biased_upward_and_the_unpooled_one_is() -> None:
    mu, generator = gaussian_mu(1.0, 1e-5), np.random.default_rng(0)
    drawn = [_statistics(mu, generator) for _ in range(400)]
    pooled = [pooled_gaussian_estimate(*one, 1e-5).epsilon for one in drawn]
    unpooled = [two_gaussians_epsilon(0, 1, x.mean(), x.std(ddof=1), 1e-5) for x, _ in drawn]
    assert np.mean(pooled) == pytest.approx(1.0, abs=0.1)
    assert np.mean(unpooled) > 1.7  # what arXiv:2302.03098 reads with 100 canaries


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.5])
def test_the_pooled_bound_exceeds_the_truth_in_5_percent_and_no_more(mu: float) -> None:
    generator = np.random.default_rng(1)
    truth = gaussian_epsilon(mu, 1e-5)
    bounds = [
        pooled_gaussian_lower_bound(*_statistics(mu, generator), 1e-5, 0.95).epsilon
        for _ in range(TRIALS)
    ]
    assert sum(bound > truth for bound in bounds) <= MOST_ALARMS
    if mu:
        assert np.median(bounds) > 0.35 * truth


def test_the_pooled_bound_does_not_move_with_a_shift_common_to_all_nor_with_scale() -> None:
    members, others = _statistics(1.0, np.random.default_rng(2))
    first = pooled_gaussian_lower_bound(members, others, 1e-5, 0.95)
    moved = pooled_gaussian_lower_bound(7 + 3 * members, 7 + 3 * others, 1e-5, 0.95)
    assert moved.epsilon == pytest.approx(first.epsilon) and math.isinf(first.ceiling)
    assert pooled_gaussian_estimate(others, members, 1e-5).epsilon == 0.0


def test_the_pooled_bound_equals_the_noncentral_law_of_students_t() -> None:
    members, others = _statistics(0.8, np.random.default_rng(3))
    bound = pooled_gaussian_lower_bound(members, others, 1e-5, 0.9)
    unit = math.sqrt(1 / CANARIES + 1 / OTHERS)
    t = stats.ttest_ind(members, others).statistic
    mu = gaussian_mu(bound.epsilon, 1e-5)
    assert stats.nct.sf(t, CANARIES + OTHERS - 2, mu / unit) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("freedom", "t"), [(10_000, 40.0), (2, 2.0), (3, 37.0), (98, 38.0), (498, 60.0)]
)
@pytest.mark.parametrize("significance", [0.05, 1e-3])
def test_the_pooled_bound_is_exact_where_the_noncentral_law_has_no_digits(
    freedom: int, t: float, significance: float
) -> None:
    centre = _least_noncentrality(t, freedom, significance)
    quantiles = (np.arange(200_000) + 0.5) / 200_000
    spreads = np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)
    above = float(special.ndtr(centre - t * spreads).mean())
    assert 0 <= centre < t
    if centre > 0:
        assert above == pytest.approx(significance, rel=0.05)


def test_statistics_that_are_no_normal_ones_have_no_gaussian_bound() -> None:
    for few in (np.ones(1), np.zeros(50)):
        with pytest.raises(ValueError, match="are no normal ones"):
            pooled_gaussian_lower_bound(few, few, 1e-5, 0.95)
    with pytest.raises(ValueError, match="delta=0 leaves"):
        pooled_gaussian_lower_bound(np.arange(3.0), np.arange(3.0), 0.0, 0.95)


# -- exposure --------------------------------------------------------------------------------------


def test_exposure_is_the_log_of_candidates_over_rank() -> None:
    others = np.arange(1023.0)
    assert exposure(2000.0, others, candidates=1024).bits == 10.0
    assert exposure(-1.0, others, candidates=1024).bits == 0.0
    middle = exposure(511.5, others, candidates=1024)
    assert middle.bits == 1.0 and middle.interval == (1.0, 1.0)


def test_exposure_of_a_sample_covers_that_of_all_candidates() -> None:
    generator = np.random.default_rng(0)
    every = generator.standard_normal(9_999)
    truth = exposure(2.0, every, candidates=10_000).bits
    missed = 0
    for _ in range(200):
        low, high = exposure(2.0, generator.choice(every, 400), candidates=10_000).interval
        missed += not low <= truth <= high
    assert missed <= stats.binom.ppf(0.999, 200, 0.05)


def test_by_chance_exposure_is_above_b_bits_once_in_two_to_the_b() -> None:
    generator = np.random.default_rng(1)
    bits = np.array([
        exposure(s[0], s[1:], candidates=256).bits for s in generator.random((600, 256))
    ])
    for b in (1, 2, 4):
        assert (bits >= b).sum() <= stats.binom.ppf(1 - 1e-6, 600, 2.0**-b)


def test_ties_never_flatter_a_secret_and_impossible_scores_are_refused() -> None:
    assert exposure(0.0, np.zeros(255), candidates=256).bits == 0.0
    for secret, others in ((math.nan, np.zeros(3)), (1.0, np.array([math.inf]))):
        with pytest.raises(ValueError, match="finite"):
            exposure(secret, others, candidates=10)
    with pytest.raises(ValueError, match="others of candidates=10"):
        exposure(1.0, np.zeros(10), candidates=10)
