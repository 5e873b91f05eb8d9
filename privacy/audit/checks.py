"""Checks of what every claim takes for granted: that noise, clipping and weights are as declared.

A membership attack cannot see noise that is used twice, or a sum that is divided by a secret
number. A check tests one such assumption on the releases of a run, and its false alarms are
controlled: `LEVEL` for all checks of a run together, far below the 5 % of bounds, because a flagged
check refutes a run however small the leak that an attack could show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

LEVEL = 1e-4  # chance that any check of a correct run is flagged


class Outcome(StrEnum):
    """FLAGGED: refuted. NOT_FLAGGED: it would have been, had the stated fault been there.
    CANNOT_TELL: it might have gone unseen. NOT_APPLICABLE: nothing to test.
    """

    FLAGGED = "FLAGGED"
    NOT_FLAGGED = "NOT FLAGGED"
    CANNOT_TELL = "CANNOT TELL"
    NOT_APPLICABLE = "NOT APPLICABLE"


@dataclass(frozen=True)
class Check:
    """One assumption, tested.

    `statistic`: what was measured, in the words of `measures`; `expected`: what it is in a correct
    run. `p_value`: chance of anything as far off in a correct run, at most. `resolves`: whether the
    `fault` would have been seen. `violates`: whether a claim falls with the assumption; else the
    audit of such a run is INVALID. `assumes`: what the p-value rests on. `why`: of a check that
    does not apply.
    """

    name: str
    sees: str
    measures: str
    fault: str
    assumes: str
    violates: bool = True
    statistic: float | None = None
    expected: float | None = None
    p_value: float | None = None
    resolves: bool = False
    why: str | None = None
    level: float = LEVEL
    unit: str = "device"
    observer: str = "release"

    @property
    def outcome(self) -> Outcome:
        if self.p_value is None:
            return Outcome.NOT_APPLICABLE
        if self.p_value <= self.level:
            return Outcome.FLAGGED
        return Outcome.NOT_FLAGGED if self.resolves else Outcome.CANNOT_TELL

    @property
    def flagged(self) -> bool:
        return self.outcome is Outcome.FLAGGED

    def inapplicable(self, why: str) -> Check:
        """The check of a run that it does not apply to."""
        return replace(self, why=why)

    def found(
        self, statistic: float, expected: float, p_value: float, *, resolves: bool,
        violates: bool | None = None,
    ) -> Check:
        """The check with its figures."""
        return replace(
            self, statistic=float(statistic), expected=float(expected),
            p_value=min(1.0, float(p_value)), resolves=bool(resolves),
            violates=self.violates if violates is None else violates,
        )

    def __str__(self) -> str:
        if self.p_value is None or self.statistic is None:
            return f"{self.name}: {self.outcome}, {self.why}"
        text = (f"{self.name}: {self.outcome}, {self.measures} {self.statistic:.3g} "
                f"(expected {self.expected:.3g}, p = {self.p_value:.2g})")
        if self.outcome is Outcome.CANNOT_TELL:
            return f"{text}; {self.fault} might go unseen here"
        return text

    def record(self) -> dict[str, Any]:
        """JSON values, for `audit.json`."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**finite, "verdict": str(self.outcome)}


def shared(checks: Sequence[Check]) -> tuple[Check, ...]:
    """The checks at the level that `LEVEL` leaves for each of those that apply."""
    applied = max(1, sum(check.p_value is not None for check in checks))
    return tuple(replace(check, level=LEVEL / applied) for check in checks)
