"""Membership: from the scores of members and non-members to what they prove.

The bound is a one-run test (`one_run_lower_bound`) with its guesses fixed in advance: coins decide
which canaries are members, one half of them chooses how many to call members, how many to call
non-members and how many to leave alone, and only the other half is tested. Choosing on the tested
half instead raises false alarms from 5 % to 28 % and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.audit.bounds import (
    Estimate,
    LowerBound,
    one_run_lower_bound,
    pure_one_run_bound,
)
from sottovoce.privacy.audit.gaussian import pooled_gaussian_estimate
from sottovoce.privacy.audit.roc import Roc, Scores, auc, auc_interval, roc, tpr_at_fpr

FALSE_POSITIVE_RATES = (0.01, 0.001)
# Below one half each: coins never come out exactly even, so the middle is left alone.
FRACTIONS = np.array([0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.45])
METHOD = "one run (Steinke et al. 2023), guesses chosen on one half, tested on the other"
ASSUMES = (
    "each canary was in the training data by an independent fair coin: the split into training and "
    "held-out data is random by hash and is taken as such a coin, and as many of either side as "
    "fair coins give are drawn"
)


@dataclass(frozen=True)
class Guesses:
    """How the tested half was guessed. `canaries` were tested, `correct` of the guesses right."""

    canaries: int
    as_members: int
    as_non_members: int
    correct: int


@dataclass(frozen=True)
class Membership:
    """What one attack's scores show. `tpr_at_fpr`: false positive rate -> (rate, interval)."""

    members: Scores
    non_members: Scores
    auc: float
    auc_interval: tuple[float, float]
    tpr_at_fpr: dict[float, tuple[float, tuple[float, float]]]
    curve: Roc
    bound: LowerBound
    guesses: Guesses
    estimate: Estimate


def measure(
    members: Scores,
    non_members: Scores,
    *,
    delta: float,
    confidence: float,
    generator: np.random.Generator,
    tests: int = 1,
) -> Membership:
    """Everything that scores of members and non-members show, a higher score meaning "member".

    `tests` bounds are meant to hold together with `confidence`: each is made at the Bonferroni
    level. AUC and rates use all scores at plain `confidence`. Raises ValueError for scores that
    are not finite, or where a side is empty.
    """
    for side, scores in (("members", members), ("non-members", non_members)):
        if len(scores) == 0 or not np.isfinite(scores).all():
            raise ValueError(f"scores of {side} must be finite and at least one, got {len(scores)}")
    curve = roc(members, non_members)
    bound, guesses = split_bound(
        members, non_members, delta=delta, confidence=1 - (1 - confidence) / tests,
        generator=generator,
    )
    return Membership(
        members=members,
        non_members=non_members,
        auc=auc(members, non_members),
        auc_interval=auc_interval(members, non_members, confidence),
        tpr_at_fpr={f: tpr_at_fpr(curve, f, confidence) for f in FALSE_POSITIVE_RATES},
        curve=curve,
        bound=bound,
        guesses=guesses,
        estimate=pooled_gaussian_estimate(members, non_members, delta),
    )


def split_bound(
    members: Scores,
    non_members: Scores,
    *,
    delta: float,
    confidence: float,
    generator: np.random.Generator,
) -> tuple[LowerBound, Guesses]:
    """The one-run bound on one half of the canaries, its guesses chosen on the other half.

    *Guarantee*: an (epsilon, delta)-DP training exceeds the bound with probability at most
    1 - confidence. *Assumes*: add/remove of one canary; `ASSUMES`; scores that depend on the
    training's output and on public facts alone.
    """
    scores, coins = flip_coins(members, non_members, generator)
    half = len(scores) // 2
    top, bottom = choose_fractions(scores[:half], coins[:half], 1 - confidence)
    guesses = guess(scores[half:], coins[half:], top, bottom)
    made = guesses.as_members + guesses.as_non_members
    bound = LowerBound(
        epsilon=one_run_lower_bound(guesses.canaries, made, guesses.correct, delta, confidence),
        confidence=confidence,
        method=METHOD,
        ceiling=_ceiling(guesses.canaries, delta, confidence),
        assumes=ASSUMES,
    )
    return bound, guesses


def flip_coins(
    members: Scores, non_members: Scores, generator: np.random.Generator
) -> tuple[Scores, NDArray[np.bool_]]:
    """Canaries in random order with their coins, True for a member.

    The number of members is binomial, as fair coins would have it. Four standard deviations are
    kept in reserve on the smaller side, so that it runs out with probability below 1e-4.
    """
    pool = min(len(members), len(non_members))
    canaries = max(1, math.floor(2 * (pool - 4 * math.sqrt(pool / 2))))
    inside = int(generator.binomial(canaries, 0.5))
    inside = min(max(inside, canaries - len(non_members)), len(members))
    scores = np.concatenate([
        generator.choice(members, inside, replace=False),
        generator.choice(non_members, canaries - inside, replace=False),
    ])
    coins = np.arange(canaries) < inside
    order = generator.permutation(canaries)
    return scores[order], coins[order]


def choose_fractions(
    scores: Scores, coins: NDArray[np.bool_], significance: float
) -> tuple[float, float]:
    """Shares of the canaries to call members (top scores) and non-members (bottom scores).

    The pair of `FRACTIONS` whose guesses prove most on these canaries; where none proves anything,
    the one that beats chance by the most standard deviations.
    """
    ordered = coins[np.argsort(-scores, kind="stable")]
    wins_top = np.concatenate([[0], np.cumsum(ordered)])
    wins_bottom = np.concatenate([[0], np.cumsum(~ordered[::-1])])
    sizes = _sizes(FRACTIONS, len(scores))
    made = sizes[:, None] + sizes[None, :]
    right = wins_top[sizes][:, None] + wins_bottom[sizes][None, :]
    proved = pure_one_run_bound(made, right, significance)
    luck = (right - made / 2) / np.sqrt(np.maximum(made, 1) / 4)
    best = np.lexsort((luck.ravel(), proved.ravel()))[-1]
    row, column = np.unravel_index(best, made.shape)
    return float(FRACTIONS[row]), float(FRACTIONS[column])


def guess(
    scores: Scores, coins: NDArray[np.bool_], top: float, bottom: float
) -> Guesses:
    """Call the `top` share of scores members and the `bottom` share non-members."""
    as_members, as_non_members = _sizes(np.array([top, bottom]), len(scores))
    ordered = coins[np.argsort(-scores, kind="stable")]
    right = ordered[:as_members].sum() + (~ordered[len(ordered) - as_non_members :]).sum()
    return Guesses(len(scores), int(as_members), int(as_non_members), int(right))


@lru_cache(maxsize=256)
def _ceiling(canaries: int, delta: float, confidence: float) -> float:
    """The most that guesses of the largest shares, all right, would certify."""
    most = 2 * int(_sizes(FRACTIONS[-1:], canaries)[0])
    return one_run_lower_bound(canaries, most, most, delta, confidence)


def _sizes(fractions: NDArray[np.float64], canaries: int) -> NDArray[np.int64]:
    return np.floor(fractions * canaries).astype(np.int64)
