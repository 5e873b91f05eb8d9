"""Who is sampled: each round's devices, with inclusion probabilities the accountant can use.

Poisson samplers let every device in by a coin of its own; they never fill up or cut a cohort, not
even an empty one, because that would make one device's place depend on the others.

A round's devices are a pure function of (seed, round): nothing need be saved to resume. Sampling
costs O(levels + cohort): per level a binomial draw of how many, then a uniform choice of who.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.events import GaussianEvent, LevelEntry, Sampling
from sottovoce.privacy.noise import NoiseSource
from sottovoce.strategies.counts import LevelCounts, exact_counts, model_counts, noised_counts
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels
from sottovoce.strategies.rates import (
    ActivityWeight,
    Weight,
    check_cohort,
    rates_from_counts,
    rates_from_total,
)

if TYPE_CHECKING:
    from sottovoce.simulations.population import Population

_STREAM = 0x5A3B1E5


class Sampler(ABC):
    """Draws each round's cohort.

    `devices`: population size, public. `rates`: inclusion probability per round of a device at
    each level, all levels up to `MAX_LEVEL`. `expected_cohort_size`: public; sums are divided by
    it. `counts`: devices by level as far as known. `events`: what knowing them cost: into the
    ledger first. `seed`: drawn from the operating system where None is given.
    """

    sampling: ClassVar[Sampling]

    def __init__(
        self,
        devices: int,
        rates: dict[int, float],
        expected_cohort_size: float,
        counts: LevelCounts | None,
        seed: int | None,
    ) -> None:
        self.devices, self.rates, self.counts = devices, rates, counts
        self.expected_cohort_size = float(expected_cohort_size)
        entropy = np.random.SeedSequence(seed).entropy
        self.seed = int(entropy) if isinstance(entropy, int) else 0

    @abstractmethod
    def sample(self, round: int) -> NDArray[np.int64]:
        """Ids of the devices in `round`, sorted; may be empty."""

    @property
    def by_level(self) -> tuple[LevelEntry, ...]:
        """(level, rate, 1) of every level: what a round's event says."""
        return tuple((level, rate, 1) for level, rate in sorted(self.rates.items()))

    @property
    def events(self) -> tuple[GaussianEvent, ...]:
        return () if self.counts is None else self.counts.events

    @property
    def devices_by_level(self) -> dict[int, int]:
        """Devices by level as far as known, for tables; empty where unknown."""
        return {} if self.counts is None else self.counts.rounded

    @property
    def most_devices_by_level(self) -> dict[int, int]:
        """Public numbers that the levels' devices stay below, but for 1 chance in 10^18.

        Where only totals are public, all that a cohort may hold is put at the last level, whose
        devices do most.
        """
        if self.counts is not None:
            return self.counts.most
        rate = self.rates[MAX_LEVEL]
        return {MAX_LEVEL: math.ceil(self.expected_cohort_size / rate)} if rate > 0 else {}

    def inclusion_probabilities(self) -> dict[int, float]:
        """Probability per round of a device at each level."""
        return dict(self.rates)

    def describe(self) -> dict[str, Any]:
        """What the report says of this sampler, as JSON values."""
        return {
            "sampler": type(self).__name__,
            "sampling": self.sampling,
            "expected_cohort_size": self.expected_cohort_size,
            "level_counts": "unknown" if self.counts is None else self.counts.source,
        }

    def _generator(self, round: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence((_STREAM, self.seed, round)))


class UniformSampler(Sampler):
    """Poisson: every device enters with probability cohort_size / devices."""

    sampling = "poisson"

    def __init__(
        self,
        devices: int,
        cohort_size: float,
        *,
        counts: LevelCounts | None = None,
        seed: int | None = None,
    ) -> None:
        check_cohort(cohort_size, devices)
        self.rate = cohort_size / devices
        super().__init__(devices, _everywhere(self.rate), cohort_size, counts, seed)

    def sample(self, round: int) -> NDArray[np.int64]:
        generator = self._generator(round)
        return _chosen(generator, self.devices, generator.binomial(self.devices, self.rate))


class FixedSizeSampler(Sampler):
    """The same number of devices each round, uniformly without replacement.

    To be recorded with `sampling="fixed_size"`, `relation="replace_one"`: a weaker claim than
    Poisson's for the same noise.
    """

    sampling = "fixed_size"

    def __init__(
        self,
        devices: int,
        cohort_size: int,
        *,
        counts: LevelCounts | None = None,
        seed: int | None = None,
    ) -> None:
        check_cohort(cohort_size, devices)
        if int(cohort_size) != cohort_size:
            raise ConfigError(f"cohort_size={cohort_size} must be a whole number at fixed size")
        self.size = int(cohort_size)
        super().__init__(devices, _everywhere(cohort_size / devices), cohort_size, counts, seed)

    def sample(self, round: int) -> NDArray[np.int64]:
        return _chosen(self._generator(round), self.devices, self.size)


class ActivitySampler(Sampler):
    """Poisson, more often for devices with more data: one public rate per activity level.

    `levels`: (devices,) uint8, see `activity_levels`. `weight`, `power`, `uniform_mix` and
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
    ) -> None:
        check_cohort(cohort_size, len(levels))
        self.weight = ActivityWeight(weight, power, uniform_mix, max_rate)
        self._members = _members(levels)
        if total_weight is None:
            counts = counts or exact_counts(levels)
            found = rates_from_counts(self.weight, counts, cohort_size)
        else:
            found = rates_from_total(self.weight, total_weight, len(levels), cohort_size)
        self.capped, self.top = found.capped, found.top
        self.public_rates = total_weight is not None or found.public
        super().__init__(len(levels), found.by_level, found.expected_cohort, counts, seed)

    def sample(self, round: int) -> NDArray[np.int64]:
        generator = self._generator(round)
        chosen = []
        for level, members in enumerate(self._members):
            size = generator.binomial(len(members), self.rates[level])
            chosen.append(members[_chosen(generator, len(members), size)])
        return np.sort(np.concatenate(chosen).astype(np.int64))

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
        least = min(self.capped)
        return (
            f"max_rate={self.weight.max_rate:g} holds back devices with {1 << least} examples or "
            "more; the others are sampled more often in their place"
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
        declared = strategy.total_weight
        counts = None if declared else known_counts(population, levels, source, private)
        return ActivitySampler(
            levels,
            cohort_size,
            weight=strategy.activity_weight,
            power=strategy.activity_power,
            uniform_mix=strategy.uniform_mix,
            max_rate=strategy.max_rate,
            total_weight=declared,
            counts=counts,
            seed=seed,
        )
    expected = population.expected_level_counts()
    known = expected is not None or not private
    counts = (
        known_counts(population, activity_levels(population.activity), source, private)
        if known
        else None
    )
    kinds = {"uniform": UniformSampler, "fixed_size": FixedSizeSampler}
    if strategy.sampler not in kinds:
        raise ConfigError(f"sampler={strategy.sampler!r} is unknown: use activity, uniform, fixed_size")
    return kinds[strategy.sampler](len(population), cohort_size, counts=counts, seed=seed)


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


def _everywhere(rate: float) -> dict[int, float]:
    return dict.fromkeys(range(MAX_LEVEL + 1), rate)


def _members(levels: NDArray[np.uint8]) -> list[NDArray[np.int32]]:
    """Device ids of each level, in order: a stable counting sort without its 64-bit index."""
    if len(levels) and int(levels.max()) > MAX_LEVEL:
        raise ConfigError(f"level {int(levels.max())} is above {MAX_LEVEL}, the last one")
    return [np.flatnonzero(levels == level).astype(np.int32) for level in range(MAX_LEVEL + 1)]


def _chosen(generator: np.random.Generator, among: int, size: int) -> NDArray[np.int64]:
    """`size` of the numbers below `among`, uniformly without replacement, sorted."""
    if size == 0:
        return np.zeros(0, dtype=np.int64)
    return np.sort(generator.choice(among, size=size, replace=False, shuffle=False))
