"""Checks of what a device adds to a sum: clipped to S, with weight one, over a public divisor.

A direction canary that took part moves the released sum by S along its direction: the inner product
is S + noise, of mean S, as noise and other devices' signals along a random direction have mean 0.
Some canaries hand over ten times S and are to be cut down; were they not, they would be ten
times as loud as the rest. What devices weigh shows in the others' mean. A divisor that follows the
realised cohort makes noise smaller where many answered.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sottovoce.privacy.audit.checks import LEVEL, Check
from sottovoce.privacy.audit.device_record import DeviceRecord

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_DOTS = "inner products of released sums with the directions of canary devices"
_NORMAL = (
    "canaries' mean inner products independent of each other and normal, of any variances, but for"
    " what they contributed"
)
CLIPPING = Check(
    "clipping", _DOTS, "loud canaries' contribution less quiet ones', in clip norms",
    "updates that are not clipped", _NORMAL,
)
WEIGHTING = Check(
    "weighting", _DOTS, "contribution of a canary in clip norms",
    "a weight of a half or two", _NORMAL,
)
NO_DIRECTIONS = "the run has no direction canaries"
TOO_FEW = "too few canaries took part"
LEAST = 3  # canaries to speak of their spread
DIVISOR = Check(
    "divisor", "the length of every round's noised sum, and how many devices are in it",
    "rank correlation of length and cohort", "a sum divided by its realised cohort",
    "cohorts drawn independently, and signals that do not shrink with more devices",
)


def clipping(record: DeviceRecord) -> Check:
    """Whether canaries that hand over more than S are cut down to it.

    Of normal means with unequal variances, the smaller side's degrees of freedom are conservative
    (Mickey and Brown 1966). Welch's are not: three canaries against ten were flagged eight times
    too often.
    """
    means = contributions(record)
    if means is None:
        return CLIPPING.inapplicable(NO_DIRECTIONS)
    loud = _taking_part(means, record.loudness > 1)
    quiet = _taking_part(means, record.loudness <= 1)
    if min(len(loud), len(quiet)) < LEAST:
        return CLIPPING.inapplicable(TOO_FEW)
    error = float(np.sqrt(loud.var(ddof=1) / len(loud) + quiet.var(ddof=1) / len(quiet)))
    freedom = min(len(loud), len(quiet)) - 1
    apart = (loud.mean() - quiet.mean()) / max(error, 1e-300)
    most = float(record.loudness.max()) - 1
    return CLIPPING.found(
        loud.mean() - quiet.mean(), 0.0, float(stats.t.sf(apart, freedom)),
        resolves=most / 2 > _far(freedom) * error,
    )


def weighting(record: DeviceRecord) -> Check:
    """Whether what a device hands over enters the sum once; more refutes the claim.

    Student's t of normal means with unequal variances is conservative this far out (Bakirov and
    Szekely 2005).
    """
    means = contributions(record)
    if means is None:
        return WEIGHTING.inapplicable(NO_DIRECTIONS)
    quiet = _taking_part(means, record.loudness <= 1)
    if len(quiet) < LEAST:
        return WEIGHTING.inapplicable(TOO_FEW)
    found = stats.ttest_1samp(quiet, 1.0)
    error = float(quiet.std(ddof=1)) / np.sqrt(len(quiet))
    return WEIGHTING.found(
        quiet.mean(), 1.0, float(found.pvalue),
        resolves=0.5 > 1.5 * _far(len(quiet) - 1) * error, violates=bool(quiet.mean() > 1),
    )


def divisor(record: DeviceRecord, *, poisson: bool) -> Check:
    """Whether the noise of a round is smaller the more devices answered."""
    if not poisson:
        return DIVISOR.inapplicable("cohorts were not drawn independently, or not all answered")
    noised = record.deviation > 0
    cohorts = record.answered[noised]
    if len(np.unique(cohorts)) < 3:
        return DIVISOR.inapplicable("fewer than three different cohorts had noise")
    lengths = record.squares[noised].sum(axis=1) / record.deviation[noised] ** 2
    found = stats.kendalltau(lengths, cohorts, alternative="less")
    perfect = stats.kendalltau(-cohorts, cohorts, alternative="less")
    return DIVISOR.found(
        float(found.statistic), 0.0, float(found.pvalue),
        resolves=float(perfect.pvalue) < LEVEL / 10,
    )


def contributions(record: DeviceRecord) -> Floats | None:
    """(m,) mean of each canary's inner products, in clip norms, over the rounds in which it was.

    nan for those that were in none. The mean of anything along a random direction is 0: to subtract
    a round's mean over the canaries that are out would only make all others depend on each other.
    Rounds of one canary are not independent, as signals go on from round to round, and make one
    number. None for a run without direction canaries.
    """
    if record.kind != "direction" or not len(record.rounds):
        return None
    values = record.dots / record.clip_norm[:, None]
    present = record.drawn & record.inside
    times = present.sum(axis=0)
    total = np.where(present, values, 0.0).sum(axis=0)
    return np.where(times > 0, total / np.maximum(times, 1), np.nan)


def _taking_part(means: Floats, which: Bools) -> Floats:
    return means[which & np.isfinite(means)]


def _far(freedom: int) -> float:
    """Student's t that a tenth of `LEVEL` goes beyond."""
    return float(stats.t.isf(LEVEL / 10, freedom))
