"""Exposure of a secret that outranks every one of a sample: a fitted law, extrapolated.

Carlini et al. 2019, arXiv:1802.08232, section 4: losses of the secrets that could have been follow
a skew-normal law closely, so that its lower tail tells how many of them would be likelier than one
far below all that were tried. An estimate, only as good as the law is so far out.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sottovoce.privacy.audit.figures import Exposure

METHOD = "skew-normal fit to a sample"
REPLICATES = 200  # of the bootstrap
LEAST = 100  # secrets that a fit needs
_LOWEST = -745.0  # log of the smallest number there is

Losses = NDArray[np.float64]


def fitted_exposure(
    loss: float,
    others: Losses,
    *,
    candidates: int,
    confidence: float,
    generator: np.random.Generator,
) -> Exposure:
    """Exposure of a secret of this `loss`, less for likelier, from losses of `others`.

    `others`: (sample,) of secrets drawn uniformly from `candidates`. The law is fitted by moments;
    the interval is its bootstrap's. Raises ValueError for fewer than `LEAST`, or where a loss is no
    number.
    """
    if len(others) < LEAST:
        raise ValueError(f"{len(others)} others are too few for a fit: draw {LEAST} or more")
    if not (math.isfinite(loss) and np.isfinite(others).all()):
        raise ValueError("losses of secrets must be finite numbers")
    most = math.log2(candidates)
    redrawn = others[generator.integers(len(others), size=(REPLICATES, len(others)))]
    shares = log_share(loss, np.concatenate([others[None], redrawn]))
    bits = np.clip(-shares / math.log(2), 0, most)
    tail = (1 - confidence) / 2
    low, high = np.quantile(bits[1:], [tail, 1 - tail])
    best = float(bits[0])
    interval = (min(float(low), best), max(float(high), best))
    return Exposure(best, interval, most, confidence, METHOD)


def log_share(loss: float, samples: Losses) -> Losses:
    """(samples,) log P[X <= loss] under the skew-normal law with the moments of each row."""
    mean, deviation = samples.mean(axis=1), np.maximum(samples.std(axis=1), 1e-12)
    skew = np.mean(((samples - mean[:, None]) / deviation[:, None]) ** 3, axis=1)
    skew = np.clip(skew, -0.98, 0.98)  # the law has no more
    power = np.abs(skew) ** (2 / 3)
    delta = np.sign(skew) * np.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3)))
    scale = deviation / np.sqrt(1 - 2 * delta**2 / math.pi)
    location = mean - scale * delta * math.sqrt(2 / math.pi)
    shape = delta / np.sqrt(np.maximum(1e-12, 1 - delta**2))
    with np.errstate(divide="ignore"):
        found = stats.skewnorm.logcdf(loss, shape, location, scale)
    result: Losses = np.maximum(np.nan_to_num(found, nan=_LOWEST, neginf=_LOWEST), _LOWEST)
    return result
