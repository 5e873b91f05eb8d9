"""Inclusion probabilities per activity level: public constants of a whole run.

A device at level l enters each round with probability p_l = min(max_rate, lambda w(n_l)), n_l being
the level's public representative size and w its weight: n (`linear`), n^power (`power`), log(1 + n)
(`log`) or 1 (`uniform`). `uniform_mix` blends p_l with a uniform rate. lambda comes from the
expected cohort and from public or noised level counts, never from who is present in a round: that
would make one device's probability depend on the data of others and void the amplification.

Source: activity sampling, Dupuy et al. 2022, arXiv:2202.03925.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sottovoce.client.errors import ConfigError
from sottovoce.strategies.counts import LevelCounts
from sottovoce.strategies.levels import MAX_LEVEL, representative_size

Weight = Literal["linear", "power", "log", "uniform"]
WEIGHTS: tuple[Weight, ...] = ("linear", "power", "log", "uniform")


@dataclass(frozen=True)
class ActivityWeight:
    """What of a device's activity counts in sampling it, and the levers that bound that.

    `max_rate`: no device is drawn with a higher probability per round: the lever against a large
    epsilon of heavy devices. `uniform_mix`: share of the cohort that is drawn without regard to
    activity: the lever for light devices. Raises ConfigError for impossible values.
    """

    weight: Weight = "linear"
    power: float = 0.5
    uniform_mix: float = 0.0
    max_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ConfigError(
                f"weight={self.weight!r} is unknown: use one of {', '.join(WEIGHTS)}"
            )
        if not (math.isfinite(self.power) and self.power >= 0):
            raise ConfigError(f"power={self.power} must be finite and >= 0")
        if not 0 <= self.uniform_mix <= 1:
            raise ConfigError(f"uniform_mix={self.uniform_mix} must be in [0, 1]")
        if not 0 < self.max_rate <= 1:
            raise ConfigError(f"max_rate={self.max_rate} must be above 0 and at most 1")

    def of(self, level: int) -> float:
        """w of a device at `level`, before cap and mixture."""
        size = representative_size(level)
        if self.weight == "linear":
            return size
        if self.weight == "power":
            return float(size**self.power)
        return math.log1p(size) if self.weight == "log" else 1.0


@dataclass(frozen=True)
class LevelRates:
    """Public inclusion probabilities. `by_level` covers every level up to `MAX_LEVEL`.

    `expected_cohort`: devices expected in a round, from the same numbers as the rates: what sums of
    updates are divided by. `capped`: levels held back by `max_rate`. `top`: levels above it are
    sampled at its rate, as too few devices are known to be there. `public`: whether the rates may
    be used under a device-level claim.
    """

    by_level: dict[int, float]
    expected_cohort: float
    capped: tuple[int, ...]
    top: int
    public: bool


def rates_from_counts(
    weight: ActivityWeight, known: LevelCounts, cohort_size: float
) -> LevelRates:
    """Rates whose expected cohort over the known level counts is `cohort_size`.

    What `max_rate` takes from heavy levels goes to the others. Levels above the highest one with
    `known.least` devices get that one's rate: a rate that grew on with the level would set the
    headline epsilon for devices that hardly exist. Raises ConfigError for cohorts out of reach.
    """
    counts = known.counts
    filled = [level for level, count in counts.items() if count >= known.least]
    if not filled:
        raise ConfigError(
            "too few devices to count by level: set strategy.total_weight, or "
            "strategy.sampler=uniform"
        )
    top, devices = max(filled), sum(counts.values())
    weights = {level: weight.of(min(level, top)) for level in range(MAX_LEVEL + 1)}
    total = sum(count * weights[level] for level, count in counts.items())
    check_cohort(cohort_size, devices, weight.max_rate * devices, weight.max_rate)

    def rates(scale: float) -> dict[int, float]:
        return _rates(weight, weights, total / scale, devices, cohort_size)

    def expected(scale: float) -> float:
        return sum(count * rates(scale)[level] for level, count in counts.items())

    low, high = 1.0, 1.0
    while expected(high) < cohort_size * (1 - 1e-9) and high < 1e12:
        low, high = high, high * 2
    while high > low * (1 + 1e-12):
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) < cohort_size else (low, middle)
    found = rates(high)
    public = known.source != "exact"
    return LevelRates(found, expected(high), _capped(weight, found), top, public)


def rates_from_total(
    weight: ActivityWeight, total_weight: float, devices: int, cohort_size: float
) -> LevelRates:
    """Rates from a declared total weight: lambda = cohort_size / total_weight, for every level."""
    if not (math.isfinite(total_weight) and total_weight > 0):
        raise ConfigError(f"total_weight={total_weight} must be finite and above 0")
    check_cohort(cohort_size, devices, weight.max_rate * devices, weight.max_rate)
    weights = {level: weight.of(level) for level in range(MAX_LEVEL + 1)}
    rates = _rates(weight, weights, total_weight, devices, cohort_size)
    return LevelRates(rates, float(cohort_size), _capped(weight, rates), MAX_LEVEL, True)


def check_cohort(
    cohort_size: float, devices: float, reachable: float | None = None, max_rate: float = 1.0
) -> None:
    """Raise ConfigError unless a cohort of `cohort_size` can be drawn from `devices`."""
    if not (math.isfinite(cohort_size) and cohort_size > 0):
        raise ConfigError(f"cohort_size={cohort_size} must be above 0")
    if cohort_size > devices:
        raise ConfigError(f"cohort_size={cohort_size:g} is more than the {devices:g} devices")
    if reachable is not None and cohort_size > reachable * (1 + 1e-9):
        raise ConfigError(
            f"max_rate={max_rate:g} allows an expected cohort of {reachable:g} only: "
            f"lower cohort_size={cohort_size:g} or raise strategy.max_rate"
        )


def _rates(
    weight: ActivityWeight,
    weights: Mapping[int, float],
    total: float,
    devices: float,
    cohort_size: float,
) -> dict[int, float]:
    """p by level: min(cap, cohort ((1 - mix) w / total + mix / devices))."""
    mix = weight.uniform_mix
    return {
        level: min(weight.max_rate, cohort_size * ((1 - mix) * w / total + mix / devices))
        for level, w in weights.items()
    }


def _capped(weight: ActivityWeight, rates: Mapping[int, float]) -> tuple[int, ...]:
    return tuple(level for level, rate in rates.items() if rate >= weight.max_rate)
