"""Canary statistics read as normal: an estimate of epsilon, and a bound where they truly are.

Andrew, Kairouz, Oh, Oprea, McMahan, Suriyakumar 2024, "One-shot Empirical Privacy Estimation for
Federated Learning", arXiv:2302.03098: canaries with statistics N(mu, s^2) among others N(0, s^2)
measure a Gaussian mechanism. Fitting a variance to each side reads chance differences between the
two as leakage (a true epsilon of 1 came out as 1.9 with 100 canaries): here both share one, and the
standardised shift is the unbiased one of Hedges 1981.

The bound is the exact confidence limit of that shift (noncentral t). It holds for a Gaussian
mechanism alone; on any other, half of its alarms or more are false, and only the estimate is left.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from sottovoce.privacy.audit.bounds import _check_levels
from sottovoce.privacy.audit.figures import Estimate, LowerBound
from sottovoce.privacy.audit.gaussian import gaussian_epsilon

METHOD = "pooled-variance Gaussian fit"
LARGE = 1e100  # scores beyond it have no squares
ASSUMES = (
    "the mechanism is Gaussian, and each canary's statistic is normal, with one variance for all, "
    "independent of the others but for a shift common to all"
)


def pooled_gaussian_estimate(
    members: NDArray[np.float64], non_members: NDArray[np.float64], delta: float
) -> Estimate:
    """Epsilon if both sides were normal with one (pooled) variance, members the higher ones.

    0 where members score lower. Chance puts it above 0 about half the time where nothing leaks.
    """
    mu = max(0.0, pooled_separation(members, non_members))
    return Estimate(gaussian_epsilon(mu, delta) if math.isfinite(mu) else math.inf, METHOD)


def pooled_separation(
    members: NDArray[np.float64], non_members: NDArray[np.float64]
) -> float:
    """How many (pooled) standard deviations members score higher, without bias; inf without any."""
    shift, spread, freedom = _standardised(members, non_members)
    if spread == 0 or freedom < 2:
        return math.inf if shift > 0 else 0.0
    unbiased = math.sqrt(2 / freedom) * math.exp(
        special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)
    )
    return unbiased * shift / spread


def pooled_gaussian_lower_bound(
    members: NDArray[np.float64],
    non_members: NDArray[np.float64],
    delta: float,
    confidence: float,
) -> LowerBound:
    """Epsilon whose Gaussian mechanism shifts members so far with probability 1 - `confidence`.

    `members`, `non_members`: (canaries,) statistics, higher for members. No counts limit it: its
    ceiling is infinite. Raises ValueError for fewer than four statistics or ones that are all
    alike, which are no normal ones.

    *Guarantee*: a mu-GDP mechanism with epsilon(mu, delta) exceeds the result with probability at
    most 1 - confidence. *Assumes*: `ASSUMES`; statistics fixed before they were looked at.
    """
    significance = _check_levels(delta, confidence)
    if delta == 0:
        raise ValueError("delta=0 leaves a Gaussian mechanism no finite epsilon: give delta > 0")
    shift, spread, freedom = _standardised(members, non_members)
    if freedom < 2 or spread == 0:
        raise ValueError(
            f"{len(members)} and {len(non_members)} statistics with deviation {spread:g} are no "
            "normal ones: a Gaussian bound needs at least four that differ"
        )
    unit = math.sqrt(1 / len(members) + 1 / len(non_members))
    mu = unit * _least_noncentrality(shift / spread / unit, freedom, significance)
    return LowerBound(
        gaussian_epsilon(mu, delta), confidence, f"{METHOD}, lower limit", math.inf, ASSUMES
    )


def _standardised(
    members: NDArray[np.float64], non_members: NDArray[np.float64]
) -> tuple[float, float, int]:
    """Difference of the means, pooled standard deviation, degrees of freedom.

    Of scores so large that their squares would overflow, both in a unit of their own.
    """
    freedom = len(members) + len(non_members) - 2
    largest = max(float(np.abs(s).max(initial=0.0)) for s in (members, non_members))
    if LARGE < largest < math.inf:
        members, non_members = members / largest, non_members / largest
    squares = sum(float(np.square(s - s.mean()).sum()) for s in (members, non_members))
    shift = float(members.mean() - non_members.mean())
    return shift, math.sqrt(squares / max(freedom, 1)), freedom


def _least_noncentrality(t: float, freedom: int, significance: float) -> float:
    """The noncentrality at which Student's t exceeds `t` with probability `significance`, or 0."""
    def excess(centre: float) -> float:
        below = float(special.nctdtr(freedom, centre, t))
        if math.isnan(below):  # it has no digits where this is next to 0 or 1
            below = float(t > centre)
        return below - (1 - significance)

    if t <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, t + 1, xtol=1e-10)) if excess(t + 1) < 0 else t
