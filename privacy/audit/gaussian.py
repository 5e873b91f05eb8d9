"""Bounds and estimates that know, or suppose, that the mechanism is Gaussian.

Where the null hypothesis is a whole trade-off curve, one run certifies more than (epsilon, delta)
does: Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-Differential Privacy in One Run",
arXiv:2410.22235, Algorithm 3 with two symbols. The curve is mu-GDP (Dong et al. 2019,
arXiv:1905.02383): N(0, 1) against N(mu, 1). On a mechanism of another shape such a bound is only
an estimate: half of its alarms or more are false.
"""

from __future__ import annotations

import math

from scipy import optimize, special

from sottovoce.privacy.audit.bounds import _check_guesses, _check_levels


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of N(0, 1) against N(mu, 1) at `delta`; inf at delta = 0 unless mu = 0.

    Source: arXiv:1905.02383, Corollary 2.13 (Balle and Wang 2018, arXiv:1805.06530, Theorem 8).
    """
    return two_gaussians_epsilon(0.0, 1.0, mu, 1.0, delta)


def two_gaussians_epsilon(
    mean_out: float, std_out: float, mean_in: float, std_in: float, delta: float
) -> float:
    """Smallest epsilon at which two normal distributions are (epsilon, delta)-close, both ways."""
    _check_levels(delta, 0.5)
    if not (std_out > 0 and std_in > 0 and math.isfinite(mean_in - mean_out)):
        raise ValueError(f"std_out={std_out}, std_in={std_in} must be above 0 and means finite")
    first, second = (mean_out, std_out), (mean_in, std_in)
    if first == second:
        return 0.0
    if delta == 0:
        return math.inf

    def excess(epsilon: float) -> float:
        return max(_divergence(first, second, epsilon), _divergence(second, first, epsilon)) - delta

    if excess(0.0) <= 0:
        return 0.0
    upper = 1.0
    while excess(upper) > 0:
        upper *= 2
    return float(optimize.brentq(excess, 0.0, upper, xtol=1e-12))


def one_run_gaussian_lower_bound(
    m: int, guesses: int, correct: int, delta: float, confidence: float
) -> float:
    """The one-run bound for Gaussian mechanisms, as epsilon at `delta` > 0.

    Same counts as `one_run_lower_bound`. Returns 0.0 where nothing is refuted.

    Source: arXiv:2410.22235, Algorithm 3.

    *Guarantee*: a mu-GDP training with epsilon(mu, delta) exceeds the result with probability at
    most 1 - confidence. *Assumes*: independent fair coins, add/remove of one canary, and a
    trade-off curve no worse than the Gaussian one of the same epsilon at delta.
    """
    significance = _check_levels(delta, confidence)
    if delta == 0:
        raise ValueError("delta=0 leaves a Gaussian mechanism no finite epsilon: give delta > 0")
    return gaussian_epsilon(one_run_mu(m, guesses, correct, significance), delta)


def one_run_mu(m: int, guesses: int, correct: int, significance: float) -> float:
    """Largest mu of mu-GDP refuted by `correct` of `guesses` right guesses about `m` coins."""
    m, guesses, correct = _check_guesses(m, guesses, correct)
    lower, upper = 0.0, 1.0
    while refutes_mu(m, guesses, correct, upper, significance):
        lower, upper = upper, 2 * upper
    while upper - lower > 1e-10 * upper and upper > 1e-9:
        middle = (lower + upper) / 2
        if refutes_mu(m, guesses, correct, middle, significance):
            lower = middle
        else:
            upper = middle
    return lower


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu whose Gaussian mechanism has `epsilon` at `delta`: the inverse of `gaussian_epsilon`.

    Raises ValueError where epsilon is negative or infinite, or delta is 0.
    """
    _check_levels(delta, 0.5)
    if not (0 <= epsilon < math.inf and delta > 0):
        raise ValueError(f"epsilon={epsilon}, delta={delta} fit no Gaussian mechanism")
    upper = 1.0
    while gaussian_epsilon(upper, delta) < epsilon:
        upper *= 2

    def excess(mu: float) -> float:
        return gaussian_epsilon(mu, delta) - epsilon

    least = 2 * float(special.ndtri((1 + delta) / 2))  # epsilon is 0 up to here
    return float(optimize.brentq(excess, least, upper, xtol=1e-12)) if epsilon else least


def refutes_mu(m: int, guesses: int, correct: int, mu: float, significance: float) -> bool:
    """Whether mu-GDP gives `correct` or more right guesses with probability below `significance`.

    Supposes that probability to be `significance` and counts, per canary, the mass of right (`hit`)
    and wrong (`miss`) guesses that outcomes with at least i right ones must then carry; the curve
    forces mass onto i - 1 from that above. More mass than there are guesses is a contradiction.
    """
    hit = significance * correct / m
    miss = significance * (guesses - correct) / m
    for i in range(correct - 1, -1, -1):
        forced = float(special.ndtr(special.ndtri(hit) - mu))
        if forced <= miss:
            break
        hit += i / (guesses - i) * (forced - miss)
        miss = forced
        if hit + miss > guesses / m:
            return True
    return hit + miss > guesses / m


def _divergence(
    top: tuple[float, float], bottom: tuple[float, float], epsilon: float
) -> float:
    """Hockey-stick divergence E_{x ~ top}[(1 - e^epsilon bottom(x) / top(x))+] of two normals."""
    return sum(
        math.exp(_log_mass(top, low, high)) - math.exp(epsilon + _log_mass(bottom, low, high))
        for low, high in _where_likelier(top, bottom, epsilon)
    )


def _log_mass(normal: tuple[float, float], low: float, high: float) -> float:
    """ln P[low < x < high], exact far out in the tails too, where e^epsilon multiplies it."""
    mean, std = normal
    low, high = (low - mean) / std, (high - mean) / std
    if low > 0:
        low, high = -high, -low
    if low == -math.inf:
        return float(special.log_ndtr(high))
    if high == math.inf:
        return float(special.log_ndtr(-low))
    mass = float(special.ndtr(high) - special.ndtr(low))
    return math.log(mass) if mass > 0 else -math.inf


def _where_likelier(
    top: tuple[float, float], bottom: tuple[float, float], epsilon: float
) -> list[tuple[float, float]]:
    """Intervals where ln top(x) - ln bottom(x) > epsilon: a quadratic inequality."""
    (m1, s1), (m0, s0) = top, bottom
    a = 1 / (2 * s0**2) - 1 / (2 * s1**2)
    b = m1 / s1**2 - m0 / s0**2
    c = m0**2 / (2 * s0**2) - m1**2 / (2 * s1**2) + math.log(s0 / s1) - epsilon
    if a == 0:
        root = -c / b
        return [(root, math.inf)] if b > 0 else [(-math.inf, root)]
    gap = b * b - 4 * a * c
    if gap <= 0:
        return [(-math.inf, math.inf)] if a > 0 else []
    q = -(b + math.copysign(math.sqrt(gap), b)) / 2
    low, high = sorted((q / a, c / q))
    return [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]
