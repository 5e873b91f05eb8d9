"""Lower bounds on epsilon: counts in, numbers out.

Two ways to turn an attack's right and wrong guesses into a statement about epsilon:

- one run (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2): m canaries enter the
  training data by independent fair coins, the attacker guesses some of the coins, and too many
  right guesses refute an epsilon. Scores of canaries may depend on each other in any way.
- Clopper-Pearson (Nasr et al. 2021, arXiv:2101.04535): rates of true and false positives over
  *independent* trials, as many trainings give or as canaries give when they do not interact.

All counts must come from guesses fixed before the tested coins were looked at. Of several ways to
guess, declared beforehand, the best counts at the Bonferroni level (`best_one_run_lower_bound`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sottovoce.privacy.audit.figures import Estimate as Estimate
from sottovoce.privacy.audit.figures import LowerBound as LowerBound

_TOLERANCE = 1e-10


def one_run_lower_bound(
    m: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """Largest epsilon that `correct` of `guesses` right guesses about `m` coins refute.

    `m`: canaries, each in the training data by an independent fair coin. `guesses`: coins that the
    attacker guessed, the others are abstentions; fixed before the coins were looked at. Returns
    0.0 where nothing is refuted. Raises ValueError for impossible counts, delta or confidence.

    Source: arXiv:2305.08846, Theorem 5.2 and Appendix D.

    *Guarantee*: an (epsilon, delta)-DP training exceeds the result with probability at most
    1 - confidence. *Assumes*: add/remove of one canary, independent fair coins, guesses made from
    the training's output alone.
    """
    m, guesses, correct = _check_guesses(m, guesses, correct)
    significance = _check_levels(delta, confidence)
    upper = float(pure_one_run_bound(guesses, correct, significance))
    if delta == 0 or upper == 0:
        return upper
    if one_run_p_value(m, guesses, correct, 0.0, delta) > significance:
        return 0.0
    lower = 0.0
    while upper - lower > _TOLERANCE * max(1.0, upper):
        middle = (lower + upper) / 2
        if one_run_p_value(m, guesses, correct, middle, delta) <= significance:
            lower = middle
        else:
            upper = middle
    return lower


def best_one_run_lower_bound(
    m: int, declared: Sequence[tuple[int, int]], delta: float, confidence: float
) -> float:
    """The best `one_run_lower_bound` of several (guesses, correct), each declared in advance.

    Every one is made at 1 - (1 - confidence) / len(declared), so that all of them hold together.
    """
    if not declared:
        raise ValueError("declared=[] holds no guesses: give at least one pair (guesses, correct)")
    each = 1 - _check_levels(delta, confidence) / len(declared)
    return max(one_run_lower_bound(m, r, v, delta, each) for r, v in declared)


def one_run_p_value(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest chance of `correct` or more right guesses under any (epsilon, delta)-DP training.

    beta + 2 m delta max_i alpha_i / i, where W ~ Binomial(guesses, e^epsilon / (1 + e^epsilon)),
    beta = P[W >= correct] and alpha_i = P[correct > W >= correct - i]. arXiv:2305.08846, Thm 5.2.
    """
    wrong = special.expit(-epsilon)
    beta = float(_at_least(np.array([correct]), guesses, wrong)[0])
    if delta == 0 or correct == 0:
        return beta
    # Outside of this the binomial has no mass: below it a longer window only lowers the average,
    # above it a window holds nothing.
    reach = 12 * math.sqrt(guesses * wrong * (1 - wrong)) + 50
    centre = guesses * (1 - wrong)
    lowest = min(max(0, math.floor(centre - reach)), correct - 1)
    starts = np.arange(lowest, max(lowest + 1, min(correct, math.ceil(centre + reach))))
    mass = _at_least(starts, guesses, wrong) - beta
    alpha = float(np.max(mass / (correct - starts), initial=0.0))
    return min(1.0, beta + 2 * m * delta * alpha)


def pure_one_run_bound(
    guesses: NDArray[np.int64] | int, correct: NDArray[np.int64] | int, significance: float
) -> NDArray[np.float64]:
    """The one-run bound at delta = 0, in closed form and for arrays of counts.

    The epsilon whose randomised response is right `correct` times or more of `guesses` with
    probability `significance`; 0 where no epsilon is refuted.
    """
    guesses, correct = np.broadcast_arrays(np.asarray(guesses), np.asarray(correct))
    some = correct > 0
    right, wrong = np.where(some, correct, 1), np.where(some, guesses - correct + 1, 1)
    with np.errstate(divide="ignore"):
        epsilon = np.log(special.betaincinv(right, wrong, significance)) - np.log(
            special.betainccinv(wrong, right, significance)
        )
    bound: NDArray[np.float64] = np.where(some, np.maximum(epsilon, 0.0), 0.0)
    return bound


def one_run_ceiling(m: int, delta: float, confidence: float) -> float:
    """The largest `one_run_lower_bound` that `m` canaries can give: all guessed, all right."""
    return one_run_lower_bound(m, m, m, delta, confidence)


def binomial_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson interval of a probability, `confidence` two-sided. (0, 1) without trials."""
    tail = (1 - confidence) / 2
    low = special.betaincinv(successes, trials - successes + 1, tail) if successes else 0.0
    missed = trials - successes
    high = special.betainccinv(successes + 1, missed, tail) if missed else 1.0
    return float(low), float(high)


def clopper_pearson_lower_bound(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    delta: float,
    confidence: float,
    *,
    sides: Literal[1, 2] = 2,
) -> float:
    """Epsilon refuted by the true and false positive rates of one test, fixed beforehand.

    Both rates are replaced by the pessimistic end of their Clopper-Pearson interval, each at half
    the allowed error. One side: ln((TPR - delta) / FPR). Two sides: that or, where it is more,
    ln((TNR - delta) / FNR), which rests on the same two ends and so costs no confidence. Returns
    0.0 where nothing is refuted.

    Source: arXiv:2101.04535, section 3; two sides as in arXiv:2302.07956.

    *Guarantee*: an (epsilon, delta)-DP mechanism exceeds the result with probability at most
    1 - confidence. *Assumes*: independent trials, as many trainings give, or canaries that do not
    interact (scores of one training depend on each other); the test was not chosen on them.
    """
    for name, hits, total in (
        ("true positives", true_positives, positives),
        ("false positives", false_positives, negatives),
    ):
        _whole(f"number of {name}", hits)
        _whole(f"trials for {name}", total)
        if not 0 <= hits <= total:
            raise ValueError(f"{hits} {name} of {total} is impossible: count each trial once")
    _check_levels(delta, confidence)
    least_tpr, _ = binomial_interval(true_positives, positives, confidence)
    _, most_fpr = binomial_interval(false_positives, negatives, confidence)
    if sides not in (1, 2):
        raise ValueError(f"sides={sides!r} must be 1 or 2")
    forward = _log_ratio(least_tpr - delta, most_fpr)
    backward = _log_ratio(1 - most_fpr - delta, 1 - least_tpr) if sides == 2 else 0.0
    return max(0.0, forward, backward)


def clopper_pearson_ceiling(
    positives: int, negatives: int, delta: float, confidence: float
) -> float:
    """The largest `clopper_pearson_lower_bound` that so many trials can give: no error at all."""
    return clopper_pearson_lower_bound(positives, positives, 0, negatives, delta, confidence)


def _at_least(
    counts: NDArray[np.int64], trials: int, wrong: float
) -> NDArray[np.float64]:
    """P[W >= count] for W ~ Binomial(trials, 1 - wrong); `wrong` keeps its digits near 0."""
    some = counts > 0
    errors = np.where(some, trials - counts + 1, 1)
    tail = special.betaincc(errors, np.where(some, counts, 1), wrong)
    result: NDArray[np.float64] = np.where(some, tail, 1.0)
    return result


def _log_ratio(numerator: float, denominator: float) -> float:
    if numerator <= 0:
        return -math.inf
    return math.inf if denominator <= 0 else math.log(numerator / denominator)


def _whole(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is not a count: give a whole number") from None


def _check_guesses(m: int, guesses: int, correct: int) -> tuple[int, int, int]:
    m, guesses, correct = _whole("m", m), _whole("guesses", guesses), _whole("correct", correct)
    if m < 1:
        raise ValueError(f"m={m} must be at least 1: an audit needs a canary")
    if not 0 <= guesses <= m:
        raise ValueError(f"guesses={guesses} must be between 0 and m={m}: guess a canary once")
    if not 0 <= correct <= guesses:
        raise ValueError(f"correct={correct} must be between 0 and guesses={guesses}")
    return m, guesses, correct


def _check_levels(delta: float, confidence: float) -> float:
    """The significance, 1 - confidence. Raises ValueError where delta or confidence is not one."""
    if not 0 <= delta < 1:
        raise ValueError(f"delta={delta} must be in [0, 1): 1e-5 is usual")
    if not 0 < 1 - confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1: 0.95 is usual")
    return 1 - confidence
