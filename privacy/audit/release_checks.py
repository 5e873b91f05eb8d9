"""Checks of noise, read from the releases alone: its size, and that none is used twice.

A released sum is y_t = g_t + n_t: a signal of which nothing is known, and noise whose deviation the
ledger claims. Both tests hold whatever the signals are.

Size: given g, |y|^2 / s^2 is noncentral chi-square, which is stochastically above the central one:
a sum that is too *short* has too little noise. Asked of every round and every parameter, so that
noise missing in one matrix of one round is found.

Reuse: with independent noise, <y_t, y_u> (t < u) is at most
|g_t| |g_u| + <n_t, n_u> + <g_t, n_u> + |n_t| |g_u|; the last term because a later signal has seen
earlier noise. Norms of signals are bounded by what the length of y leaves beside the noise (Birge
2001, lemma 8.1). Reused noise adds the full |n|^2. Where signals are as large as that, as in a run
with hardly any noise, the test cannot tell, and says so.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sottovoce.privacy.audit.checks import LEVEL, Check
from sottovoce.privacy.audit.device_record import DeviceRecord

HALF = 0.75  # of the variance that is gone with half of the noise
ROUNDING = 1e-4  # relative, of float32

Floats = NDArray[np.float64]

NOISE_LEVEL = Check(
    "noise_level",
    "the length of every round's noised sum, parameter by parameter",
    "smallest deviation over the claimed one",
    "half the noise",
    "Gaussian noise, independent from coordinate to coordinate, whatever the signals are",
)
NOISE_REUSE = Check(
    "noise_reuse",
    "a random sample of the coordinates of every round's noised sum",
    "largest correlation of two rounds",
    "noise used twice",
    "Gaussian noise of the claimed size, whatever the signals are; later signals may follow earlier"
    " noise",
)


def noise_level(record: DeviceRecord, claimed: Floats | None) -> Check:
    """Whether every round's noise is as large as claimed.

    `claimed`: (R,) least deviation by the ledger, 0 where it claims none; None for no claim. What
    the coordinator says of its noise must not be below it either.
    """
    noised = record.deviation > 0
    needed = np.zeros_like(record.deviation) if claimed is None else claimed
    if not noised.any() and not (needed > 0).any():
        return NOISE_LEVEL.inapplicable("no noise is claimed")
    deviation = np.maximum(record.deviation, needed) * (1 - ROUNDING)
    tested = deviation > 0
    squares = np.column_stack([record.squares, record.squares.sum(axis=1)])[tested]
    sizes = np.append(record.sizes, record.sizes.sum())
    scaled = squares / deviation[tested, None] ** 2
    tests = scaled.size
    p_values = stats.chi2.cdf(scaled, sizes)
    row, leaf = np.unravel_index(int(p_values.argmin()), p_values.shape)
    ratio = math.sqrt(scaled[row, leaf] / sizes[leaf])
    halved = stats.chi2.cdf(np.maximum(scaled - HALF * sizes, 0.0), sizes)
    if np.any(record.deviation < needed * (1 - ROUNDING)):
        below = float(np.min(record.deviation[needed > 0] / needed[needed > 0]))
        return NOISE_LEVEL.found(below, 1.0, 0.0, resolves=True)
    return NOISE_LEVEL.found(
        ratio, 1.0, tests * float(p_values.min()),
        resolves=tests * float(halved.min()) <= LEVEL / 10,
    )


def noise_reuse(record: DeviceRecord, *, correlated: bool) -> Check:
    """Whether the noise of two rounds is the same, or the same but for its sign.

    `correlated`: noise that is correlated over rounds by design.
    """
    if correlated:
        return NOISE_REUSE.inapplicable("noise is correlated over rounds by design")
    noised = record.deviation > 0
    if noised.sum() < 2:
        return NOISE_REUSE.inapplicable("fewer than two rounds have noise")
    rows = record.sample[noised] / record.deviation[noised, None]
    products = rows @ rows.T
    first, second = np.triu_indices(len(rows), 1)
    lengths = np.diag(products)
    found = np.abs(products[first, second])
    size = rows.shape[1]
    exponents = _exponents(found, lengths[first], lengths[second], size)
    p_values = 8 * len(found) * np.exp(-exponents)
    worst = int(exponents.argmax())
    seen = _largest(lengths[first], lengths[second], size, _exponent_of(len(found))) < size
    norms = math.sqrt(lengths[first[worst]] * lengths[second[worst]])
    return NOISE_REUSE.found(
        found[worst] / max(norms, 1e-300), 0.0, float(p_values[worst]), resolves=bool(seen.all())
    )


def _exponent_of(pairs: int) -> float:
    """x at which 8 pairs e^-x is a tenth of `LEVEL`."""
    return math.log(80 * pairs / LEVEL)


def _exponents(found: Floats, first: Floats, second: Floats, size: int) -> Floats:
    """Largest x at which an inner product is still above `_largest`: it has chance 8 e^-x."""
    low, high = np.zeros_like(found), np.full_like(found, 700.0)
    for _ in range(50):
        middle = (low + high) / 2
        above = found > _largest(first, second, size, middle)
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low


def _largest(first: Floats, second: Floats, size: int, x: Floats | float) -> Floats:
    """What <y_t, y_u> of independent noise exceeds with probability at most 8 e^-x, either way.

    `first`, `second`: squared lengths of y_t and y_u of `size` coordinates, in units of the noise.
    """
    early, late = _signal(first, size, x), _signal(second, size, x)
    noise = np.sqrt(2 * size * x) + x
    length = math.sqrt(size) + np.sqrt(2 * x)
    bound: Floats = early * late + noise + np.sqrt(2 * x) * early + length * late
    return bound


def _signal(square: Floats, size: int, x: Floats | float) -> Floats:
    """Upper bound on |g| where |g + n|^2 = `square`, wrong with probability at most e^-x."""
    root = 2 * np.sqrt(x) + np.sqrt(np.maximum(4 * np.asarray(x) + 2 * square - size, 0.0))
    bound: Floats = np.sqrt(np.maximum((root**2 - size) / 2, 0.0))
    return bound
