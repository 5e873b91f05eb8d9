"""How many devices each activity level has, as far as a run with a device-level claim may know.

`model`    expected under a public model of activity: costs nothing
`noised`   a histogram with Gaussian noise: a release, with its event
`reported` devices by what they report, by randomised response (`sottovoce.strategies.reports`)
`exact`    the histogram itself: only where nothing is claimed for devices
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.events import GaussianEvent, RandomisedReport
from sottovoce.strategies.levels import MAX_LEVEL

PURPOSE = "activity histogram"
_LOG_RISK = 42.0  # ln of how unlikely a count above `most` is: about 10^18


@dataclass(frozen=True)
class LevelCounts:
    """Devices by level. `most`: numbers that the true counts stay below, but for 1 in 10^18.

    `least`: a level with fewer devices than this is not told apart from one without any.
    `events`: what knowing the counts cost.
    """

    source: Literal["model", "noised", "reported", "exact"]
    counts: dict[int, float]
    most: dict[int, int]
    least: float = 1.0
    events: tuple[GaussianEvent | RandomisedReport, ...] = ()

    @property
    def rounded(self) -> dict[int, int]:
        """Whole numbers for tables, empty levels left out."""
        return {level: round(count) for level, count in self.counts.items() if count >= 0.5}


def model_counts(expected: NDArray[np.float64]) -> LevelCounts:
    """Counts under a public model. `expected`: (levels,) devices. ConfigError where malformed."""
    if len(expected) > MAX_LEVEL + 1 or not (np.isfinite(expected).all() and (expected >= 0).all()):
        raise ConfigError(f"level counts must be at most {MAX_LEVEL + 1} finite numbers >= 0")
    counts = {level: float(count) for level, count in enumerate(expected)}
    most = {level: math.ceil(_poisson_quantile(count)) for level, count in counts.items()}
    return LevelCounts("model", counts, most)


def sampled_counts(found: NDArray[np.int64], drawn: int, devices: int) -> LevelCounts:
    """Counts under a public model from `found`, (levels,), of `drawn` devices that follow it.

    A true mean is above `found` + L + sqrt(2 L `found` + L^2) for one draw in e^L at most
    (Chernoff's bound on the lower tail), L = 43; `most` is what such a mean allows.
    """
    risk = _LOG_RISK + 1  # of two: the reference's chance and the population's
    counts = {level: float(n) * devices / drawn for level, n in enumerate(found)}
    means = {
        level: (n + risk + math.sqrt(2 * risk * n + risk**2)) * devices / drawn
        for level, n in enumerate(found.tolist())
    }
    most = {level: math.ceil(_poisson_quantile(mean)) for level, mean in means.items()}
    return LevelCounts("model", counts, most)


def exact_counts(
    levels: NDArray[np.uint8], source: Literal["exact", "model"] = "exact"
) -> LevelCounts:
    """The histogram of `levels`: (devices,). `source`: model where levels follow from public facts.
    """
    found = np.bincount(levels, minlength=MAX_LEVEL + 1)
    counts = {level: int(count) for level, count in enumerate(found)}
    return LevelCounts(source, {level: float(n) for level, n in counts.items()}, counts)


def noised_counts(
    levels: NDArray[np.uint8], generator: np.random.Generator, noise: float | None = None
) -> LevelCounts:
    """The histogram with Gaussian noise of standard deviation `noise`, in devices.

    The default is 10 devices, or 0.02 % of all where that is more.

    *Guarantee*: a Gaussian release of sensitivity 1 (a device counts once), unit device, relation
    add/remove, observer `release`; noise multiplier `noise`.
    *Assumes*: the number of devices is public.
    """
    deviation = max(10.0, 2e-4 * len(levels)) if noise is None else noise
    if not (math.isfinite(deviation) and deviation > 0):
        raise ConfigError(f"histogram noise={deviation} must be above 0 devices")
    exact = np.bincount(levels, minlength=MAX_LEVEL + 1)
    found = np.maximum(exact + deviation * generator.standard_normal(len(exact)), 0.0)
    counts = {level: float(count) for level, count in enumerate(found)}
    margin = deviation * math.sqrt(2 * _LOG_RISK)
    most = {level: math.ceil(count + margin) for level, count in counts.items()}
    event = GaussianEvent(noise_multiplier=deviation, purpose=PURPOSE, unit="device")
    return LevelCounts("noised", counts, most, least=4 * deviation, events=(event,))


def _poisson_quantile(mean: float) -> float:
    """What a count of mean `mean` exceeds with probability e^-42 at most (Bernstein)."""
    third = _LOG_RISK / 3
    return mean + third + math.sqrt(third**2 + 2 * mean * _LOG_RISK) if mean > 0 else 0.0
