"""Privacy events: what a mechanism writes into the ledger when it releases something.

An event is a fact about one release (how much noise, for whom, who was sampled with what
probability), never a figure derived from it: accountants read events, mechanisms write them.

GaussianEvent       a sum plus Gaussian noise, once or `count` times, for some sample of units
RandomisedReport    what every unit says of itself, but a lie with a known probability
NonPrivateRelease   something an observer sees that no noise protects: epsilon is infinite
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

Unit = Literal["device", "example"]
Observer = Literal["release", "server", "fleet"]
Relation = Literal["add_remove", "zero_out", "replace_one"]
Sampling = Literal["poisson", "fixed_size", "none"]
LevelEntry = tuple[int, float, int]

OBSERVERS: tuple[Observer, ...] = get_args(Observer)
"""From the one who sees least to the one who sees most: each also sees what those before it see."""

@dataclass(frozen=True, kw_only=True)
class GaussianEvent:
    """`count` releases of a sum of bounded contributions plus Gaussian noise.

    `noise_multiplier`: standard deviation of the noise over the *contribution bound* (the most
    that adding, removing or zeroing one unit moves the sum; the clip norm for a clipped sum).
    Give that same ratio whatever the relation: accountants double the sensitivity themselves
    under `replace_one`.

    `sampling`: how units came into the sum. `poisson`: each by its own independent coin of
    probability `sampling_rate`, kept secret; `fixed_size`: a uniform subset without replacement
    of the public size rate x population (needs `replace_one`); `none`: no sampling is claimed.

    `relation`: `add_remove`: with or without the unit's contribution; the noise must not depend
    on whether it takes part. `zero_out`: the unit takes part either way, with its signal or with
    zero, and *may add noise of its own when it does*; its participation may then show in the
    spread of the sum, so accountants claim no secrecy of the sample for it. `replace_one`: the
    unit's data are replaced.

    `by_level`: (activity level, sampling rate, count) for the units of each level, in place of
    `sampling_rate` and `count`. A level that the event does not list is not affected by it
    (count 0); an event without `by_level` affects every level alike.

    Unit `device`: one event a round, by_level=((level, p_level, 1), ...).

    Unit `example`: the ledger counts the participations of the *busiest* device of each level.
    The coordinator appends one event whenever some device's number of participations reaches a
    new maximum at its level, with entries (level, q_level, T_level) for just those levels, T_level
    being the local steps of one participation and q_level = batch size / examples. The composition
    over the ledger is then exactly (most participations at l) x T_l steps at q_l. Levels and
    schedules are taken as public: only the content of an example is protected, not whether its
    device has one example more.

    `observer`: against whom the guarantee holds. Who sees less only sees a function of it.

    `group`: the event is about the devices of one gateway only, each of which belongs to no other
    (`Ledger.merge`); None: about all.

    Raises ValueError, in one line, where a field is impossible.
    """

    noise_multiplier: float
    count: int = 1
    sampling: Sampling = "none"
    sampling_rate: float = 1.0
    by_level: tuple[LevelEntry, ...] | None = None
    unit: Unit = "device"
    relation: Relation = "add_remove"
    observer: Observer = "release"
    purpose: str = "sum"
    round: int | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        _check_choices(self.unit, self.relation, self.observer, self.sampling)
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier={self.noise_multiplier} must be finite and >= 0")
        if self.sampling == "fixed_size" and self.relation != "replace_one":
            raise ValueError(
                f"relation={self.relation} cannot be claimed for sampling=fixed_size: "
                "its size is public, so use relation=replace_one"
            )
        _check_entry(self.sampling, self.sampling_rate, self.count, "")
        if self.by_level is not None:
            self._check_levels()

    def _check_levels(self) -> None:
        given = tuple(map(tuple, self.by_level or ()))
        object.__setattr__(self, "by_level", _checked_entries(self.sampling, given))
        if self.count != 1 or self.sampling_rate != 1.0:
            raise ValueError("sampling_rate and count belong into by_level where that is given")


@dataclass(frozen=True, kw_only=True)
class RandomisedReport:
    """Each unit reports one of `options` values: its own with probability `keep`, else any.

    k-ary randomised response (Warner 1965; Kairouz et al. 2014, arXiv:1407.1338): "any" is uniform
    over all `options`, the own value among them. `observer`: who sees single reports.

    Relations: `replace_one`, the unit's value is another; `zero_out`, the unit reports either way,
    its value or a fixed one. Under add/remove a report shows that the unit is there, so
    none is claimed.

    *Guarantee*: `count` reports of a unit are epsilon-DP each, epsilon = `epsilon`, delta = 0.
    *Assumes*: the unit's coins are its own secret; whatever follows (its sampling rate, its clip
    norm) reads the report, never the truth.
    """

    keep: float
    options: int
    count: int = 1
    unit: Unit = "device"
    relation: Relation = "zero_out"
    observer: Observer = "server"
    purpose: str = "activity level"
    round: int | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        _check_choices(self.unit, self.relation, self.observer, "none")
        if self.relation == "add_remove":
            raise ValueError(
                "relation=add_remove cannot be claimed for a report, which shows that the unit "
                "is there: use zero_out or replace_one"
            )
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be in [0, 1]")
        if not _is_whole(self.options) or self.options < 2:
            raise ValueError(f"options={self.options} must be a whole number of at least 2")
        _check_entry("none", 1.0, self.count, "")

    @property
    def epsilon(self) -> float:
        """ln of the likeliest report's probability over an unlikely one's."""
        other = (1 - self.keep) / self.options
        return math.log(self.keep / other + 1) if other else math.inf

    @classmethod
    def from_epsilon(cls, epsilon: float, options: int, **fields: Any) -> RandomisedReport:
        """The report that keeps the truth as often as `epsilon` allows."""
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise ValueError(f"epsilon={epsilon} must be finite and >= 0")
        keep = math.expm1(epsilon) / (math.expm1(epsilon) + options)
        return cls(keep=keep, options=options, **fields)


@dataclass(frozen=True, kw_only=True)
class NonPrivateRelease:
    """Something `observer` sees that no noise protects: epsilon is infinite for it and `unit`.

    Examples: each round's sum before central noise, for observer `server`; a vocabulary read from
    the training text, for `release`. Whoever sees more than `observer` sees it too.
    """

    purpose: str
    unit: Unit = "device"
    observer: Observer = "release"
    round: int | None = None

    def __post_init__(self) -> None:
        _check_choice("unit", self.unit, get_args(Unit))
        _check_choice("observer", self.observer, OBSERVERS)


Event = GaussianEvent | RandomisedReport | NonPrivateRelease
_TYPES: dict[str, type[GaussianEvent] | type[RandomisedReport] | type[NonPrivateRelease]] = {
    "gaussian": GaussianEvent,
    "randomised_report": RandomisedReport,
    "non_private": NonPrivateRelease,
}
_KINDS = {kind: name for name, kind in _TYPES.items()}


def event_to_json(event: Event) -> dict[str, Any]:
    """The event as plain JSON values, with its `type`; defaults that say nothing are left out."""
    fields = {key: value for key, value in vars(event).items() if value is not None}
    if "by_level" in fields:
        fields["by_level"] = [list(entry) for entry in fields["by_level"]]
        del fields["sampling_rate"], fields["count"]
    return {"type": _KINDS[type(event)], **fields}


def event_from_json(fields: Mapping[str, Any]) -> Event:
    """The event that `event_to_json` wrote; raises ValueError naming what is malformed."""
    values = dict(fields)
    kind = values.pop("type", None)
    if kind not in _TYPES:
        raise ValueError(f"event type {kind!r} is unknown: use one of {', '.join(_TYPES)}")
    try:
        if not isinstance(values.get("purpose", ""), str):
            raise TypeError(f"purpose={values['purpose']!r} is no text")
        return _TYPES[kind](**values)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{kind} event is malformed: {error}") from error


@lru_cache(maxsize=64)
def _check_choices(unit: str, relation: str, observer: str, sampling: str) -> None:
    _check_choice("unit", unit, get_args(Unit))
    _check_choice("relation", relation, get_args(Relation))
    _check_choice("observer", observer, OBSERVERS)
    _check_choice("sampling", sampling, get_args(Sampling))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}")


@lru_cache(maxsize=256)
def _checked_entries(sampling: str, given: tuple[Any, ...]) -> tuple[LevelEntry, ...]:
    """Entries with their types; remembered, as every round has the same and one object is enough.

    ValueError where one is impossible or a level comes twice.
    """
    for level, rate, count in given:
        _check_entry(sampling, rate, count, f" at level {level}")
    entries = tuple((int(level), float(rate), int(count)) for level, rate, count in given)
    if len({level for level, _, _ in entries}) < len(entries):
        raise ValueError(f"by_level={entries} lists a level twice")
    return entries


def _check_entry(sampling: str, rate: float, count: int, where: str) -> None:
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"sampling_rate={rate}{where} must be in [0, 1]")
    if sampling == "none" and rate != 1.0:
        raise ValueError(f"sampling_rate={rate}{where} must be 1 with sampling=none")
    if not _is_whole(count) or count < 0:
        raise ValueError(f"count={count}{where} must be a whole number >= 0")


def _is_whole(value: float) -> bool:
    return not isinstance(value, bool) and math.isfinite(value) and int(value) == value
