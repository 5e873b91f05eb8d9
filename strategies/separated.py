"""Cohorts of devices that have rested: for claims that rest on who takes part when, not on secrecy.

No probability is promised, so none helps the accountant, and drawing is free to be convenient: a
cohort of fixed size, among those whom the participation schedule lets in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.strategies.counts import LevelCounts, model_counts
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels
from sottovoce.strategies.participation import Participation
from sottovoce.strategies.rates import ActivityWeight, check_cohort
from sottovoce.strategies.sampling import Sampler

if TYPE_CHECKING:
    from sottovoce.simulations.population import Population

_TRIES = 8


class SeparatedSampler(Sampler):
    """`cohort_size` devices a round among those that `participation` allows; fewer where no more
    are left.

    `levels`: (devices,) uint8; a device is drawn in proportion to `weight` of its level, without
    replacement. A cohort is a function of (seed, round, participation).

    *Guarantee*: none by itself; `participation` bounds how often and how closely a device comes.
    *Assumes*: levels are public, and are all that is known of a device here.
    """

    sampling = "none"

    def __init__(
        self,
        levels: NDArray[np.uint8],
        cohort_size: int,
        participation: Participation,
        *,
        weight: ActivityWeight | None = None,
        counts: LevelCounts | None = None,
        seed: int | None = None,
    ) -> None:
        check_cohort(cohort_size, len(levels))
        self.size, self.participation = int(cohort_size), participation
        self.weight = weight or ActivityWeight("uniform")
        self.levels = levels
        self._members = [
            np.flatnonzero(levels == level).astype(np.int32) for level in range(MAX_LEVEL + 1)
        ]
        self._weights = self._by_level()
        everyone = dict.fromkeys(range(MAX_LEVEL + 1), 1.0)
        super().__init__(len(levels), everyone, cohort_size, counts, seed)

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        generator, barred = self._generator(round, attempt), self.participation.barred(round)
        found = np.zeros(0, dtype=np.int64)
        for _ in range(_TRIES):
            missing = self.size - len(found)
            if missing == 0:
                break
            proposed = np.concatenate([found, self._proposed(generator, 2 * missing + 8)])
            _, first = np.unique(proposed, return_index=True)
            fresh = proposed[np.sort(first)]
            found = fresh[~np.isin(fresh, barred)][: self.size]
        else:
            found = np.concatenate([found, self._others(generator, found, barred)])
        return np.sort(found)

    def describe(self) -> dict[str, Any]:
        facts = {
            "weight": self.weight.weight,
            "min_separation": self.participation.separation,
            "max_participations": self.participation.limit,
        }
        return super().describe() | facts

    def _by_level(self) -> NDArray[np.float64]:
        """(levels,) weight of a device at each level, with the uniform mixture."""
        sizes = np.array([len(members) for members in self._members], dtype=np.float64)
        plain = np.array([self.weight.of(level) for level in range(MAX_LEVEL + 1)])
        mix = self.weight.uniform_mix
        found: NDArray[np.float64] = (1 - mix) * plain / (sizes @ plain) + mix / sizes.sum()
        return found

    def _proposed(self, generator: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Devices by weight, with replacement, in the order of their drawing."""
        totals = np.array([len(members) for members in self._members]) * self._weights
        levels = generator.choice(MAX_LEVEL + 1, size=size, p=totals / totals.sum())
        places = generator.random(size)
        drawn = np.zeros(size, dtype=np.int64)
        for level in np.unique(levels).tolist():
            members, here = self._members[level], levels == level
            at = np.minimum((places[here] * len(members)).astype(np.int64), len(members) - 1)
            drawn[here] = members[at]
        return drawn

    def _others(
        self, generator: np.random.Generator, found: NDArray[np.int64], barred: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """What is missing, from a list of all who may come: for when few are left."""
        free = np.ones(self.devices, dtype=bool)
        free[found] = False
        free[barred] = False
        left = np.flatnonzero(free)
        missing = min(self.size - len(found), len(left))
        chances = self._weights[self.levels[left]]
        keys = generator.exponential(size=len(left)) / np.maximum(chances, 1e-300)
        first: NDArray[np.int64] = left[np.argsort(keys, kind="stable")[:missing]]
        return first


def make_separated_sampler(
    strategy: Any,
    population: Population,
    cohort_size: int,
    schedule: Schedule,
    *,
    participation: Participation,
    source: NoiseSource,
) -> SeparatedSampler:
    """The sampler of a run whose claim rests on `schedule`. `strategy`: settings of that group.

    `strategy.sampler` says who is preferred, activity or nobody; `strategy.max_rate` has no
    meaning here. Raises ConfigError where the population is too small for cohort and schedule.
    """
    check_population(len(population), cohort_size, schedule)
    weight = ActivityWeight("uniform")
    if strategy.sampler == "activity":
        weight = ActivityWeight(
            strategy.activity_weight, strategy.activity_power, strategy.uniform_mix
        )
    expected = population.expected_level_counts()
    return SeparatedSampler(
        activity_levels(population.activity),
        cohort_size,
        participation,
        weight=weight,
        counts=None if expected is None else model_counts(expected),
        seed=int.from_bytes(source.generator("device sampling").bytes(16), "little"),
    )


def check_population(devices: int, cohort_size: int, schedule: Schedule) -> None:
    """Raise ConfigError unless `devices` can fill cohorts of `cohort_size` under `schedule`."""
    apart, rounds, most = schedule.min_separation, schedule.rounds, schedule.participations
    if cohort_size * apart > devices:
        raise ConfigError(
            f"cohort_size={cohort_size} with privacy.device.min_separation={apart} needs "
            f"{cohort_size * apart} devices, and there are {devices}: lower one of the two"
        )
    if rounds * cohort_size > devices * most:
        raise ConfigError(
            f"rounds={rounds} of cohort_size={cohort_size} need {rounds * cohort_size} "
            f"participations, and {devices} devices with at most {most} each give "
            f"{devices * most}: raise privacy.device.max_participations, or lower rounds or "
            f"cohort_size (at most {math.floor(devices * most / rounds)})"
        )
