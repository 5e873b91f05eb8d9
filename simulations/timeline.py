"""The timeline of a continual run: periods of rounds, and how long a device keeps its examples.

In period t a device holds what arrived in periods t - retention + 1 to t; whatever is older was
deleted: nobody trains on it or reads it again. Activity, sampling rates and the accounting follow
the periods. A static run has no timeline: all examples are there from the first round to the last.

Source: the static and the continual setting of Dupuy et al. 2022, arXiv:2202.03925.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sottovoce.client.errors import ConfigError

NAMES = ("static", "continual")
ORDERS = ("lines", "shuffled")
MOST_PERIODS = 4096


@dataclass(frozen=True)
class Timeline:
    """`periods` of `rounds_per_period` rounds each; the last one goes on for as long as the run.

    `retention`: periods for which a device keeps an example, the one of its arrival included.
    """

    periods: int
    rounds_per_period: int
    retention: int

    def period_of(self, server_round: int) -> int:
        """Period 0, 1, ... of round 1, 2, ...; round 0, before training, is in period 0."""
        return min(max(server_round - 1, 0) // self.rounds_per_period, self.periods - 1)

    def window(self, period: int) -> range:
        """Periods whose arrivals devices still hold in `period`; IndexError beyond the last."""
        if not 0 <= period < self.periods:
            raise IndexError(f"period {period} is none of the timeline's {self.periods}")
        return range(max(0, period - self.retention + 1), period + 1)

    def rounds_in(self, period: int, rounds: int) -> int:
        """Rounds of a run of `rounds` that lie in `period`."""
        return sum(self.period_of(number) == period for number in range(1, rounds + 1))

    def first_round(self, period: int) -> int:
        return period * self.rounds_per_period + 1


@dataclass(frozen=True)
class Arrival:
    """When examples come, by the settings of the group `timeline`.

    Of a generated population: `variation`, standard deviation of the logarithm of a device's
    arrivals from period to period; `late`, share of devices that join after the first period;
    `leave`, share of them that fall silent for good after each period; `drift`, standard deviation
    of the step that the log popularity of each intent takes from period to period. Of real data:
    `order`, lines (a device's lines in their order, spread evenly over the periods) or shuffled
    (each line in a period by hash).
    """

    variation: float = 0.5
    late: float = 0.1
    leave: float = 0.03
    drift: float = 0.2
    order: str = "lines"

    def __post_init__(self) -> None:
        for name, most in (("variation", 3.0), ("drift", 3.0)):
            if not 0 <= getattr(self, name) <= most:
                _refuse(name, getattr(self, name), f"must lie between 0 and {most:g}")
        for name in ("late", "leave"):
            if not 0 <= getattr(self, name) < 1:
                _refuse(name, getattr(self, name), "must be at least 0 and below 1")
        if self.order not in ORDERS:
            _refuse("order", self.order, f"does not exist: choose {' or '.join(ORDERS)}")


def make_timeline(settings: Mapping[str, Any] | None, rounds: int) -> Timeline | None:
    """The timeline of a run of `rounds`, None where it is static or has a single period.

    `settings`: the group `timeline`; a run of an older version has none. Raises ConfigError for
    impossible values, and where the periods are over before the rounds are.
    """
    if settings is None or settings.get("name", "static") == "static":
        return None
    if settings["name"] not in NAMES:
        _refuse("name", settings["name"], f"does not exist: choose {' or '.join(NAMES)}")
    for name in ("periods", "retention", "rounds_per_period"):
        value = settings[name]
        if value is not None and not 1 <= value <= MOST_PERIODS:
            _refuse(name, value, f"must be a whole number from 1 to {MOST_PERIODS}")
    periods = int(settings["periods"])
    each = settings["rounds_per_period"] or math.ceil(rounds / periods)
    if rounds > periods * each:
        raise ConfigError(
            f"rounds={rounds} go on after timeline.periods={periods} of "
            f"timeline.rounds_per_period={each}: set rounds={periods * each}, or more periods"
        )
    arrival_of(settings)
    return None if periods == 1 else Timeline(periods, int(each), int(settings["retention"]))


def arrival_of(settings: Mapping[str, Any]) -> Arrival:
    """How examples arrive. ConfigError where a value is impossible."""
    return Arrival(**{name: settings[name] for name in vars(Arrival())})


def _refuse(name: str, value: object, why: str) -> None:
    raise ConfigError(f"timeline.{name}={value} {why}: set timeline.{name}")
