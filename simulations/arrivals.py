"""How many examples arrive on a generated device in each period: pure functions of hashes.

A device whose activity in the static setting is n has a window's worth of n in the mean: with
R = min(retention, periods) there arrive in period t

    floor(n / R * exp(s Z - s^2 / 2) + U),    Z normal, U uniform, fresh for (device, period)

examples, whose mean is n / R; none before the device joins nor after it falls silent. Nothing is
stored: the activity of a window is the sum of R arrays of counts, each a hash away.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from sottovoce.simulations.activity import CHUNK, LogNormalActivity
from sottovoce.simulations.hashing import draws, stream, uniforms
from sottovoce.simulations.timeline import Arrival, Timeline
from sottovoce.strategies.counts import LevelCounts, sampled_counts
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels

_TABLE_BITS = 12
REFERENCE = 1 << 17  # devices of the public model that are drawn to count its levels

Counts = NDArray[np.int64]


class Arrivals:
    """Arrivals on the devices of a generated population.

    `seed`: of the population. `name`: of the streams of draws, so that the reference devices of
    `level_counts` have arrivals of their own.
    """

    def __init__(self, timeline: Timeline, arrival: Arrival, seed: int, name: str = "") -> None:
        self.timeline, self.arrival = timeline, arrival
        self.spread = min(timeline.retention, timeline.periods)
        self._counts = stream(seed, f"arrivals{name}")
        self._joins, self._leaves = stream(seed, f"joins{name}"), stream(seed, f"leaves{name}")
        places = (np.arange(1 << _TABLE_BITS) + 0.5) / (1 << _TABLE_BITS)
        factors = np.exp(arrival.variation * ndtri(places))
        self._factors: NDArray[np.float64] = factors / factors.mean()

    def of(
        self, devices: Counts, activity: NDArray[np.integer[Any]], period: int
    ) -> Counts:
        """(devices,) examples that arrive in `period`. `activity`: theirs in the static setting."""
        bits = draws(draws(self._counts, devices), period)
        factor = self._factors[(bits >> np.uint64(64 - _TABLE_BITS)).astype(np.intp)]
        low = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
        found = np.floor(activity / self.spread * factor + low).astype(np.int64)
        found[~self._here(devices, period)] = 0
        return found

    def window(
        self, first: int, activity: NDArray[np.integer[Any]], period: int
    ) -> NDArray[np.unsignedinteger[Any]]:
        """(devices,) examples held in `period` by the devices `first`, `first + 1`, ...

        2 or 4 bytes a device, and scratch arrays that stay in cache.
        """
        total = np.empty(len(activity), dtype=np.uint32)
        for start in range(0, len(activity), CHUNK):
            part = activity[start : start + CHUNK]
            ids = np.arange(first + start, first + start + len(part), dtype=np.int64)
            counts = [self.of(ids, part, then) for then in self.timeline.window(period)]
            total[start : start + len(part)] = np.sum(counts, axis=0)
        small = int(total.max(initial=0)) < 1 << 16
        return total.astype(np.uint16) if small else total

    def level_counts(self, model: LogNormalActivity, devices: int, period: int) -> LevelCounts:
        """Devices expected at each level in `period` by the public model; those without left out.

        Counted on reference devices, which are drawn from the model and are nobody's.
        """
        reference = Arrivals(self.timeline, self.arrival, 0, " of reference devices")
        held = reference.window(0, model.of(0, REFERENCE, -1), period)
        found = np.bincount(activity_levels(held[held > 0]), minlength=MAX_LEVEL + 1)
        return sampled_counts(found, REFERENCE, devices)

    def _here(self, devices: Counts, period: int) -> NDArray[np.bool_]:
        """Whether each device says something in `period`: it has joined and not fallen silent."""
        joined, left = self._joined(devices), self.arrival.leave
        here = joined <= period
        if left:
            stays = np.log1p(-uniforms(draws(self._leaves, devices))) / math.log1p(-left)
            here &= period <= joined + stays
        return here

    def _joined(self, devices: Counts) -> Counts:
        """(devices,) period in which each device joins."""
        share = uniforms(draws(self._joins, devices))
        if not self.arrival.late:
            return np.zeros(len(devices), dtype=np.int64)
        later = 1 + np.floor(share / self.arrival.late * (self.timeline.periods - 1))
        return np.where(share < self.arrival.late, later, 0).astype(np.int64)
