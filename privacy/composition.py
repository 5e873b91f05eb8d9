"""What the devices of one activity level went through: a run's events, sorted and added up.

A `Tally` reads events; a `Composition` is what an accountant needs of them, for one unit, one
observer and one level: which kinds of step, with what noise and rate, and how many of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.events import OBSERVERS, Event, GaussianEvent, NonPrivateRelease

Kind = Literal["poisson", "poisson_replace", "revealed", "fixed_size", "none"]

LEAST_NOISE = 1e-3
"""Noise multipliers below this count as no noise: epsilon would be beyond 10^5."""
ALWAYS = 1 - 1e-9
"""A rate from here on counts as 1."""
MAX_CLASSES = 20
"""Distinct (noise, rate) pairs that are composed exactly; more are rounded into so many."""


@dataclass(frozen=True, order=True)
class Step:
    """One release to which a unit is subjected.

    `noise`: deviation over the sensitivity under the relation claimed (doubled for replace-one).

    Kinds: `poisson`: drawn by a secret coin of probability `rate`. `poisson_replace`: the same
    under replace-one; its neighbours lie on either side of zero, so `noise` stays the ratio under
    add/remove. `revealed`: drawn by such a coin, which the observer may see. `fixed_size`: drawn
    without replacement. `none`: always.
    """

    kind: Kind
    noise: float
    rate: float


Composition = tuple[tuple[Step, int], ...]
"""Steps with their counts, sorted; empty: nothing was released."""

NON_PRIVATE: Composition = ((Step("none", 0.0, 1.0), 1),)
"""Something was released that no noise protects."""

_Source = tuple[str, str, float, float]  # sampling, relation, noise multiplier, rate


@dataclass
class _Group:
    """Counts of one (unit, observer, purpose): those for every level, and for single levels."""

    everywhere: Counter[_Source] = field(default_factory=Counter)
    by_level: dict[int, Counter[_Source]] = field(default_factory=dict)

    def add(self, event: GaussianEvent) -> None:
        facts = (event.sampling, event.relation, event.noise_multiplier)
        if event.by_level is None:
            self.everywhere[(*facts, event.sampling_rate)] += event.count
        for level, rate, count in event.by_level or ():
            self.by_level.setdefault(level, Counter())[(*facts, rate)] += count

    def at(self, level: int | None) -> Counter[_Source]:
        if level is None or level not in self.by_level:
            return self.everywhere
        return self.everywhere + self.by_level[level]

    def sources(self) -> Iterator[_Source]:
        yield from self.everywhere
        for counts in self.by_level.values():
            yield from counts

    def copy(self) -> _Group:
        levels = {level: counts.copy() for level, counts in self.by_level.items()}
        return _Group(self.everywhere.copy(), levels)


class Tally:
    """Events added up by unit, observer, purpose and level; adding one more is cheap."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._groups: dict[tuple[str, str, str], _Group] = {}
        self._exposed: set[tuple[str, str]] = set()
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        if isinstance(event, NonPrivateRelease):
            self._exposed.add((event.unit, event.observer))
        else:
            key = (event.unit, event.observer, event.purpose)
            self._groups.setdefault(key, _Group()).add(event)

    def plus(self, event: Event) -> Tally:
        """A copy with one event more."""
        other = Tally()
        other._groups = {key: group.copy() for key, group in self._groups.items()}
        other._exposed = set(self._exposed)
        other.add(event)
        return other

    @property
    def seen(self) -> set[tuple[str, str]]:
        """(unit, observer) of every event."""
        return {(unit, observer) for unit, observer, _ in self._groups} | self._exposed

    def resolve(self, unit: str | None, observer: str | None) -> tuple[str, str]:
        """The unit and observer meant: those named, else the only ones, else `release`.

        Raises ConfigError where events protect different units and none is named.
        """
        units = sorted({u for u, _ in self.seen})
        if unit is None and len(units) > 1:
            raise ConfigError(
                f"events are about {' and '.join(units)}: choose one with unit=, "
                "their epsilons do not add up"
            )
        unit = unit or (units[0] if units else "device")
        observers = {o for u, o in self.seen if u == unit}
        return unit, observer or (observers.pop() if len(observers) == 1 else "release")

    def levels(self, unit: str) -> set[int]:
        """Activity levels that some event of `unit` lists."""
        groups = (group for (u, _, _), group in self._groups.items() if u == unit)
        return {level for group in groups for level in group.by_level}

    def rate(self, unit: str, level: int | None) -> float:
        """The largest rate at which `level` was sampled for `unit`; 1 where it was not sampled."""
        groups = [group.at(level) for (u, _, _), group in self._groups.items() if u == unit]
        counts: Counter[_Source] = sum(groups, Counter())
        sampled = [rate for (sampling, _, _, rate) in counts if sampling != "none"]
        return max(sampled, default=1.0 if counts else 0.0)

    def relation(self, unit: str) -> str:
        """The neighbouring relation under which everything about `unit` is accounted together."""
        groups = [group for (u, _, _), group in self._groups.items() if u == unit]
        found = {source[1] for group in groups for source in group.sources()}
        for relation in ("replace_one", "zero_out"):
            if relation in found:
                return relation
        return "add_remove"

    def composition(self, unit: str, observer: str, level: int | None) -> Composition:
        """What a unit at `level` (None: at a level that no event lists) is subjected to.

        Of each purpose, those events count that were recorded for `observer` or, failing that, for
        the next one who sees more: `observer` sees a function of what that one sees. What is
        recorded only for one who sees less comes with no guarantee against `observer`, and a unit
        that no event protects has none at all: both are `NON_PRIVATE`.
        """
        if not self.seen:
            return ()
        rank = _rank(observer)
        if any(u == unit and _rank(o) <= rank for u, o in self._exposed):
            return NON_PRIVATE
        purposes = {p for u, _, p in self._groups if u == unit}
        nearest = [self._nearest(unit, purpose, rank) for purpose in sorted(purposes)]
        counts: Counter[_Source] = Counter()
        for group in nearest:
            if group is None:
                return NON_PRIVATE
            counts.update(group.at(level))
        return _normalised(counts) if nearest else NON_PRIVATE

    def compositions(self, unit: str, observer: str) -> dict[int | None, Composition]:
        """The composition of each level that events list; under None where they list none."""
        levels: list[int | None] = [*sorted(self.levels(unit))] or [None]
        return {level: self.composition(unit, observer, level) for level in levels}

    def _nearest(self, unit: str, purpose: str, rank: int) -> _Group | None:
        groups = (self._groups.get((unit, o, purpose)) for o in OBSERVERS[rank:])
        return next((group for group in groups if group is not None), None)


def _rank(observer: str) -> int:
    """Place in `OBSERVERS`, in which everyone sees what those before see."""
    if observer not in OBSERVERS:
        raise ConfigError(f"observer={observer!r} is unknown: use one of {', '.join(OBSERVERS)}")
    return [str(o) for o in OBSERVERS].index(observer)


def _normalised(counts: Counter[_Source]) -> Composition:
    """Steps under one relation; what is not sampled is merged into a single Gaussian."""
    replace_one = any(relation == "replace_one" for _, relation, _, _ in counts)
    steps: Counter[Step] = Counter()
    unsampled = 0.0
    for (sampling, relation, noise, rate), count in counts.items():
        if count == 0 or rate == 0.0:
            continue
        step = _step(sampling, relation, noise, rate, replace_one)
        if step.noise < LEAST_NOISE:
            return NON_PRIVATE
        if step.kind == "none":
            unsampled += count / step.noise**2
        else:
            steps[step] += count
    found = bucketed(steps)
    if unsampled:
        found.append((Step("none", unsampled**-0.5, 1.0), 1))
    return tuple(sorted(found))


def _step(sampling: str, relation: str, noise: float, rate: float, replace_one: bool) -> Step:
    """A step under add/remove and zero-out, or, where a run needs it, under replace-one."""
    doubled = noise / 2 if replace_one else noise
    if sampling == "none" or rate >= ALWAYS:
        return Step("none", doubled, 1.0)
    if sampling == "fixed_size":
        return Step("fixed_size", doubled, rate)
    if relation == "zero_out":
        return Step("revealed", doubled, rate)
    return Step("poisson_replace", noise, rate) if replace_one else Step("poisson", noise, rate)


def bucketed(steps: Counter[Step], classes: int = MAX_CLASSES) -> list[tuple[Step, int]]:
    """At most about `classes` steps that cost no less: noise rounded down, rates rounded up.

    A grid in log noise and log rate is widened until few cells are occupied; the steps of a cell
    take its least noise and its greatest rate, both of which only raise epsilon.
    """
    width = 0.01
    merged = dict(steps)
    while len(merged) > classes * len({step.kind for step in steps}):
        cells: dict[tuple[str, int, int], list[Step]] = {}
        for step in steps:
            place = (step.kind, _cell(step.noise, width), _cell(step.rate, width))
            cells.setdefault(place, []).append(step)
        merged = {}
        for members in cells.values():
            worst = replace(
                members[0],
                noise=min(step.noise for step in members),
                rate=max(step.rate for step in members),
            )
            merged[worst] = merged.get(worst, 0) + sum(steps[step] for step in members)
        width *= 1.25
    return list(merged.items())


def _cell(value: float, width: float) -> int:
    return math.floor(math.log(value) / width)


def dominates(costly: Composition, other: Composition) -> bool:
    """Whether `other` plainly costs no more: step by step less often, rarer or noisier."""
    if len(costly) != len(other):
        return False
    return all(
        a.kind == b.kind and a.noise <= b.noise and a.rate >= b.rate and m >= n
        for (a, m), (b, n) in zip(costly, other, strict=True)
    )
