"""Which factorisation of a kind is best for a schedule: least mean squared error at equal epsilon.

The objective is sensitivity^2 times the mean variance of prefix sums' noise, the expected squared
error at a fixed privacy budget (Choquette-Choo et al. 2023, arXiv:2306.08153, equation 3). It is
free of data, so choosing by it costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sottovoce.privacy.mechanisms import series
from sottovoce.privacy.mechanisms.factorisation import (
    Banded,
    Buffered,
    Factorisation,
    Identity,
    InverseBanded,
    Tree,
)
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.privacy.mechanisms.series import Floats

NAMES = ("identity", "tree", "banded", "bisr", "blt")
USUAL_BANDS = 32
USUAL_BUFFERS = 4
_STEEPEST = 40.0  # of the logits that decay rates are searched in


def make_factorisation(
    name: str, schedule: Schedule, bands: int | None = None
) -> Factorisation:
    """The factorisation of a kind for a schedule.

    `bands`: of C for `banded`, at most the separation; of C^-1 for `bisr`; buffers for `blt`. None:
    as many of 32 as the separation allows, the best of up to 32, and 4. As many rows of noise are
    kept in memory. Raises ValueError for an unknown name or impossible bands.
    """
    rounds = schedule.rounds
    if name not in NAMES:
        raise ValueError(f"mechanism={name!r} is unknown: use one of {', '.join(NAMES)}")
    if bands is not None and not 1 <= bands <= rounds:
        raise ValueError(f"bands={bands} must be at least 1 and at most rounds={rounds}")
    if name in ("identity", "tree"):
        if bands is not None:
            raise ValueError(f"bands={bands} has no meaning with mechanism={name}: leave it out")
        return Tree(rounds, {}) if name == "tree" else Identity(rounds, {"bands": [1.0]})
    if name == "banded":
        return banded(schedule, bands or min(USUAL_BANDS, schedule.min_separation))
    if name == "bisr":
        return bisr(schedule, bands)
    return blt(schedule, bands or USUAL_BUFFERS)


def banded(schedule: Schedule, bands: int) -> Banded:
    """The best banded Toeplitz C. Raises ValueError where participations would share a band."""
    from scipy.optimize import minimize

    if bands > schedule.min_separation:
        raise ValueError(
            f"bands={bands} are more than min_separation={schedule.min_separation}: lower the one "
            "or raise the other"
        )
    first = series.square_root(bands)
    if bands > 1:
        found = minimize(
            lambda tail: _banded_objective(tail, schedule.rounds), first[1:], jac=True,
            method="L-BFGS-B", bounds=[(0.0, 1.0)] * (bands - 1), options={"maxiter": 300},
        )
        better = _banded_objective(first[1:], schedule.rounds)[0] > found.fun
        first = np.concatenate([[1.0], found.x]) if better else first
    return Banded(schedule.rounds, {"bands": first})


def bisr(schedule: Schedule, bands: int | None = None) -> InverseBanded:
    """The inverse square root cut to `bands` coefficients; None: the best power of two up to 32."""
    counts = [bands] if bands else [n for n in (1, 2, 4, 8, 16, 32) if n <= schedule.rounds]
    every = [
        InverseBanded(schedule.rounds, {"bands": series.inverse_square_root(n)}) for n in counts
    ]
    return min(every, key=lambda one: one.mean_error(schedule))


def blt(schedule: Schedule, buffers: int) -> Buffered:
    """The best C with that many buffers, as far as a local search finds it."""
    from scipy.optimize import minimize

    start = _first_buffers(schedule.rounds, buffers)
    found = minimize(
        lambda point: _blt_objective(point, schedule), start, method="L-BFGS-B",
        bounds=[(-_STEEPEST, _STEEPEST)] * len(start), options={"maxiter": 200},
    )
    better = found.fun <= _blt_objective(start, schedule)
    theta, omega = _buffers_at(found.x if better else start)
    return Buffered(schedule.rounds, {"theta": theta, "omega": omega})


def _banded_objective(tail: Floats, rounds: int) -> tuple[float, Floats]:
    """log of |c|^2 times the mean variance, c = (1, tail), and its gradient over `tail`."""
    column = np.concatenate([[1.0], tail])
    prefix = np.cumsum(series.inverse(column, rounds))
    weights = (rounds - np.arange(rounds)) / rounds
    error, norm = float(weights @ prefix**2), float(column @ column)
    back = series.filtered([1.0], column, (weights * prefix)[::-1])[::-1]
    lags = range(1, len(column))
    slopes = np.array([-2 * prefix[: rounds - lag] @ back[lag:] for lag in lags])
    return float(np.log(norm * error)), 2 * tail / norm + slopes / error


def _blt_objective(point: Floats, schedule: Schedule) -> float:
    theta, omega = _buffers_at(point)
    powers = theta[None, :] ** np.arange(schedule.rounds - 1)[:, None]
    column = np.concatenate([[1.0], powers @ omega])
    prefix = np.cumsum(_blt_inverse(theta, omega, schedule.rounds))
    weights = (schedule.rounds - np.arange(schedule.rounds)) / schedule.rounds
    error = weights @ prefix**2
    value = float(np.log(error) + 2 * np.log(series.sensitivity(column, schedule)))
    return value if np.isfinite(value) else 1e3


def _blt_inverse(theta: Floats, omega: Floats, terms: int) -> Floats:
    """1 / (1 + sum_j omega_j x / (1 - theta_j x)) as a quotient of two polynomials."""
    poles = np.array([1.0])
    for rate in theta:
        poles = np.convolve(poles, [1.0, -rate])
    zeros = poles.copy()
    for j, weight in enumerate(omega):
        others = np.array([1.0])
        for i, rate in enumerate(theta):
            others = others if i == j else np.convolve(others, [1.0, -rate])
        zeros += np.concatenate([[0.0], weight * others])
    return series.filtered(poles, zeros, series.padded([1.0], terms))


def _buffers_at(point: Floats) -> tuple[Floats, Floats]:
    """Decay rates in (0, 1) and positive weights of sum below 1, from any real numbers."""
    logits, weights = np.split(point, 2)
    theta = 1 / (1 + np.exp(-logits))
    scale = np.exp(weights - max(weights.max(), 0.0))
    slack = np.exp(-max(weights.max(), 0.0))
    return theta, scale / (scale.sum() + slack)


def _first_buffers(rounds: int, buffers: int) -> Floats:
    """Decay rates spread over the time scales of the run, weights fitted to the square root."""
    from scipy.optimize import nnls

    longest = max(float(rounds), 2.0)
    theta = 1 - 0.7 * longest ** (-np.arange(buffers) / buffers)
    terms = min(rounds - 1, 2000)
    omega: Any = np.full(buffers, 0.4 / buffers)
    if terms >= buffers:
        powers = theta[None, :] ** np.arange(terms)[:, None]
        omega = nnls(powers, series.square_root(terms + 1)[1:])[0]
    omega = np.maximum(omega, 1e-4)
    omega *= min(1.0, 0.95 / omega.sum())
    logits = np.log(theta / (1 - theta))
    return np.concatenate([logits, np.log(omega / (1 - omega.sum()))])
