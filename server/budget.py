"""The running cost of a run, and when it must stop."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sottovoce.privacy.accounting.events import OBSERVERS, Event, GaussianEvent, Observer
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.accounting.tracker import EpsilonTracker
from sottovoce.strategies.noised_sum import NoisedSum

OBSERVER: dict[str, Observer] = {"device": "release", "example": "server"}


def touched(ledger: Ledger, unit: str) -> bool:
    """Whether anything that the unit's observer sees was released about `unit` so far.

    An accountant calls a unit unprotected that no event protects; before a run's first event of a
    kind it is untouched.
    """
    seen = OBSERVERS[: OBSERVERS.index(OBSERVER[unit]) + 1]
    return any(
        event.unit == unit and (isinstance(event, GaussianEvent) or event.observer in seen)
        for event in ledger.events
    )


class RunBudget:
    """Epsilon so far for each protected unit, and the limits that end a run.

    `deltas`: by unit. `limits`: `max_epsilon` by unit, None for no limit. Device-level epsilon is
    stated for observer `release`, example-level for `server`.
    """

    def __init__(
        self, ledger: Ledger, deltas: Mapping[str, float], limits: Mapping[str, float | None]
    ) -> None:
        self.deltas, self.limits = dict(deltas), dict(limits)
        self._seen = 0
        self._trackers = {
            unit: EpsilonTracker(delta, unit=unit, observer=OBSERVER[unit])
            for unit, delta in deltas.items()
        }
        self._catch_up(ledger)

    def spent(self, ledger: Ledger) -> dict[str, float | None]:
        """`epsilon_device` and `epsilon_example` where they are claimed; None for infinity."""
        self._catch_up(ledger)
        found = {}
        for unit, tracker in self._trackers.items():
            value = tracker.epsilon() if touched(ledger, unit) else 0.0
            found[f"epsilon_{unit}"] = value if math.isfinite(value) else None
        return found

    def exceeded_by(self, strategy: NoisedSum) -> str | None:
        """Why the next round may not run: it could pass a limit. None if it may."""
        self._catch_up(strategy.ledger)  # a resumed run may have booked lost rounds
        ahead: list[Event] = strategy.events_ahead()
        for unit, limit in self.limits.items():
            planned = [event for event in ahead if event.unit == unit]
            if limit is not None and self._trackers[unit].would_exceed(planned, limit):
                return (
                    f"privacy.{unit}.max_epsilon={limit:g} would be passed by another round: "
                    "the run ends here, with the model so far"
                )
        return None

    def _catch_up(self, ledger: Ledger) -> None:
        events = list(ledger.events)
        for event in events[self._seen :]:
            for unit, tracker in self._trackers.items():
                if event.unit == unit:
                    tracker.add(event)
        self._seen = len(events)
