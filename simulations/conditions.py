"""Device conditions: who can be reached, who breaks off, and how long a device takes.

    availability   an hourly curve over the device's own day, shifted by its time zone
    dropout        a device breaks off with a fixed probability
    speed          classes of devices: pace, bandwidth; log-normal jitter; a deadline a round

All of it is a pure function of (seed, device, round) and, for durations, of the device's public
activity level: never of its text or of how many examples it has within the level.

The shape (four times as many devices at night as by day, 6 to 10 % that break off, 130 % of the
wanted devices asked) follows Bonawitz et al. 2019, arXiv:1902.01046.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.simulations.hashing import draws, stream, uniforms
from sottovoce.strategies.levels import representative_size

DAY = 24
MBIT = 1e6 / 8  # bytes


@dataclass
class SpeedClassConfig:
    """Devices of a kind. `share`: of all devices, relative to the other classes' shares. `speed`:
    times `conditions.reference_examples_per_second`. Bandwidths in megabits a second.
    """

    share: float = 1.0
    speed: float = 1.0
    down_mbps: float = 50.0
    up_mbps: float = 10.0


@dataclass
class ConditionsConfig:
    """What devices are like. The defaults are a laboratory: all answer, at once.

    `seed`: of the simulated world. `round_minutes`: from one round's start to the next, the first
    at `start_hour` UTC. `availability`: probability of being reachable in each of the 24 hours of
    a device's own day; empty: always. `time_zones`: hours from UTC, each for an equal part of the
    devices. `dropout`: probability of breaking off. `deadline_s`: what a device may take, null for
    as long as it likes; `jitter`: standard deviation of the logarithm of what it takes.
    `partial_work`: whoever would be late hands in the local steps that fit, where one does.
    `over_selection`: devices that are asked, over those that are wanted.
    """

    name: str = "none"
    seed: int = 0
    round_minutes: float = 30.0
    start_hour: float = 0.0
    availability: list[float] = field(default_factory=list)
    time_zones: list[float] = field(default_factory=list)
    dropout: float = 0.0
    deadline_s: float | None = None
    jitter: float = 0.0
    partial_work: bool = False
    over_selection: float = 1.0
    reference_examples_per_second: float = 100.0
    classes: dict[str, SpeedClassConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a round asks of a device, as far as it is public.

    `plan`: local batches. `down_bytes`, `up_bytes`: of the messages to and from a device.
    """

    plan: BatchPlan
    down_bytes: float
    up_bytes: float

    def examples(self, level: int) -> float:
        """Examples that a device at `level` visits, by the public stand-in for its activity."""
        return self.plan.local_epochs * min(representative_size(level), self.plan.max_examples)

    def steps(self, level: int) -> int:
        """Local steps of a device at `level` with that stand-in."""
        return self.plan.steps(level, math.ceil(representative_size(level)))


class Conditions:
    """The simulated world as pure functions. `settings`: see `ConditionsConfig`.

    *Guarantee*: whether and how far a device takes part in a round it was sampled for is
    independent of its data and of other devices, given its activity level. A device that a sampler
    draws with probability p is therefore in the sum with probability at most p, and a Poisson
    sampler's accounting at p stays an upper bound (device unit, add/remove, observer `release`).
    *Assumes*: that holds of real devices too: a device that is offline *because* of what it stores,
    or slower for more examples within a level, is outside of it. Levels are public.
    """

    def __init__(self, settings: ConditionsConfig) -> None:
        _check(settings)
        self.settings = settings
        self.classes = list(settings.classes.values())
        self.names = list(settings.classes)
        shares = np.array([kind.share for kind in self.classes], dtype=np.float64)
        self.shares = shares / shares.sum() if len(shares) else shares
        self._zones = np.array(settings.time_zones or [0.0])
        self._curve = np.array(settings.availability or [1.0] * DAY)

    @property
    def lossless(self) -> bool:
        """Whether every device that is asked answers with all its work."""
        settings = self.settings
        always = not settings.availability or min(settings.availability) == 1
        return always and settings.dropout == 0 and settings.deadline_s is None

    def time_zone(self, devices: NDArray[np.int64]) -> NDArray[np.float64]:
        """(devices,) hours from UTC."""
        place = (self._uniforms("time zone", devices) * len(self._zones)).astype(np.int64)
        found: NDArray[np.float64] = self._zones[place]
        return found

    def speed_class(self, devices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(devices,) place in `classes`."""
        bounds = np.cumsum(self.shares)[:-1]
        return np.searchsorted(bounds, self._uniforms("speed class", devices), side="right")

    def available(self, devices: NDArray[np.int64], server_round: int) -> NDArray[np.bool_]:
        """(devices,) who can be reached in the round; the same for all rounds within an hour."""
        hours = np.floor(self._clock(server_round) + self.time_zone(devices)).astype(np.int64)
        coins = self._uniforms("availability", devices, hours + DAY)
        return coins < self._curve[hours % DAY]

    def fails(self, devices: NDArray[np.int64], server_round: int) -> NDArray[np.bool_]:
        """(devices,) who breaks off in the round and hands in nothing."""
        coins = self._uniforms("dropout", devices, np.int64(server_round))
        return coins < self.settings.dropout

    def jitter(self, devices: NDArray[np.int64], server_round: int) -> NDArray[np.float64]:
        """(devices,) factors on what the round's work takes, of median 1."""
        if self.settings.jitter == 0:
            return np.ones(len(devices))
        coins = self._uniforms("jitter", devices, np.int64(server_round))
        factors: NDArray[np.float64] = np.exp(self.settings.jitter * ndtri(coins))
        return factors

    def class_seconds(self, work: Work, level: int) -> list[tuple[float, float]]:
        """(computing, transfer) seconds of a device at `level`, for each class, without jitter."""
        reference = self.settings.reference_examples_per_second
        return [
            (
                work.examples(level) / (reference * kind.speed),
                work.down_bytes / (kind.down_mbps * MBIT) + work.up_bytes / (kind.up_mbps * MBIT),
            )
            for kind in self.classes
        ]

    def reply_share(self, work: Work, level: int, rounds: int) -> float:
        """Probability that a sampled device at `level` is in the sum, on average over the rounds.

        In closed form from the settings alone: public.
        """
        here = self.available_share(rounds) * (1 - self.settings.dropout)
        return here * self._in_time(work, level)

    def available_share(self, rounds: int) -> float:
        """Probability that a device can be reached, on average over the rounds."""
        hours = [self._clock(number) for number in range(1, rounds + 1)]
        local = np.floor(np.add.outer(np.array(hours), self._zones)).astype(np.int64)
        return float(self._curve[local % DAY].mean())

    def _in_time(self, work: Work, level: int) -> float:
        """Probability of handing something in before the deadline, over the classes."""
        deadline, sigma = self.settings.deadline_s, self.settings.jitter
        if deadline is None:
            return 1.0
        found = 0.0
        for share, (computing, transfer) in zip(
            self.shares, self.class_seconds(work, level), strict=True
        ):
            least = computing / work.steps(level) if self.settings.partial_work else computing
            excess = math.log(deadline / (least + transfer))
            chance = float(ndtr(excess / sigma)) if sigma else float(excess >= 0)
            found += float(share) * chance
        return found

    def _clock(self, server_round: int) -> float:
        """Hours UTC from the first day's midnight to the start of the round."""
        return self.settings.start_hour + (server_round - 1) * self.settings.round_minutes / 60

    def _uniforms(
        self,
        purpose: str,
        devices: NDArray[np.int64],
        counter: NDArray[np.int64] | np.int64 | None = None,
    ) -> NDArray[np.float64]:
        bits = draws(stream(self.settings.seed, f"conditions: {purpose}"), devices)
        return uniforms(bits if counter is None else draws(bits, np.asarray(counter)))


def make_conditions(settings: Any) -> Conditions:
    """Conditions from a group of settings (a mapping); None, of an older run: a laboratory."""
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    values: Mapping[str, Any] = settings or {}
    classes = {
        str(name): SpeedClassConfig(**dict(kind))
        for name, kind in (values.get("classes") or {}).items()
    }
    plain = {str(key): value for key, value in values.items() if key != "classes"}
    for key in ("availability", "time_zones"):
        plain[key] = [float(value) for value in plain.get(key) or []]
    return Conditions(ConditionsConfig(**plain, classes=classes))


def check_partial_work(conditions: Conditions, noised_on_device: bool) -> None:
    """Raise ConfigError where partial work would bring in less noise than is accounted for."""
    if conditions.settings.partial_work and noised_on_device:
        raise ConfigError(
            "conditions.partial_work=true would leave out a part of the noise that privacy.example "
            "counts on: choose privacy=device, or set conditions.partial_work=false, which leaves "
            "late devices out"
        )


def _check(settings: ConditionsConfig) -> None:
    """Raise ConfigError, in one line, for impossible conditions."""
    curve = settings.availability
    if curve and (len(curve) != DAY or not all(0 <= value <= 1 for value in curve)):
        raise ConfigError(
            f"conditions.availability={list(curve)} must be 24 probabilities, one for each hour of "
            "a device's day, or empty"
        )
    if not all(-12 <= zone <= 14 for zone in settings.time_zones):
        raise ConfigError(
            f"conditions.time_zones={list(settings.time_zones)} must be hours from -12 to 14"
        )
    for name, kind in settings.classes.items():
        for key, value in asdict(kind).items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"conditions.classes.{name}.{key}={value} must be above 0")
    if settings.deadline_s is not None:
        _check_deadline(settings, settings.deadline_s)
    elif settings.partial_work:
        raise ConfigError(
            "conditions.partial_work=true does nothing without conditions.deadline_s: set that"
        )


def _check_deadline(settings: ConditionsConfig, deadline: float) -> None:
    if not settings.classes:
        raise ConfigError(
            f"conditions.deadline_s={deadline:g} needs device speeds: choose conditions=phones, or "
            "set conditions.classes"
        )
    if deadline > settings.round_minutes * 60:
        raise ConfigError(
            f"conditions.deadline_s={deadline:g} is longer than a round: lower it, or raise "
            f"conditions.round_minutes={settings.round_minutes:g}"
        )
