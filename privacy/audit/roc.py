"""How well scores tell members from non-members: ROC curve, AUC, true positives at few false ones.

A higher score says "member". All intervals are two-sided; ties count half, as chance would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from sottovoce.privacy.audit.bounds import binomial_interval

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Roc:
    """Counts over falling thresholds, from "nobody is a member" to "everybody is".

    `true_positives`, `false_positives`: (thresholds,) int64, both rising from 0.
    """

    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]

    @property
    def members(self) -> int:
        return int(self.true_positives[-1])

    @property
    def non_members(self) -> int:
        return int(self.false_positives[-1])


def roc(members: Scores, non_members: Scores) -> Roc:
    """The ROC curve; equal scores fall on the same side of every threshold."""
    thresholds = np.unique(np.concatenate([members, non_members]))[::-1]

    def above(scores: Scores) -> NDArray[np.int64]:
        ordered = np.sort(scores)
        counts = len(ordered) - np.searchsorted(ordered, thresholds, side="left")
        return np.concatenate([[0], counts]).astype(np.int64)

    return Roc(above(members), above(non_members))


def auc(members: Scores, non_members: Scores) -> float:
    """P[a member scores above a non-member] + P[tie] / 2: the Mann-Whitney statistic."""
    ranks = stats.rankdata(np.concatenate([members, non_members]))
    n = len(members)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(non_members)))


def auc_interval(members: Scores, non_members: Scores, confidence: float) -> tuple[float, float]:
    """DeLong's interval for the AUC, on the logit scale so that it stays inside [0, 1].

    DeLong, DeLong, Clarke-Pearson 1988, by mid-ranks (Sun and Xu 2014). Where its variance is 0
    (perfect separation), Clopper-Pearson over as many disjoint pairs as there are.
    """
    area = auc(members, non_members)
    variance = _delong_variance(members, non_members)
    if variance == 0 or not 0 < area < 1:
        pairs = min(len(members), len(non_members))
        low, high = binomial_interval(round(area * pairs), pairs, confidence)
        return min(low, area), max(high, area)
    z = float(special.ndtri((1 + confidence) / 2))
    reach = z * math.sqrt(variance) / (area * (1 - area))
    centre = float(special.logit(area))
    return float(special.expit(centre - reach)), float(special.expit(centre + reach))


def tpr_at_fpr(
    curve: Roc, fpr: float, confidence: float
) -> tuple[float, tuple[float, float]]:
    """Best true positive rate at a false positive rate of at most `fpr`, and its interval.

    The interval is Clopper-Pearson for the members at that threshold; the threshold's own false
    positive rate is the observed one. Below 1 / non-members only a rate of 0 can be observed.
    """
    allowed = np.flatnonzero(curve.false_positives <= fpr * curve.non_members + 1e-9)
    hits = int(curve.true_positives[allowed[-1]])
    return hits / curve.members, binomial_interval(hits, curve.members, confidence)


def _delong_variance(members: Scores, non_members: Scores) -> float:
    """Variance of the AUC from how often each member wins and each non-member loses."""
    n, k = len(members), len(non_members)
    if n < 2 or k < 2:
        return 0.0
    together = stats.rankdata(np.concatenate([members, non_members]))
    wins = (together[:n] - stats.rankdata(members)) / k
    losses = 1 - (together[n:] - stats.rankdata(non_members)) / n
    return float(wins.var(ddof=1) / n + losses.var(ddof=1) / k)
