"""Epsilon while a run is under way: for the progress bar, and to stop before a budget is passed."""

from __future__ import annotations

from collections.abc import Iterable

from sottovoce.privacy.accounting.accountants import NEARLY, Source, check_delta, events_of, worst
from sottovoce.privacy.accounting.composition import Composition, Tally
from sottovoce.privacy.accounting.events import Event


class EpsilonTracker:
    """Epsilon of the worst activity level so far, for one unit and observer.

    One round more costs milliseconds, whatever the number of levels: of levels that changed only
    those that can be the worst are computed, on a grid just fine enough. In long runs the count of
    rounds is rounded up, by 0.05 % at most, so that most rounds find their figure computed already.

    *Guarantee*: `epsilon` is never too small, at most about 0.2 % too large; `would_exceed` is
    decided by the figure that is reported in the end.
    *Assumes*: every event of the run is added, those before a resume too.
    """

    def __init__(
        self,
        delta: float,
        *,
        unit: str = "device",
        observer: str = "release",
        events: Iterable[Event] = (),
    ) -> None:
        check_delta(delta)
        self.delta, self.unit, self.observer = delta, unit, observer
        self._tally = Tally(events)

    def add(self, event: Event) -> None:
        """Count an event that was appended to the ledger."""
        self._tally.add(event)

    def epsilon(self) -> float:
        """Epsilon spent so far."""
        return self._epsilon(self._tally, NEARLY)

    def would_exceed(self, planned: Source, max_epsilon: float) -> bool:
        """Whether releasing `planned` (an event or several) would pass `max_epsilon`."""
        tally = self._tally
        for event in events_of(planned):
            tally = tally.plus(event)
        if self._epsilon(tally, NEARLY) <= max_epsilon:
            return False
        return self._epsilon(tally, 0.0) > max_epsilon

    def _epsilon(self, tally: Tally, tolerance: float) -> float:
        found = tally.compositions(self.unit, self.observer)
        if tolerance:
            found = {place: rounded_up(steps) for place, steps in found.items()}
        return worst(found, self.delta, "pld", tolerance)[0]


def rounded_up(steps: Composition) -> Composition:
    """The same with counts above 2,048 raised to multiples of a power of two, by 0.05 % at most."""
    found = []
    for step, count in steps:
        grain = 1 << max((count >> 11).bit_length() - 1, 0)
        found.append((step, -(-count // grain) * grain))
    return tuple(found)
