"""What a run on a timeline has of its own: activity by round, evaluation by period."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.server.evaluation import Evaluator
from sottovoce.simulations.continual import ContinualPopulation, timeline_of
from sottovoce.simulations.population import Population

OVER_TIME = "_all_periods"

Activity = NDArray[np.unsignedinteger]


def activity_of(population: Population) -> Activity | Callable[[int], Activity]:
    """(devices,) activity, or on a timeline a function from the round to it."""
    if not isinstance(population, ContinualPopulation):
        return population.activity
    return lambda server_round: population.at_round(server_round).activity


class TimelineEvaluator:
    """Metrics on what held-out devices say in the period of a round, the ones without suffix, and
    on what they say over the whole timeline (suffix `_all_periods`).

    `make`: an evaluator of a population. `round_of`: the round in progress, 0 before the first.
    """

    def __init__(
        self,
        population: ContinualPopulation,
        make: Callable[[Population], Evaluator],
        round_of: Callable[[], int],
    ) -> None:
        self.population, self.make, self.round_of = population, make, round_of
        self._now: tuple[int, Evaluator] | None = None
        self._always: Evaluator | None = None
        if population.held_out:
            self._always = make(population)
            self._always.levels = None

    def __call__(self, parameters: dict[str, Tensor]) -> dict[str, Any]:
        period = self.population.timeline.period_of(self.round_of())
        if self._now is None or self._now[0] != period:
            self._now = (period, self.make(self.population.at(period)))
        found = self._now[1](parameters)
        if self._always is not None:
            whole = self._always(parameters)
            found |= {name + OVER_TIME: value for name, value in whole.items()}
        return found


def make_evaluator(
    population: Population,
    make: Callable[[Population], Evaluator],
    round_of: Callable[[], int],
) -> Evaluator | TimelineEvaluator:
    """What measures a run's models, by period where there is a timeline."""
    if isinstance(population, ContinualPopulation):
        return TimelineEvaluator(population, make, round_of)
    return make(population)


def round_facts(
    population: Population, *, projection: bool = False
) -> Callable[[int], dict[str, Any]]:
    """What each round's record says of the run it is from: its period, where there is a timeline,
    and whether its epsilon is that of a projection.
    """
    timeline = timeline_of(population)
    marks: dict[str, Any] = {"projection": True} if projection else {}
    if timeline is None:
        return lambda server_round: marks
    return lambda server_round: {"period": timeline.period_of(server_round), **marks}
