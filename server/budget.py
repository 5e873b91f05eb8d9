"""The running cost of a run, and when it must stop."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sottovoce.privacy.events import Event
from sottovoce.privacy.ledger import Ledger
from sottovoce.privacy.tracker import EpsilonTracker
from sottovoce.strategies.noised_sum import NoisedSum

OBSERVER = {"device": "release", "example": "server"}


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
        found = {f"epsilon_{unit}": t.epsilon() for unit, t in self._trackers.items()}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}

    def exceeded_by(self, strategy: NoisedSum) -> str | None:
        """Why the next round may not run: it could pass a limit. None if it may."""
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
