"""Where a timeline's examples come from: generated for their period, or dealt out of real data.

generated   example k of (device, period) has a number of its own, and intents whose popularity
            drifts: log w_i(t) = log w_i(t - 1) + drift * Z, the same for all devices
real data   order=lines: line j of a device's n comes in period floor(j P / n), so that a device's
            lines in their order are spread evenly; order=shuffled: each in a period by hash
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from sottovoce.client.examples import Examples
from sottovoce.simulations.arrivals import Arrivals
from sottovoce.simulations.assistant import WATCHED_EXAMPLES, AssistantPopulation
from sottovoce.simulations.hashing import draws, stream, uniforms
from sottovoce.simulations.population import Population
from sottovoce.simulations.timeline import Arrival, Timeline
from sottovoce.strategies.counts import LevelCounts, exact_counts
from sottovoce.strategies.levels import activity_levels

Ids = NDArray[np.int64]
_PLACES = np.int64(1 << 24)  # numbers that a period has room for


class Source(ABC):
    """Examples by (device, period of arrival, place among that period's)."""

    @abstractmethod
    def arrived(self, devices: Ids, period: int) -> Ids:
        """(devices,) examples that arrive on training devices in `period`."""

    @abstractmethod
    def activity(self, window: range) -> NDArray[np.unsignedinteger[Any]]:
        """(all training devices,) examples that arrive in the periods of `window`."""

    @abstractmethod
    def read(self, owners: Ids, periods: Ids, places: Ids) -> Examples:
        """One example for each (device, period, place); a device's are together, by period."""

    @abstractmethod
    def held_out(self, periods: range, limit: int | None) -> Examples:
        """What held-out devices say in `periods`, some of them nothing."""

    @abstractmethod
    def held_out_activity(
        self, window: range, limit: int | None
    ) -> NDArray[np.unsignedinteger[Any]]:
        """(held-out devices,) examples that arrive on each in the periods of `window`."""

    @abstractmethod
    def held_out_examples(self, period: int, limit: int | None) -> Examples | None:
        """Held-out examples of training devices."""

    @abstractmethod
    def level_counts(self, period: int) -> LevelCounts | None:
        """Devices by level as publicly expected, None where that is not known."""

    @abstractmethod
    def describe(self) -> str: ...


def make_source(base: Population, timeline: Timeline, arrival: Arrival) -> Source:
    """The source of a population: generated where it can be, else its examples dealt out."""
    if isinstance(base, AssistantPopulation):
        return GeneratedSource(base, timeline, arrival)
    return DealtSource(base, timeline, arrival)


class GeneratedSource(Source):
    """Examples that an `AssistantPopulation` generates for their period."""

    def __init__(self, base: AssistantPopulation, timeline: Timeline, arrival: Arrival) -> None:
        self.base, self.arrival = base, arrival
        self.arrivals = Arrivals(timeline, arrival, base.seed)
        shape = (timeline.periods, len(base.schema.intents))
        keys = draws(stream(base.seed, "drift"), np.arange(shape[0] * shape[1]))
        steps = arrival.drift * ndtri(np.clip(uniforms(keys), 1e-12, None)).reshape(shape)
        steps[0] = 0.0  # the first period is as in the static setting
        self.trend: NDArray[np.float64] = np.exp(np.cumsum(steps, axis=0))

    def arrived(self, devices: Ids, period: int) -> Ids:
        return self.arrivals.of(devices, self.base.activity[devices], period)

    def activity(self, window: range) -> NDArray[np.unsignedinteger[Any]]:
        return self.arrivals.window(0, self.base.activity, window[-1])

    def read(self, owners: Ids, periods: Ids, places: Ids) -> Examples:
        """Also of held-out devices, whose ids follow, and beyond what arrived."""
        new = np.flatnonzero(np.diff(owners, prepend=-1) | np.diff(periods, prepend=-1))
        counts = np.diff(np.append(new, len(owners)))
        trend = self.trend[periods[new]] if self.arrival.drift else None
        return self.base.generate(owners[new], counts, periods * _PLACES + places, trend)

    def held_out(self, periods: range, limit: int | None) -> Examples:
        base, usual = self.base, self.base.held_out_activity(limit)
        ids = np.arange(len(base), len(base) + len(usual), dtype=np.int64)
        most = -(-base.max_held_out_examples // len(periods))
        counts = np.stack([self.arrivals.of(ids, usual, p) for p in periods], axis=1)
        return self._first(ids, np.minimum(counts, most), periods)

    def held_out_activity(
        self, window: range, limit: int | None
    ) -> NDArray[np.unsignedinteger[Any]]:
        usual = self.base.held_out_activity(limit)
        return self.arrivals.window(len(self.base), usual, window[-1])

    def held_out_examples(self, period: int, limit: int | None) -> Examples | None:
        ids = self.base.watched()
        beyond = self.arrived(ids, period)
        places = (beyond[:, None] + np.arange(WATCHED_EXAMPLES)).ravel()[:limit]
        owners = np.repeat(ids, WATCHED_EXAMPLES)[:limit]
        found = self.read(owners, np.full(len(owners), period), places)
        return regrouped(found, None, np.unique(owners, return_counts=True)[1])

    def level_counts(self, period: int) -> LevelCounts | None:
        return self.arrivals.level_counts(self.base.model, len(self.base), period)

    def describe(self) -> str:
        told = self.arrival
        return (
            f"a window's worth in the mean is the static activity; variation {told.variation:g},"
            f" {told.late:.0%} of devices join late, {told.leave:.0%} fall silent after each"
            f" period, intents drift by {told.drift:g}"
        )

    def _first(self, ids: Ids, counts: Ids, periods: range) -> Examples:
        """The first `counts`, (devices, periods), examples of each."""
        each = counts.ravel()
        owners = np.repeat(np.repeat(ids, len(periods)), each)
        when = np.repeat(np.tile(np.asarray(periods, dtype=np.int64), len(ids)), each)
        places = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
        return regrouped(self.read(owners, when, places), None, counts.sum(axis=1))


class DealtSource(Source):
    """The examples of any population, each of which arrives in one period.

    A period's counts are as public as the sizes of devices: exact where the population says that
    activity is public, unknown otherwise.
    """

    def __init__(self, base: Population, timeline: Timeline, arrival: Arrival) -> None:
        self.base, self.periods, self.order = base, timeline.periods, arrival.order
        self.timeline = timeline
        facts = base.describe()
        self.public = bool(facts.get("activity_is_public"))
        self._key = stream(int(facts.get("seed") or 0), "period of arrival")

    def arrived(self, devices: Ids, period: int) -> Ids:
        sizes = self.base.activity[devices].astype(np.int64)
        if self.order == "lines":
            return self._first_of(sizes, period + 1) - self._first_of(sizes, period)
        whens = self._whens(devices, sizes)
        owner = np.repeat(np.arange(len(devices)), sizes)
        return np.bincount(owner[whens == period], minlength=len(devices)).astype(np.int64)

    def activity(self, window: range) -> NDArray[np.unsignedinteger[Any]]:
        base = self.base
        found = np.zeros(len(base), dtype=base.activity.dtype)
        for part in _parts(base.activity):
            ids = np.arange(part.start, part.stop, dtype=np.int64)
            if self.order == "lines":
                sizes = base.activity[part].astype(np.int64)
                held = self._first_of(sizes, window.stop) - self._first_of(sizes, window.start)
            else:
                held = np.sum([self.arrived(ids, period) for period in window], axis=0)
            found[part] = held
        return found

    def read(self, owners: Ids, periods: Ids, places: Ids) -> Examples:
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        devices = owners[starts]
        sizes = self.base.activity[devices].astype(np.int64)
        at = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(owners))))
        if self.order == "lines":
            numbers = self._first_of(sizes[at], periods) + places
        else:
            numbers = self._numbered(devices, sizes, at, periods, places)
        return self.base.examples(devices, np.split(numbers, starts[1:]))

    def held_out(self, periods: range, limit: int | None) -> Examples:
        found = self.base.held_out_devices(limit)
        sizes = np.diff(found.device_offsets)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        when = (np.arange(len(found)) - found.device_offsets[owner]) * self.periods // sizes[owner]
        kept = np.flatnonzero((when >= periods.start) & (when < periods.stop))
        return regrouped(found.take(kept), None, np.bincount(owner[kept], minlength=len(sizes)))

    def held_out_activity(
        self, window: range, limit: int | None
    ) -> NDArray[np.unsignedinteger[Any]]:
        sizes = self.base.held_out_activity(limit).astype(np.int64)
        held = self._first_of(sizes, window.stop) - self._first_of(sizes, window.start)
        return held.astype(np.uint32)

    def held_out_examples(self, period: int, limit: int | None) -> Examples | None:
        return self.base.held_out_examples(limit)

    def level_counts(self, period: int) -> LevelCounts | None:
        if not self.public:
            return None
        held = self.activity(self.timeline.window(period))
        return exact_counts(activity_levels(held[held > 0]), source="model")

    def describe(self) -> str:
        if self.order == "lines":
            return "each device's lines, in their order, spread evenly over the periods"
        return "each line in a period by hash"

    def _first_of(self, sizes: Ids, period: Ids | int) -> Ids:
        """The first of `sizes` lines that comes in `period` or later: ceil(period n / P)."""
        return -(-(sizes * period) // self.periods)

    def _whens(self, devices: Ids, sizes: Ids) -> Ids:
        """Period of every example of `devices`, end to end."""
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        bits = draws(np.repeat(draws(self._key, devices), sizes), within)
        return ((bits >> np.uint64(32)).astype(np.int64) * self.periods) >> np.int64(32)

    def _numbered(
        self, devices: Ids, sizes: Ids, at: Ids, periods: Ids, places: Ids
    ) -> Ids:
        """Number of the `places`-th example that a device got in a period."""
        whens = self._whens(devices, sizes)
        owner = np.repeat(np.arange(len(devices)), sizes)
        order = np.argsort(owner * self.periods + whens, kind="stable")
        firsts = np.searchsorted((owner * self.periods + whens)[order], at * self.periods + periods)
        numbers: Ids = order[firsts + places] - (np.cumsum(sizes) - sizes)[at]
        return numbers


def regrouped(examples: Examples, rows: Ids | None, counts: Ids) -> Examples:
    """The examples, at `rows` where they are given, as those of devices with `counts` each."""
    if rows is not None and np.any(np.diff(rows) != 1):
        examples = examples.take(rows)
    return replace(examples, device_offsets=np.append(0, np.cumsum(counts)).astype(np.int64))


def _parts(activity: NDArray[np.unsignedinteger[Any]], most: int = 1 << 20) -> Iterable[slice]:
    """Consecutive devices with about `most` examples (or `most` devices) together."""
    start = 0
    while start < len(activity):
        ends = np.cumsum(activity[start : start + most], dtype=np.int64)
        stop = start + max(1, int(np.searchsorted(ends, most, side="right")))
        yield slice(start, min(stop, len(activity)))
        start = stop
