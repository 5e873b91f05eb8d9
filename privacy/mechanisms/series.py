"""Lower-triangular Toeplitz matrices as power series: their first column says all.

Products and inverses of such matrices are those of the series sum_k c_k x^k. The prefix-sum matrix
is 1 / (1 - x); its square root has the coefficients binom(2k, k) / 4^k.

Sources: square-root factorisation: Fichtenberger et al. 2023, arXiv:2202.11205; its banded inverse
and the sensitivity theorem: Kalinin and Lampert 2024, arXiv:2405.13763, theorem 2; Kalinin et al.
2025, arXiv:2505.12128.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.mechanisms.separation import Schedule

Floats = NDArray[np.float64]


def padded(series: Any, terms: int) -> Floats:
    """The first `terms` coefficients, zeros where there are none."""
    found = np.zeros(terms)
    given = np.asarray(series, dtype=np.float64)[:terms]
    found[: len(given)] = given
    return found


def inverse(series: Any, terms: int) -> Floats:
    """(terms,) coefficients of 1 / series; `series[0]` must not be 0."""
    return filtered([1.0], series, padded([1.0], terms))


def filtered(numerator: Any, denominator: Any, signal: Any) -> Floats:
    """`signal` times numerator / denominator, as many terms as `signal` has."""
    from scipy.signal import lfilter

    found: Floats = lfilter(numerator, denominator, signal)
    return found


def workload(rounds: int, momentum: float = 0.0) -> Floats:
    """(rounds,) weights of updates in the model, the newest first: ones, or heavy-ball momentum's.

    As a series 1 / ((1 - x) (1 - momentum x)).
    """
    return np.cumsum(momentum ** np.arange(rounds, dtype=np.float64))


def square_root(terms: int) -> Floats:
    """(terms,) of 1 / sqrt(1 - x): 1, 1/2, 3/8, ..."""
    k = np.arange(1, terms)
    return np.cumprod(np.concatenate([[1.0], (k - 0.5) / k]))


def inverse_square_root(terms: int) -> Floats:
    """(terms,) of sqrt(1 - x): 1, -1/2, -1/8, ..."""
    k = np.arange(1, terms)
    return np.cumprod(np.concatenate([[1.0], (k - 1.5) / k]))


def toeplitz(series: Any, rounds: int) -> Floats:
    """(rounds, rounds) the matrix itself."""
    column = padded(series, rounds)
    lag = np.arange(rounds)[:, None] - np.arange(rounds)[None, :]
    return np.where(lag >= 0, column[np.abs(lag)], 0.0)


def sensitivity(series: Any, schedule: Schedule) -> float:
    """Largest |C u| over all schedules and all contributions u_i of norm at most 1, C Toeplitz.

    The contributions may be vectors in any direction. For coefficients that are not negative and do
    not grow, the worst is to take part from the first round on, as closely as allowed, always with
    the same vector (Kalinin and Lampert 2024, theorem 2): exact. Others are replaced by the least
    such sequence above their absolute values, which only makes every |C^T C| entry larger: a safe
    bound. Where no two participations can meet in a row of C (its bands are no more than the
    separation), columns are orthogonal, and sqrt(k) times the largest column norm holds whatever
    the signs (Choquette-Choo et al. 2023, arXiv:2306.08153).
    """
    column = padded(series, schedule.rounds)
    above = np.maximum.accumulate(np.abs(column)[::-1])[::-1]
    together = np.zeros(schedule.rounds)
    for number in range(schedule.participations):
        start = number * schedule.min_separation
        together[start:] += above[: schedule.rounds - start]
    found = float(np.sqrt(together @ together))
    bands = int(np.flatnonzero(column).max(initial=0)) + 1
    if bands <= schedule.min_separation:
        found = min(found, float(np.sqrt(schedule.participations * (column @ column))))
    return found
