"""Activity: how many examples each device holds, as a public log-normal model.

Activity is log-normal with X >= 0.5, rounded to n >= 1 and capped: the discretised law that fits
logs of assistants, forums and chats better than Zipf's. The law is held as a table of 2**20
quantiles; a device's activity is the entry that the top 20 bits of hash(seed, device) select. So
10 million devices cost one gather, and the expected number of devices per level is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.simulations.hashing import draws, stream
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels

TABLE_BITS = 20
CHUNK = 1 << 16  # devices hashed at once: the scratch arrays stay in cache

# (mu, sigma) by maximum likelihood on real logs: samples per user, n >= 1
PRESETS: dict[str, tuple[float, float]] = {
    "assistant": (2.3, 1.3),
    "forum": (1.24, 1.54),
    "chat": (2.65, 2.24),
    "reddit": (2.79, 1.22),
}


@dataclass(frozen=True)
class LogNormalActivity:
    """Activity n = min(round(exp(mu + sigma * Z)), max_activity), Z normal, given that n >= 1."""

    mu: float = 2.3
    sigma: float = 1.3
    max_activity: int = 10_000

    def __post_init__(self) -> None:
        if not math.isfinite(self.mu) or not 0 < self.sigma < math.inf:
            raise ConfigError(
                f"mu={self.mu} sigma={self.sigma}: mu must be finite and sigma above 0:"
                " set population.mu and population.sigma"
            )
        if self._normal_cdf(math.log(0.5)) > 0.999:
            raise ConfigError(
                f"mu={self.mu} sigma={self.sigma} leaves hardly a device with an example:"
                " set a larger population.mu"
            )
        if not 1 <= self.max_activity <= 1_000_000:
            raise ConfigError(
                f"max_activity={self.max_activity} must lie between 1 and 1000000:"
                " set population.max_activity"
            )

    @cached_property
    def table(self) -> NDArray[np.unsignedinteger[Any]]:
        """(2**20,) the quantiles of activity, ascending; uint16 where the cap allows."""
        size = 1 << TABLE_BITS
        up_to = np.array([round(size * self.share_up_to(n)) for n in range(self.max_activity)])
        up_to = np.append(up_to, size)  # the cap takes what is left of the tail
        kind = np.uint16 if self.max_activity < 1 << 16 else np.uint32
        return np.repeat(np.arange(1, self.max_activity + 1, dtype=kind), np.diff(up_to))

    def share_up_to(self, n: int) -> float:
        """Probability that an uncapped device has at most `n` examples."""
        empty = self._normal_cdf(math.log(0.5))
        return (self._normal_cdf(math.log(n + 0.5)) - empty) / (1 - empty)

    def _normal_cdf(self, logarithm: float) -> float:
        return 0.5 * (1 + math.erf((logarithm - self.mu) / (self.sigma * math.sqrt(2))))

    def of(self, first: int, devices: int, seed: int) -> NDArray[np.unsignedinteger[Any]]:
        """(devices,) activity of the devices with ids `first`, `first + 1`, ...

        A pure function of (model, seed, id). Two or four bytes a device; 10 million take about a
        quarter of a second.
        """
        table, key = self.table, stream(seed, "activity")
        activity = np.empty(devices, dtype=table.dtype)
        for start in range(0, devices, CHUNK):
            stop = min(start + CHUNK, devices)
            bits = draws(key, np.arange(first + start, first + stop, dtype=np.uint64))
            activity[start:stop] = table[(bits >> np.uint64(64 - TABLE_BITS)).astype(np.intp)]
        return activity

    def expected_level_counts(self, devices: int) -> NDArray[np.float64]:
        """(MAX_LEVEL + 1,) expected devices at each level: a public figure, no data is read."""
        share = np.bincount(activity_levels(self.table), minlength=MAX_LEVEL + 1) / len(self.table)
        return share * devices


def activity_model(
    preset: str, mu: float | None, sigma: float | None, max_activity: int
) -> LogNormalActivity:
    """The preset's model with `mu` and `sigma` in the place of its own where they are given."""
    if preset not in PRESETS:
        raise ConfigError(
            f"unknown activity preset '{preset}': set population.preset to one of"
            f" {', '.join(PRESETS)}, or population.mu and population.sigma"
        )
    own_mu, own_sigma = PRESETS[preset]
    return LogNormalActivity(
        own_mu if mu is None else mu, own_sigma if sigma is None else sigma, max_activity
    )
