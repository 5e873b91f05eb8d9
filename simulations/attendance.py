"""Who of a sampled cohort takes part in a round, and with how much of its work.

The coordinator asks, conditions decide: a device may be out of reach, break off, or be late. Late
ones are left out, or hand in the local steps that fit. Nobody is left out for being slower than
*others*: a cut-off after the first so many replies is sampling that no accountant can model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.cohort import Draw
from sottovoce.client.fleet import ABSENCES, PARTIAL, FleetReply, LocalTraining
from sottovoce.simulations.conditions import Conditions, Work, check_partial_work


@dataclass(frozen=True)
class Attendance:
    """Conditions at work on a fleet. `work`: what each round asks of a device.

    *Guarantee*: a device's attendance and number of local steps depend on (seed, device, round) and
    its activity level, on nothing else. Noise that devices add is never partly missing: with
    example-level privacy a late device is left out (`check_partial_work`), so the coordinator,
    which tops noise up by the levels of devices in the sum, knows what each of them added.
    """

    conditions: Conditions
    work: Work

    def apply(
        self, cohort: list[Draw], server_round: int
    ) -> tuple[list[Draw], dict[str, int]]:
        """The devices that hand something in, most work first, and counts of the others.

        Counts: `unavailable`, `failed` and `late` devices, which are left out, and `partial` ones,
        which are in with some of their steps.
        """
        devices = np.array([draw.device for draw in cohort], dtype=np.int64)
        levels = np.array([draw.level for draw in cohort], dtype=np.int64)
        away = ~self.conditions.available(devices, server_round)
        failed = ~away & self.conditions.fails(devices, server_round)
        allowed = self._steps_in_time(devices, levels, server_round)
        here = ~away & ~failed
        late = here & (allowed == 0)
        kept, partial = [], 0
        for place in np.flatnonzero(here & ~late).tolist():
            draw = cohort[place]
            steps = draw.steps[: int(allowed[place])] if allowed[place] > 0 else draw.steps
            partial += len(steps) < len(draw.steps)
            kept.append(replace(draw, steps=steps))
        kept.sort(key=lambda draw: (-len(draw.steps), -draw.rows, draw.device))
        left_out = (int(away.sum()), int(failed.sum()), int(late.sum()))
        return kept, {**dict(zip(ABSENCES, left_out, strict=True)), PARTIAL: partial}

    def _steps_in_time(
        self, devices: NDArray[np.int64], levels: NDArray[np.int64], server_round: int
    ) -> NDArray[np.int64]:
        """(devices,) local steps before the deadline; -1 for all, 0 for a device left out."""
        settings = self.conditions.settings
        found = np.full(len(devices), -1, dtype=np.int64)
        if settings.deadline_s is None:
            return found
        kinds = self.conditions.speed_class(devices)
        jitter = self.conditions.jitter(devices, server_round)
        for level in np.unique(levels).tolist():
            seconds = np.array(self.conditions.class_seconds(self.work, level))
            at = np.flatnonzero(levels == level)
            computing, transfer = (seconds[kinds[at]] * jitter[at, None]).T
            steps = np.zeros(len(at), dtype=np.int64)
            if settings.partial_work:
                of_one = computing / self.work.steps(level)
                steps = np.floor((settings.deadline_s - transfer) / of_one).astype(np.int64)
            whole = computing + transfer <= settings.deadline_s
            found[at] = np.where(whole, -1, np.maximum(steps, 0))
        return found


def noted(reply: FleetReply, counts: dict[str, int]) -> FleetReply:
    """The reply with those who were left out, so that all who were asked are accounted for."""
    reply.dropped += sum(counts.get(name, 0) for name in ABSENCES)
    reply.totals |= {name: float(count) for name, count in counts.items()}
    return reply


def attendance(
    conditions: Conditions, training: LocalTraining, payload_bytes: float
) -> Attendance | None:
    """What a fleet needs of the conditions; None where every device answers with all its work.

    `payload_bytes`: of the trained parameters, as they travel each way.
    """
    if conditions.lossless:
        return None
    check_partial_work(conditions, training.example is not None)
    return Attendance(conditions, Work(training.plan, payload_bytes, payload_bytes))
