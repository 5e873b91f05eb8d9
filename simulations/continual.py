"""A population on a timeline: in each period, only what devices hold then.

    arrivals      a source tells how many examples arrive on a device in each period, and hands
                  out example k of (device, period)
    a period      a view whose `activity` counts the window's examples and whose `examples` maps
                  numbers within the window to (period of arrival, k); nothing else can be read

Device ids are the same in every period, so that participation is counted and noise is keyed as in a
static run. A device without examples in a window has activity 0 there: no sampler draws it. Of all
periods only the one in use has an array, of 2 or 4 bytes a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import RunError
from sottovoce.client.examples import Examples
from sottovoce.simulations.arrival_sources import Source, make_source, regrouped
from sottovoce.simulations.population import Population
from sottovoce.simulations.timeline import Arrival, Timeline
from sottovoce.strategies.counts import LevelCounts, exact_counts
from sottovoce.strategies.levels import activity_levels

Ids = NDArray[np.int64]


class ContinualPopulation(Population):
    """`base` on a `timeline`. Ask `at(period)` or `at_round(round)` for what can be read."""

    def __init__(self, base: Population, timeline: Timeline, arrival: Arrival) -> None:
        self.base, self.timeline, self.arrival = base, timeline, arrival
        self.source: Source = make_source(base, timeline, arrival)
        self.name, self.words, self.schema = base.name, base.words, base.schema
        self.held_out, self.public_words = base.held_out, base.public_words
        self._view: PeriodView | None = None

    def __len__(self) -> int:
        return len(self.base)

    def at(self, period: int) -> PeriodView:
        """The population in `period` 0, 1, ...; the last one asked for is kept."""
        if self._view is None or self._view.period != period:
            self._view = PeriodView(self, period)
        return self._view

    def at_round(self, server_round: int) -> PeriodView:
        return self.at(self.timeline.period_of(server_round))

    def examples(self, devices: Ids, indices: Sequence[Ids] | None = None) -> Examples:
        raise self._undated()

    def held_out_devices(self, limit: int | None = None) -> Examples:
        """Examples of (at most `limit`) held-out devices over all periods, in order of arrival."""
        return self.source.held_out(range(self.timeline.periods), limit)

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        """None: those of training devices belong to a period each."""
        return None

    def level_counts(self, period: int) -> LevelCounts | None:
        """Devices by level that are publicly expected in `period`, None where nothing is public."""
        return self.source.level_counts(period)

    def describe(self) -> dict[str, Any]:
        facts = self.base.describe()
        plan = self.timeline
        return facts | {
            "timeline": f"{plan.periods} periods of {plan.rounds_per_period} rounds; an example is"
            f" deleted {plan.retention} periods after the one of its arrival began",
            "arrivals": self.source.describe(),
        }

    def _undated(self) -> RunError:
        return RunError(
            f"population {self.name!r} is on a timeline and has no examples but those of a period:"
            " use timeline=static"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "activity":  # fails closed: whoever forgets the period gets nothing
            raise self._undated()
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class PeriodView(Population):
    """What the devices of `whole` hold in one period.

    `activity`: (devices,) examples in the window, 0 where there are none; computed when asked for.
    """

    def __init__(self, whole: ContinualPopulation, period: int) -> None:
        self.whole, self.period = whole, period
        self.window = whole.timeline.window(period)
        self.name, self.words, self.schema = whole.name, whole.words, whole.schema
        self.held_out, self.public_words = whole.held_out, whole.public_words

    def __getattr__(self, name: str) -> Any:
        if name != "activity":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.activity = self.whole.source.activity(self.window)
        self.activity.flags.writeable = False
        return self.activity

    def __len__(self) -> int:
        return len(self.whole)

    def expect(self, devices: Ids) -> None:
        """Have all examples of `devices` read meanwhile, in the window or not."""
        self.whole.base.expect(devices)

    def examples(self, devices: Ids, indices: Sequence[Ids] | None = None) -> Examples:
        """Examples of training devices that are in the window: all, or numbers `indices[k]`.

        Number 0 is the oldest one that is still kept. Raises IndexError for an unknown device, or
        a number beyond the window's: what was deleted has none.
        """
        devices = np.asarray(devices, dtype=np.int64)
        if len(devices) and not 0 <= devices.min() <= devices.max() < len(self):
            raise IndexError(f"a device is not among the {len(self)} training devices")
        ends = self._ends(devices)
        held = ends[:, -1]
        if indices is None:
            counts = held
            numbers = np.arange(held.sum()) - np.repeat(np.cumsum(held) - held, held)
        else:
            counts = np.array([len(numbers) for numbers in indices], dtype=np.int64)
            numbers = np.concatenate([np.empty(0, dtype=np.int64), *indices])
        owner = np.repeat(np.arange(len(devices)), counts)
        if np.any((numbers < 0) | (numbers >= held[owner])):
            raise IndexError("an example number is beyond what its device holds in the period")
        slot = (numbers[:, None] >= ends[owner]).sum(axis=1)
        place = numbers - np.where(slot > 0, ends[owner, slot - 1], 0)
        order = np.lexsort((np.arange(len(slot)), slot, owner))
        found = self.whole.source.read(
            devices[owner[order]], self.window[0] + slot[order], place[order]
        )
        return regrouped(found, np.argsort(order), counts)

    def _ends(self, devices: Ids) -> Ids:
        """(devices, periods of the window) examples that arrived by the end of each of them."""
        arrived = [self.whole.source.arrived(devices, period) for period in self.window]
        return np.cumsum(np.stack(arrived, axis=1), axis=1)

    def held_out_devices(self, limit: int | None = None) -> Examples:
        """What (at most `limit`) held-out devices say in this period; some may say nothing."""
        return self.whole.source.held_out(range(self.period, self.period + 1), limit)

    def held_out_activity(self, limit: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """(devices,) examples that each of them holds in the window."""
        return self.whole.source.held_out_activity(self.window, limit)

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        """Held-out examples of training devices, of this period where the source knows it."""
        return self.whole.source.held_out_examples(self.period, limit)

    def expected_level_counts(self) -> NDArray[np.float64] | None:
        known = self.whole.level_counts(self.period)
        return None if known is None else np.array([known.counts[n] for n in sorted(known.counts)])

    def exact_level_counts(self) -> LevelCounts:
        """Devices by level as they are, those without examples left out: private."""
        return exact_counts(self.present_levels()[1])

    def present_levels(self) -> tuple[Ids, NDArray[np.uint8]]:
        """Ids of the devices that hold an example, and their levels."""
        present = np.flatnonzero(self.activity)
        return present, activity_levels(self.activity[present])

    def describe(self) -> dict[str, Any]:
        return self.whole.describe() | {"period": self.period}


def on_timeline(
    base: Population, timeline: Timeline | None, arrival: Arrival
) -> Population:
    """`base` on a timeline, or as it is where there is none."""
    return base if timeline is None else ContinualPopulation(base, timeline, arrival)


def timeline_of(population: Population) -> Timeline | None:
    """The timeline that a population is on, None for a static one."""
    return population.timeline if isinstance(population, ContinualPopulation) else None
