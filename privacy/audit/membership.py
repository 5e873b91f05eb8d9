"""Membership: from the scores of members and non-members to what they prove.

The bound is a one-run test with its guesses fixed in advance: coins decide which canaries are
members; some of them choose how many to call members, how many to call non-members and how many to
leave alone; only the others are tested. Choosing on the tested ones instead raises false alarms
from 5 % to 28 % and more. Shares that were declared before any score was seen need no such half:
the best of them counts at the Bonferroni level.

What the coins were decides which neighbours a bound is about (`Design.relation`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.audit.design import DEFAULT_DESIGN, Design, all_coins, flip_coins
from sottovoce.privacy.audit.figures import Estimate, LowerBound
from sottovoce.privacy.audit.pooled import pooled_gaussian_estimate, pooled_separation
from sottovoce.privacy.audit.roc import Roc, Scores, auc, auc_interval, roc, tpr_at_fpr
from sottovoce.privacy.audit.shares import FRACTIONS, best_pair, sizes

FALSE_POSITIVE_RATES = (0.01, 0.001)


@dataclass(frozen=True)
class Guesses:
    """How the tested part was guessed. `canaries` were tested, `correct` of the guesses right.

    `drawn`: canaries in all, those that chose the guesses included.
    """

    canaries: int
    as_members: int
    as_non_members: int
    correct: int
    drawn: int = 0

    @property
    def made(self) -> int:
        return self.as_members + self.as_non_members


@dataclass(frozen=True)
class Membership:
    """What one attack's scores show. `tpr_at_fpr`: false positive rate -> (rate, interval).

    `separation`: standard deviations between members and non-members, for the detection power.
    """

    members: Scores
    non_members: Scores
    auc: float
    auc_interval: tuple[float, float]
    tpr_at_fpr: dict[float, tuple[float, tuple[float, float]]]
    curve: Roc
    bound: LowerBound
    guesses: Guesses
    estimate: Estimate
    separation: float


def measure(
    members: Scores,
    non_members: Scores,
    *,
    delta: float,
    confidence: float,
    generator: np.random.Generator,
    tests: int = 1,
    design: Design = DEFAULT_DESIGN,
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
        generator=generator, design=design,
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
        separation=pooled_separation(members, non_members),
    )


def split_bound(
    members: Scores,
    non_members: Scores,
    *,
    delta: float,
    confidence: float,
    generator: np.random.Generator,
    design: Design = DEFAULT_DESIGN,
) -> tuple[LowerBound, Guesses]:
    """The one-run bound, its guesses fixed before the tested canaries are looked at.

    *Guarantee*: a training that is (epsilon, delta)-DP under `design.relation` exceeds the bound
    with probability at most 1 - confidence. *Assumes*: `design.assumes`; scores that depend on the
    training's output and on public facts alone.
    """
    if design.coins:
        scores, coins = all_coins(members, non_members, generator)
    else:
        scores, coins = flip_coins(members, non_members, generator)
    drawn = len(scores)
    if design.declared:
        level = 1 - (1 - confidence) / len(design.declared)
        shares = [(share, share) for share in design.declared]
    else:
        level, chosen = confidence, math.floor(len(scores) * design.holdout)
        gaussian = design.gaussian
        shares = [choose_fractions(scores[:chosen], coins[:chosen], 1 - confidence, gaussian)]
        scores, coins = scores[chosen:], coins[chosen:]
    tried = [guess(scores, coins, top, bottom) for top, bottom in shares]
    proved = [design.certify(g.canaries, g.made, g.correct, delta, level) for g in tried]
    best = int(np.argmax(proved))
    bound = LowerBound(
        epsilon=proved[best],
        confidence=confidence,
        method=design.method,
        ceiling=_ceiling(len(scores), delta, confidence, design),
        assumes=design.assumes,
    )
    return bound, replace(tried[best], drawn=drawn)


def choose_fractions(
    scores: Scores, coins: NDArray[np.bool_], significance: float, gaussian: bool = False
) -> tuple[float, float]:
    """Shares of the canaries to call members (top scores) and non-members (bottom scores).

    The pair of `FRACTIONS` that did best on these canaries, which are not to be tested.
    """
    ordered = coins[np.argsort(-scores, kind="stable")]
    wins_top = np.concatenate([[0], np.cumsum(ordered)])
    wins_bottom = np.concatenate([[0], np.cumsum(~ordered[::-1])])
    made = sizes(FRACTIONS, len(scores))
    right = wins_top[made], wins_bottom[made]
    row, column = best_pair(len(scores), made, *right, significance, gaussian)
    return float(FRACTIONS[row]), float(FRACTIONS[column])


def guess(
    scores: Scores, coins: NDArray[np.bool_], top: float, bottom: float
) -> Guesses:
    """Call the `top` share of scores members and the `bottom` share non-members."""
    as_members, as_non_members = sizes(np.array([top, bottom]), len(scores))
    ordered = coins[np.argsort(-scores, kind="stable")]
    right = ordered[:as_members].sum() + (~ordered[len(ordered) - as_non_members :]).sum()
    return Guesses(len(scores), int(as_members), int(as_non_members), int(right))


@lru_cache(maxsize=256)
def _ceiling(canaries: int, delta: float, confidence: float, design: Design) -> float:
    """The most that guesses of the largest shares, all right, would certify."""
    share, level = FRACTIONS[-1], confidence
    if design.declared:
        share, level = max(design.declared), 1 - (1 - confidence) / len(design.declared)
    most = 2 * int(sizes(np.array([share]), canaries)[0])
    return design.certify(canaries, most, most, delta, level)
