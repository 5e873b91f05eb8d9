"""An upper bound on epsilon that a small device can compute: Renyi DP, with numpy alone.

Mironov, Talwar and Zhang 2019, arXiv:1908.10530: for a Poisson-subsampled Gaussian with rate q and
noise sigma, under add/remove and at order a,

    exp((a - 1) RDP(a)) = E (1 + u)^a, u = q (exp((2 x - 1) / (2 sigma^2)) - 1), x ~ N(0, sigma^2)
                        = sum_k C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 sigma^2))

the sum at integer orders. Its binomial weights sum to one and the terms k = 0, 1 have exponent 0,
so what exceeds one is a sum of positive terms, with exp(.) - 1 for exp(.): no cancellation, however
small the rate. At a few orders in between, which matter where epsilon is large, the mean is taken
by the trapezoidal rule, whose error for such analytic integrands is exp(-2 pi d / h), below 1e-60
for the step h chosen here (d: distance of the next pole or branch point). As E u = 0, a u may be
taken off: again nothing cancels. The logarithm of the moment is convex in a (it is a cumulant
generating function) and 0 at a = 1, so chords between these orders are upper bounds (Wang, Balle
and Kasiviswanathan 2019, arXiv:1808.00087). To epsilon by Canonne, Kamath and Steinke 2020,
arXiv:2004.00010, proposition 12:

    epsilon = RDP(a) + log((a - 1) / a) - (log delta + log a) / (a - 1),   the least over all a.

Rounding is covered by a relative margin of 1e-9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError

Floats = NDArray[np.float64]

LEAST_NOISE = 1e-3
"""Noise multipliers below this count as no noise."""
MOST_NOISE = 1e100
"""Noise multipliers above this count as this, whose square is still a number."""

_FRACTIONS = (1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.25, 2.5, 2.75, 3.5, 4.5)
_LEAST_FOR_FRACTIONS = 0.25  # noise below which the rule would take many points, for nobody
_INTEGERS = (
    *range(1, 129), *range(136, 257, 8), *(round(256 * 2 ** (i / 4)) for i in range(1, 25))
)
_ORDERS = np.unique(np.concatenate([1 + np.geomspace(0.01, 10, 120), _FRACTIONS, _INTEGERS[1:]]))
_MARGIN = 1 + 1e-9


def epsilon_bound(steps: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Epsilon at `delta` of composed steps `(noise_multiplier, sampling_rate, count)`.

    `noise_multiplier`: deviation over sensitivity. inf where a step has no noise to speak of, 0
    where there are no steps. ConfigError for delta outside (0, 1), ValueError for impossible steps.

    *Guarantee*: the composition is (epsilon, delta)-DP under add/remove of one unit.
    *Assumes*: in every step the unit is drawn by a secret coin of its own; the noise is fresh.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta={delta} must be above 0 and below 1: 1e-5 is usual")
    total = np.zeros(len(_ORDERS))
    for noise, rate, count in steps:
        if not (noise >= 0 and 0 <= rate <= 1 and count >= 0):
            raise ValueError(
                f"noise_multiplier={noise}, sampling_rate={rate}, count={count}: "
                "none may be below 0, and no rate above 1"
            )
        if count and rate:
            total += count * _log_moments(min(float(noise), MOST_NOISE), float(rate))
    return _epsilon(total, delta) if total.any() else 0.0


def _epsilon(log_moments: Floats, delta: float) -> float:
    over = _ORDERS - 1
    found = log_moments / over + np.log1p(-1 / _ORDERS) - np.log(delta * _ORDERS) / over
    return max(float(found.min()), 0.0)


@lru_cache(maxsize=4096)
def _log_moments(noise: float, rate: float) -> Floats:
    """(a - 1) RDP(a) of one step at `_ORDERS`."""
    if noise < LEAST_NOISE:
        return np.full(len(_ORDERS), np.inf)
    if rate == 1:
        found = _ORDERS * (_ORDERS - 1) / (2 * noise**2)
    else:
        known = {float(order): _at_integer(order, noise, rate) for order in _INTEGERS}
        if noise >= _LEAST_FOR_FRACTIONS:
            known |= {order: _in_between(order, noise, rate) for order in _FRACTIONS}
        places = sorted(known)
        found = np.interp(_ORDERS, places, [known[place] for place in places])
    log_moments: Floats = _MARGIN * found
    return log_moments


def _at_integer(order: int, noise: float, rate: float) -> float:
    """Logarithm of the moment at an integer order, which is 0 at order 1."""
    if order == 1:
        return 0.0
    k = np.arange(2, order + 1)
    exponent = k * (k - 1.0) / (2 * noise**2)
    above = exponent + np.log(-np.expm1(-exponent))  # log(exp(exponent) - 1)
    weights = _log_binomials(order)[2:] + k * math.log(rate) + (order - k) * math.log1p(-rate)
    return float(np.logaddexp(0.0, np.logaddexp.reduce(weights + above)))


def _in_between(order: float, noise: float, rate: float) -> float:
    """Logarithm of the moment at any small order, by the trapezoidal rule."""
    width = min(noise, noise**2) / 8
    x = np.arange(-12 * noise, order + 12 * noise, width)
    u = rate * np.expm1((2 * x - 1) / (2 * noise**2))
    near = np.clip(u, -1e-3, 1e-3)
    above = np.where(u == near, _small(order, near), np.expm1(order * np.log1p(u)) - order * u)
    density = np.exp(-0.5 * (x / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
    return math.log1p(width * float(density @ above))


def _small(order: float, u: Floats) -> Floats:
    """(1 + u)^a - 1 - a u for small u, by its series."""
    term = order * (order - 1) / 2 * u**2
    total = term
    for k in range(2, 6):
        term = term * u * (order - k) / (k + 1)
        total = total + term
    return total


@lru_cache(maxsize=512)
def _log_binomials(order: int) -> Floats:
    """log C(order, k) for k = 0, ..., order."""
    logs = _log_factorials()[: order + 1]
    found: Floats = logs[order] - logs - logs[::-1]
    return found


@lru_cache(maxsize=1)
def _log_factorials() -> Floats:
    return np.array([math.lgamma(n + 1.0) for n in range(_INTEGERS[-1] + 1)])
