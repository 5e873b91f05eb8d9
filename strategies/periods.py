"""Sampling on a timeline: public rates that are constant for a period and change with the next.

A device's activity is that of its window, so its level and its rate change over the run. Rates of a
period rest on what is publicly known of that period: a model of activity, or a noised histogram,
one for each period, whose noise is so much more that all of them cost what one does in a static
run. Devices without an example in the window are in no cohort and in no count.

Source: the continual setting of Dupuy et al. 2022, arXiv:2202.03925.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.events import LevelEntry
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.strategies.counts import LevelCounts, noised_counts
from sottovoce.strategies.levels import MAX_LEVEL
from sottovoce.strategies.rates import ActivityWeight, LevelRates, Weight, rates_from_counts
from sottovoce.strategies.samplers import USUAL_CAP
from sottovoce.strategies.sampling import Sampler, chosen

if TYPE_CHECKING:
    from sottovoce.simulations.continual import ContinualPopulation

USUAL_NOISE = 10.0  # devices, on a count of a histogram, as in a static run; its share of all:
NOISE_SHARE = 2e-4


@dataclass(frozen=True)
class PeriodRates:
    """What is public of a period: `counts` of devices by level and the rates that follow."""

    counts: LevelCounts
    found: LevelRates

    @property
    def rates(self) -> dict[int, float]:
        return self.found.by_level

    @property
    def most_devices_by_level(self) -> dict[int, int]:
        return self.counts.most


class _PeriodSampler(Sampler):
    """One period's: every device that holds an example, at the rate of its level there."""

    sampling = "poisson"

    def __init__(
        self, devices: int, known: PeriodRates, ids: NDArray[np.int64],
        levels: NDArray[np.uint8], seed: int,
    ) -> None:
        super().__init__(devices, known.rates, known.found.expected_cohort, known.counts, seed)
        self._members = [
            ids[levels == level].astype(np.int32) for level in range(MAX_LEVEL + 1)
        ]

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        generator, drawn = self._generator(round, attempt), []
        for level, members in enumerate(self._members):
            size = generator.binomial(len(members), self.rates[level])
            drawn.append(members[chosen(generator, len(members), size)])
        return np.sort(np.concatenate(drawn).astype(np.int64))


class PeriodSampler(Sampler):
    """Poisson, at rates of each period. `known`: one entry for each period of the timeline.

    `rates` are the highest of all periods, level by level; `rates_at` those of a round.

    *Guarantee*: a device that holds an example in the period of a round is in its sample with
    probability `rates_at(round)[its level in that period]`, independently of all others and of
    other rounds; one that holds none is not. No level's rate is above that of the last level,
    `MAX_LEVEL`, in any period: whatever levels a device goes through, what it is subjected to costs
    no more than the row of that level, the Poisson-sampled Gaussian being monotone in its rate.
    *Assumes*: nobody sees who was sampled; the seed is secret and drawn afresh for a run; how much
    a device holds depends on its own data alone.
    """

    sampling = "poisson"

    def __init__(
        self,
        population: ContinualPopulation,
        known: Sequence[PeriodRates],
        weight: ActivityWeight,
        seed: int | None = None,
    ) -> None:
        self.population, self.known, self.weight = population, list(known), weight
        self.timeline = population.timeline
        _check(self.known)
        rates = {
            level: max(period.rates[level] for period in self.known)
            for level in range(MAX_LEVEL + 1)
        }
        expected = max(period.found.expected_cohort for period in self.known)
        super().__init__(len(population), rates, expected, _mean(self.known), seed)
        self._current: tuple[int, _PeriodSampler] | None = None

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        return self.at(round).sample(round, attempt)

    def at(self, round: int) -> Sampler:
        """The sampler of a round's period; the last one asked for is kept."""
        period = self.timeline.period_of(round)
        if self._current is None or self._current[0] != period:
            ids, levels = self.population.at(period).present_levels()
            found = _PeriodSampler(self.devices, self.known[period], ids, levels, self.seed)
            self._current = (period, found)
        return self._current[1]

    def rates_at(self, round: int) -> dict[int, float]:
        return self.known[self.timeline.period_of(round)].rates

    def plan(self, rounds: int) -> list[LevelEntry]:
        """A device that stays at its level meets each period's rate for that period's rounds."""
        return [
            (level, rate, self.timeline.rounds_in(period, rounds))
            for period, known in enumerate(self.known)
            for level, rate in sorted(known.rates.items())
        ]

    @property
    def parts(self) -> Sequence[PeriodRates]:
        return self.known

    def describe(self) -> dict[str, Any]:
        plan = self.timeline
        facts: dict[str, Any] = {
            "weight": self.weight.weight,
            "uniform_mix": self.weight.uniform_mix,
            "timeline": {
                "periods": plan.periods,
                "rounds_per_period": plan.rounds_per_period,
                "retention": plan.retention,
                "devices_by_level": [_texts(known.counts.rounded) for known in self.known],
                "rates": [_texts(known.rates) for known in self.known],
            },
        }
        if self.weight.weight == "power":
            facts["power"] = self.weight.power
        return super().describe() | facts


def make_period_sampler(
    strategy: Any,
    population: ContinualPopulation,
    cohort_size: float,
    *,
    source: NoiseSource,
    private: bool,
) -> PeriodSampler:
    """The sampler of a continual run. `strategy`: settings of that group.

    `private`: whether a device-level guarantee is claimed; counts are then public or noised.
    Raises ConfigError for samplers whose rates cannot follow the periods.
    """
    if strategy.sampler not in ("activity", "uniform"):
        raise ConfigError(
            f"strategy.sampler={strategy.sampler} has no rates that follow a timeline: choose "
            "activity or uniform"
        )
    kind: Weight = strategy.activity_weight if strategy.sampler == "activity" else "uniform"
    weight = ActivityWeight(kind, strategy.activity_power, strategy.uniform_mix)
    known = []
    for period in range(population.timeline.periods):
        counts = period_counts(population, period, source, private)
        found = rates_from_counts(
            _capped(weight, strategy, counts, cohort_size), counts, cohort_size
        )
        known.append(PeriodRates(counts, found))
    seed = int.from_bytes(source.generator("device sampling").bytes(16), "little")
    return PeriodSampler(population, known, weight, seed)


def period_counts(
    population: ContinualPopulation, period: int, source: NoiseSource, private: bool
) -> LevelCounts:
    """Level counts of a period: public where they can be, else noised if `private`, else exact.

    A noised histogram is the same release whenever it is asked for again: its noise is keyed by
    the period. Its event is booked before round 1, as of the period's first round.
    """
    known = population.level_counts(period)
    if known is not None:
        return known
    if not private:
        return population.at(period).exact_level_counts()
    plan = population.timeline
    noise = max(USUAL_NOISE, NOISE_SHARE * len(population)) * math.sqrt(plan.periods)
    levels = population.at(period).present_levels()[1]
    found = noised_counts(levels, source.generator("activity histogram", period), noise)
    events = tuple(replace(event, round=plan.first_round(period)) for event in found.events)
    return replace(found, events=events)


def _capped(
    weight: ActivityWeight, strategy: Any, counts: LevelCounts, cohort_size: float
) -> ActivityWeight:
    """The weight with its cap: as given, else `USUAL_CAP` times the period's uniform rate."""
    if strategy.sampler == "uniform":
        return weight
    cap = strategy.max_rate
    if cap is None:
        cap = min(1.0, USUAL_CAP * cohort_size / max(sum(counts.counts.values()), 1.0))
    return replace(weight, max_rate=cap)


def _check(known: Sequence[PeriodRates]) -> None:
    """Refuse rates under which some level's device could cost more than the last level's."""
    for period, entry in enumerate(known):
        if max(entry.rates.values()) > entry.rates[MAX_LEVEL] * (1 + 1e-12):
            raise ConfigError(
                f"sampling rates of period {period} do not rise with activity: no row of the "
                "accounting would bound a device that changes its level; use timeline=static"
            )


def _mean(known: Sequence[PeriodRates]) -> LevelCounts:
    """Devices by level in the mean of all periods, for tables; every event of knowing them."""
    levels = range(MAX_LEVEL + 1)
    counts = {
        level: float(np.mean([entry.counts.counts.get(level, 0.0) for entry in known]))
        for level in levels
    }
    most = {level: max(entry.counts.most.get(level, 0) for entry in known) for level in levels}
    events = tuple(event for entry in known for event in entry.counts.events)
    return LevelCounts(known[0].counts.source, counts, most, events=events)


def _texts(by_level: dict[int, Any]) -> dict[str, Any]:
    return {str(level): value for level, value in sorted(by_level.items())}
