"""What a sampler promises, and the two that treat all devices alike.

Poisson samplers let every device in by a coin of its own; they never fill up or cut a cohort, not
even an empty one, because that would make one device's place depend on the others.

A round's devices are a pure function of (seed, round): nothing need be saved to resume.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.events import (
    GaussianEvent,
    LevelEntry,
    RandomisedReport,
    Sampling,
)
from sottovoce.strategies.counts import LevelCounts
from sottovoce.strategies.levels import MAX_LEVEL
from sottovoce.strategies.rates import check_cohort

_STREAM = 0x5A3B1E5


class PublicRates(Protocol):
    """Rates of a stretch of rounds; see `Sampler`."""

    @property
    def rates(self) -> dict[int, float]: ...

    @property
    def most_devices_by_level(self) -> dict[int, int]: ...


class Sampler(ABC):
    """Draws each round's cohort.

    `devices`: population size, public. `rates`: inclusion probability per round of a device at
    each level, all levels up to `MAX_LEVEL`. `expected_cohort_size`: public; sums are divided by
    it. `counts`: devices by level as far as known. `events`: what knowing them cost: into the
    ledger first. `seed`: drawn from the operating system where None is given. `reported`:
    (devices,) levels that devices report in place of their own, None where they say their own.
    """

    sampling: ClassVar[Sampling]
    reported: NDArray[np.uint8] | None = None

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
    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        """Ids of the devices in `round`, sorted; may be empty.

        `attempt`: 1, 2, … where the round is done again: drawn by other coins.
        """

    def rates_at(self, round: int) -> dict[int, float]:
        """Inclusion probability of a device at each level in `round`."""
        return self.rates

    def plan(self, rounds: int) -> list[LevelEntry]:
        """(level, rate, count) of all of a run's rounds; a level may come more than once."""
        return [(level, rate, rounds) for level, rate in sorted(self.rates.items())]

    @property
    def parts(self) -> Sequence[PublicRates]:
        """What is public of each stretch of rounds with the same rates."""
        return (self,)

    @property
    def by_level(self) -> tuple[LevelEntry, ...]:
        """(level, rate, 1) of every level: what a round's event says."""
        return tuple((level, rate, 1) for level, rate in sorted(self.rates.items()))

    @property
    def events(self) -> tuple[GaussianEvent | RandomisedReport, ...]:
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

    def _generator(self, round: int, attempt: int) -> np.random.Generator:
        again = (attempt,) if attempt else ()
        return np.random.default_rng(np.random.SeedSequence((_STREAM, self.seed, round, *again)))


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

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        generator = self._generator(round, attempt)
        return chosen(generator, self.devices, generator.binomial(self.devices, self.rate))


class FixedSizeSampler(Sampler):
    """The same number of devices each round, uniformly without replacement.

    To be recorded with `sampling="fixed_size"`, `relation="replace_one"`: a weaker claim than
    Poisson's for the same noise.
    """

    sampling = "fixed_size"

    def __init__(
        self,
        devices: int,
        cohort_size: float,
        *,
        counts: LevelCounts | None = None,
        seed: int | None = None,
    ) -> None:
        check_cohort(cohort_size, devices)
        if int(cohort_size) != cohort_size:
            raise ConfigError(f"cohort_size={cohort_size} must be a whole number at fixed size")
        self.size = int(cohort_size)
        super().__init__(devices, _everywhere(cohort_size / devices), cohort_size, counts, seed)

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        return chosen(self._generator(round, attempt), self.devices, self.size)


def _everywhere(rate: float) -> dict[int, float]:
    return dict.fromkeys(range(MAX_LEVEL + 1), rate)


def chosen(generator: np.random.Generator, among: int, size: int) -> NDArray[np.int64]:
    """`size` of the numbers below `among`, uniformly without replacement, sorted."""
    if size == 0:
        return np.zeros(0, dtype=np.int64)
    return np.sort(generator.choice(among, size=size, replace=False, shuffle=False))
