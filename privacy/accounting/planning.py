"""What a privacy budget allows: rounds, cohort, population or noise, for one layer or both at once.

Epsilon rises with rounds and with sampling rates, so each answer is the last value on the right
side of a target: RDP brackets it in milliseconds, the accountant that reports has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import NEARLY, check_delta, worst
from sottovoce.privacy.accounting.calibration import calibrate_noise
from sottovoce.privacy.accounting.composition import Composition, Place, Tally
from sottovoce.privacy.accounting.events import (
    Event,
    GaussianEvent,
    LevelEntry,
    Observer,
    Relation,
    Sampling,
    Unit,
)

MOST_ROUNDS = 10**7
LEAST_RATE = 1e-9
_CLOSE = 1e-4


@dataclass(frozen=True)
class Layer:
    """What each round releases about one unit, and what it may cost in all.

    `per_round`: (level, rate, count): releases of one round to which a unit of that level is
    subjected. For examples: the local steps of one participation, if a device may take part in
    every round. `most_rounds`: rounds that count at most, whatever the run's number
    (`max_participations`); None: all. `noise_multiplier`: None where it is to be found. `spent`:
    other events of the same unit that the target must cover.
    """

    target_epsilon: float
    delta: float
    per_round: tuple[LevelEntry, ...]
    noise_multiplier: float | None = None
    most_rounds: int | None = None
    unit: Unit = "device"
    observer: Observer = "release"
    sampling: Sampling = "poisson"
    relation: Relation = "add_remove"
    spent: tuple[Event, ...] = ()
    accountant: str = "pld"

    def entries(self, rounds: int) -> list[LevelEntry]:
        """Releases of the whole run by level."""
        times = rounds if self.most_rounds is None else min(rounds, self.most_rounds)
        return [(level, rate, count * times) for level, rate, count in self.per_round]

    def compositions(self, rounds: int) -> Mapping[Place, Composition]:
        """What a unit of each level is subjected to in so many rounds."""
        if self.noise_multiplier is None:
            raise ConfigError("noise_multiplier is missing: give it, or let it be calibrated")
        tally = Tally(self.spent)
        for level, rate, count in self.entries(rounds):
            tally.add(
                GaussianEvent(
                    noise_multiplier=self.noise_multiplier,
                    sampling=self.sampling,
                    relation=self.relation,
                    by_level=((level, rate, count),),
                    unit=self.unit,
                    observer=self.observer,
                    purpose="plan",
                )
            )
        return tally.compositions(self.unit, self.observer)

    def epsilon(self, rounds: int, *, accountant: str | None = None, near: bool = False) -> float:
        """Epsilon of the worst level after `rounds`."""
        name, tolerance = accountant or self.accountant, NEARLY if near else 0.0
        return worst(self.compositions(rounds), self.delta, name, tolerance)[0]

    def allows(self, rounds: int) -> bool:
        """Whether `rounds` stay within the target, by the figure that is reported."""
        if self.epsilon(rounds, accountant="rdp") <= self.target_epsilon:
            return True
        if self.epsilon(rounds, near=True) <= self.target_epsilon:
            return True
        return self.epsilon(rounds) <= self.target_epsilon


def calibrate_layers(layers: Sequence[Layer], rounds: int) -> list[Layer]:
    """Each layer with the least noise that keeps it within its own target.

    Layers protect different units, whose epsilons do not add up: each is found by itself.
    """
    _check_rounds(rounds)
    return [
        replace(
            layer,
            noise_multiplier=calibrate_noise(
                layer.target_epsilon, layer.delta, by_level=layer.entries(rounds),
                sampling=layer.sampling, relation=layer.relation, spent=layer.spent,
                accountant=layer.accountant,
            ),
        )
        for layer in layers
    ]


def most_rounds(layers: Sequence[Layer], limit: int = MOST_ROUNDS) -> int:
    """The largest number of rounds, `limit` at most, that stays within every layer's target.

    Raises ConfigError where not even one round does.
    """
    for layer in layers:
        check_delta(layer.delta)

    def allowed(rounds: int) -> bool:
        return all(layer.allows(rounds) for layer in layers)

    if not allowed(1):
        worst_of = max(layers, key=lambda layer: layer.epsilon(1) / layer.target_epsilon)
        raise ConfigError(
            f"epsilon={worst_of.target_epsilon:g} is passed in the first round already (unit "
            f"{worst_of.unit}, {worst_of.epsilon(1):.3g}): raise noise_multiplier"
        )
    if allowed(limit):
        return limit
    low, high = 1, 2
    while high < limit and allowed(high):
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def largest_rate(layer: Layer, rounds: int) -> float:
    """The largest sampling rate of a device that stays within the target in `rounds`.

    `layer.per_round` must hold one entry, whose rate is replaced. The answer is within 0.01 % of
    the best one, never above it; 1 where no sampling is needed. Raises ConfigError where no rate
    from 10^-9 on is small enough.
    """
    check_delta(layer.delta)
    _check_rounds(rounds)
    ((level, _, count),) = layer.per_round

    def allowed(rate: float) -> bool:
        return replace(layer, per_round=((level, rate, count),)).allows(rounds)

    if allowed(1.0):
        return 1.0
    if not allowed(LEAST_RATE):
        raise ConfigError(
            f"epsilon={layer.target_epsilon:g} cannot be kept in {rounds} rounds with "
            f"noise_multiplier={layer.noise_multiplier:g} at any sampling rate: raise the noise"
        )
    return _last(allowed, LEAST_RATE, 1.0)


def largest_cohort(layer: Layer, rounds: int, devices: int) -> int:
    """The largest expected cohort of uniform sampling from `devices` within the target."""
    found = math.floor(largest_rate(layer, rounds) * devices)
    if found < 1:
        raise ConfigError(
            f"devices={devices} are too few for even one device a round within epsilon="
            f"{layer.target_epsilon:g}: raise noise_multiplier or target_epsilon"
        )
    return found


def smallest_population(layer: Layer, rounds: int, cohort_size: int) -> int:
    """The least number of devices from which a cohort can be drawn within the target."""
    return math.ceil(cohort_size / largest_rate(layer, rounds))


def expected_participations(rate: float, rounds: int, limit: int | None = None) -> float:
    """Rounds that a device takes part in on average; with a `limit`, E[min(limit, Binomial)]."""
    if limit is None or limit >= rounds:
        return rate * rounds
    from scipy.stats import binom

    return float(sum(binom.sf(at, rounds, rate) for at in range(limit)))


def likely_participations(
    rate: float, rounds: int, devices: int, limit: int | None = None, risk: float = 1e-6
) -> int:
    """What no one of `devices` devices takes part more often than, but for a chance of `risk`.

    A forecast for planning. What a guarantee may rest on is `limit`, or else all `rounds`.
    """
    from scipy.stats import binom

    found = int(binom.isf(risk / max(devices, 1), rounds, rate)) if 0 < rate < 1 else rounds
    found = 0 if rate == 0 else min(found, rounds)
    return found if limit is None else min(found, limit)


def _last(allowed: Callable[[float], bool], low: float, high: float) -> float:
    """The largest value allowed, found on a log scale: `low` is, `high` is not."""
    while high > low * (1 + _CLOSE):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def _check_rounds(rounds: float) -> None:
    if isinstance(rounds, bool) or int(rounds) != rounds or rounds < 1:
        raise ConfigError(f"rounds={rounds} must be a whole number of at least 1")
