"""Sampling by activity: devices with more data are drawn more often, at public rates.

Sampling costs O(levels + cohort): per level a binomial draw of how many devices, then a uniform
choice of which. Source: Dupuy et al. 2022, arXiv:2202.03925.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.events import RandomisedReport
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.strategies.counts import LevelCounts, exact_counts, model_counts, noised_counts
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels
from sottovoce.strategies.rates import (
    ActivityWeight,
    Weight,
    check_cohort,
    rates_from_counts,
    rates_from_total,
)
from sottovoce.strategies.reports import (
    level_report,
    reported_counts,
    reported_levels,
    reported_weight,
    true_shares,
)
from sottovoce.strategies.sampling import FixedSizeSampler as FixedSizeSampler
from sottovoce.strategies.sampling import Sampler as Sampler
from sottovoce.strategies.sampling import UniformSampler as UniformSampler
from sottovoce.strategies.sampling import chosen

if TYPE_CHECKING:
    from sottovoce.simulations.population import Population

REPORTS = "activity level reports"
USUAL_CAP = 10.0  # times the uniform rate: few busy devices would else set everybody's noise


class ActivitySampler(Sampler):
    """Poisson, more often for devices with more data: one public rate per activity level.

    `levels`: (devices,) uint8, see `activity_levels`, or what devices report in their place: then
    `report` says how, and `shares`, (levels,) how many devices are at each level in truth; from the
    reports where None. `weight`, `power`, `uniform_mix` and
    `max_rate`: see `ActivityWeight`. Rates rest on `total_weight`, the sum of weights that someone
    declares; else on `counts`; else on the exact histogram of `levels`, which is private: then
    `public_rates` is False and no device-level claim holds.

    *Guarantee*: a device is in a round's sample with probability `rates[level]`, independently of
    all others and of other rounds.
    *Assumes*: nobody sees who was sampled; the seed is secret and drawn afresh for a run.
    """

    sampling = "poisson"

    def __init__(
        self,
        levels: NDArray[np.uint8],
        cohort_size: float,
        *,
        weight: Weight = "linear",
        power: float = 0.5,
        uniform_mix: float = 0.0,
        max_rate: float = 1.0,
        total_weight: float | None = None,
        counts: LevelCounts | None = None,
        seed: int | None = None,
        report: RandomisedReport | None = None,
        shares: NDArray[np.float64] | None = None,
    ) -> None:
        check_cohort(cohort_size, len(levels))
        self.weight = ActivityWeight(weight, power, uniform_mix, max_rate)
        if report is not None:
            self.reported, counts = levels, reported_counts(levels, report)
            known = true_shares(levels, report) if shares is None else shares
            self.weight = reported_weight(self.weight, known, report)
        self._members = _members(levels)
        if total_weight is None:
            counts = counts or exact_counts(levels)
            found = rates_from_counts(self.weight, counts, cohort_size)
        else:
            found = rates_from_total(self.weight, total_weight, len(levels), cohort_size)
        self.capped, self.top = found.capped, found.top
        self.public_rates = total_weight is not None or found.public
        super().__init__(len(levels), found.by_level, found.expected_cohort, counts, seed)

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        generator = self._generator(round, attempt)
        drawn = []
        for level, members in enumerate(self._members):
            size = generator.binomial(len(members), self.rates[level])
            drawn.append(members[chosen(generator, len(members), size)])
        return np.sort(np.concatenate(drawn).astype(np.int64))

    def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "weight": self.weight.weight,
            "uniform_mix": self.weight.uniform_mix,
            "max_rate": self.weight.max_rate,
            "capped_levels": list(self.capped),
            "top_level": self.top,
        }
        if self.weight.weight == "power":
            facts["power"] = self.weight.power
        return super().describe() | facts

    @property
    def note(self) -> str | None:
        """A line for people where `max_rate` binds, else None."""
        if not self.capped:
            return None
        who = f"with {1 << min(self.capped)} examples or more"
        if self.reported is not None:
            who = f"that report level {', '.join(map(str, self.capped))}"
        return (
            f"max_rate={self.weight.max_rate:g} holds back devices {who}; the others are sampled "
            "more often in their place"
        )


def make_sampler(
    strategy: Any,
    population: Population,
    cohort_size: float,
    *,
    source: NoiseSource,
    private: bool,
) -> Sampler:
    """The sampler of a run. `strategy`: settings of the group `strategy`.

    `private`: whether a device-level guarantee is claimed; level counts then come from a public
    model or with noise (`events`), and where they are not needed, not at all.
    """
    seed = int.from_bytes(source.generator("device sampling").bytes(16), "little")
    if strategy.sampler == "activity":
        levels = activity_levels(population.activity)
        declared, local = strategy.total_weight, getattr(strategy, "level_epsilon", None)
        counts, report, shares = None, None, None
        if local is not None:
            report, shares = level_report(local), public_shares(population)
            levels = reported_levels(levels, report, source.generator(REPORTS))
        elif not declared:
            counts = known_counts(population, levels, source, private)
        return ActivitySampler(
            levels,
            cohort_size,
            weight=strategy.activity_weight,
            power=strategy.activity_power,
            uniform_mix=strategy.uniform_mix,
            max_rate=_cap(strategy.max_rate, cohort_size, len(population)),
            total_weight=declared,
            counts=counts,
            seed=seed,
            report=report,
            shares=shares,
        )
    counts = None
    if not private or population.expected_level_counts() is not None:
        levels = activity_levels(population.activity)
        counts = known_counts(population, levels, source, private)
    if strategy.sampler == "uniform":
        return UniformSampler(len(population), cohort_size, counts=counts, seed=seed)
    if strategy.sampler == "fixed_size":
        return FixedSizeSampler(len(population), cohort_size, counts=counts, seed=seed)
    raise ConfigError(
        f"sampler={strategy.sampler!r} is unknown: use activity, uniform or fixed_size"
    )


def _cap(max_rate: float | None, cohort_size: float, devices: int) -> float:
    """The cap on sampling rates: as given, else `USUAL_CAP` times the uniform rate."""
    return min(1.0, USUAL_CAP * cohort_size / devices) if max_rate is None else max_rate


def public_shares(population: Population) -> NDArray[np.float64] | None:
    """(levels,) share of devices at each level by the public model; None where there is none."""
    expected = population.expected_level_counts()
    return None if expected is None else expected / expected.sum()


def known_counts(
    population: Population, levels: NDArray[np.uint8], source: NoiseSource, private: bool
) -> LevelCounts:
    """Level counts by the public model if there is one, else noised if `private`, else exact."""
    expected = population.expected_level_counts()
    if expected is not None:
        return model_counts(expected)
    if private:
        return noised_counts(levels, source.generator("activity histogram"))
    return exact_counts(levels)


def _members(levels: NDArray[np.uint8]) -> list[NDArray[np.int32]]:
    """Device ids of each level, in order: a stable counting sort without its 64-bit index."""
    if len(levels) and int(levels.max()) > MAX_LEVEL:
        raise ConfigError(f"level {int(levels.max())} is above {MAX_LEVEL}, the last one")
    return [np.flatnonzero(levels == level).astype(np.int32) for level in range(MAX_LEVEL + 1)]
