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
from sottovoce.privacy.accounting.events import (
    OBSERVERS,
    Event,
    GaussianEvent,
    NonPrivateRelease,
    RandomisedReport,
)

Kind = Literal["poisson", "poisson_replace", "revealed", "fixed_size", "none", "report"]

LEAST_NOISE = 1e-3
"""Noise multipliers below this count as no noise: epsilon would be beyond 10^5."""
MOST_NOISE = 1e100
"""Noise multipliers above this count as this, whose square is still a number."""
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

Place = tuple[int | None, str | None]
"""Activity level and group of devices; None: at no level that events list, in no group."""

_Source = tuple[str, str, float, float]  # sampling, relation, noise multiplier, rate
_REPORT = "report"
_MANY = 400
"""Different sources of a level beyond which they are kept on a grid only."""


@dataclass
class _Group:
    """Counts of one (unit, observer, purpose, group): for every level, and for single levels."""

    everywhere: Counter[_Source] = field(default_factory=Counter)
    by_level: dict[int, Counter[_Source]] = field(default_factory=dict)
    rounds: set[int | None] = field(default_factory=set)

    def add(self, event: GaussianEvent | RandomisedReport) -> None:
        self.rounds.add(event.round)
        if isinstance(event, RandomisedReport):
            noise = 1 / event.epsilon if event.epsilon else math.inf
            _count(self.everywhere, (_REPORT, event.relation, noise, 1.0), event.count)
            return
        facts = (event.sampling, event.relation, event.noise_multiplier)
        if event.by_level is None:
            _count(self.everywhere, (*facts, event.sampling_rate), event.count)
        for level, rate, count in event.by_level or ():
            _count(self.by_level.setdefault(level, Counter()), (*facts, rate), count)

    def at(self, level: int | None) -> Counter[_Source]:
        if level is None or level not in self.by_level:
            return self.everywhere
        return self.everywhere + self.by_level[level]

    def copy(self) -> _Group:
        levels = {level: counts.copy() for level, counts in self.by_level.items()}
        return _Group(self.everywhere.copy(), levels, self.rounds.copy())


def _count(counts: Counter[_Source], source: _Source, count: int) -> None:
    """Add to `counts`; where they are many, on a grid that only raises epsilon.

    Schedules that never repeat a noise would make every round dearer to account than the last:
    the noise is rounded down and the rate up by at most 0.2 % each.
    """
    if source not in counts and len(counts) >= _MANY:
        sampling, relation, noise, rate = source
        if 0 < noise < math.inf and rate > 0:
            noise = min(noise, math.exp(_cell(noise, 0.002) * 0.002))
            rate = min(1.0, max(rate, math.exp((_cell(rate, 0.002) + 1) * 0.002)))
            source = (sampling, relation, noise, 1.0 if sampling == "none" else rate)
    counts[source] += count


class Tally:
    """Events added up by unit, observer, purpose, group and level; adding one more is cheap."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._groups: dict[tuple[str, str, str, str | None], _Group] = {}
        self._exposed: set[tuple[str, str]] = set()
        self._relations: set[tuple[str, str]] = set()
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        if isinstance(event, NonPrivateRelease):
            self._exposed.add((event.unit, event.observer))
        else:
            self._relations.add((event.unit, event.relation))
            key = (event.unit, event.observer, event.purpose, event.group)
            self._groups.setdefault(key, _Group()).add(event)

    def plus(self, event: Event) -> Tally:
        """A copy with one event more."""
        other = Tally()
        other._groups = {key: group.copy() for key, group in self._groups.items()}
        other._exposed, other._relations = set(self._exposed), set(self._relations)
        other.add(event)
        return other

    @property
    def seen(self) -> set[tuple[str, str]]:
        """(unit, observer) of every event."""
        return {(unit, observer) for unit, observer, *_ in self._groups} | self._exposed

    def touched(self, unit: str, observer: str) -> bool:
        """Whether anything about `unit` was released that `observer` sees, noised or not."""
        return any(u == unit for u, *_ in self._groups) or self._is_exposed(unit, observer)

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
        return {level for group in self._of(unit) for level in group.by_level}

    def groups(self, unit: str) -> list[str | None]:
        """Groups of devices that events of `unit` tell apart; [None] where they tell none."""
        found = {name for u, _, _, name in self._groups if u == unit and name is not None}
        return [*sorted(found)] or [None]

    def rate(self, unit: str, level: int | None) -> float:
        """The largest rate at which `level` was sampled for `unit`; 1 where it was not sampled."""
        counts: Counter[_Source] = sum((g.at(level) for g in self._of(unit)), Counter())
        sampled = [r for (sampling, _, _, r) in counts if sampling not in ("none", _REPORT)]
        return max(sampled, default=1.0 if counts else 0.0)

    def relation(self, unit: str) -> str:
        """The neighbouring relation under which everything about `unit` is accounted together."""
        for relation in ("replace_one", "zero_out"):
            if (unit, relation) in self._relations:
                return relation
        return "add_remove"

    def composition(
        self, unit: str, observer: str, level: int | None, group: str | None = None
    ) -> Composition:
        """What a unit at `level` (None: at a level that no event lists) is subjected to.

        Of each purpose, those events count that were recorded for `observer` or, failing that, for
        the next one who sees more: `observer` sees a function of what that one sees. Events of one
        purpose are two views of one release only in the same numbered round; where those for
        someone who sees more have another round, or none, they count as well. What is
        recorded only for one who sees less comes with no guarantee against `observer`, and a unit
        that no event protects has none at all: both are `NON_PRIVATE`.

        `group`: of devices of that group, to whom what is recorded for other groups does nothing
        (parallel composition: who is in which group does not hang on the data).
        """
        if not self.seen:
            return ()
        rank = _rank(observer)
        if self._is_exposed(unit, observer):
            return NON_PRIVATE
        purposes = {(p, g) for u, _, p, g in self._groups if u == unit and g in (None, group)}
        counts: Counter[_Source] = Counter()
        for purpose in sorted(purposes, key=str):
            found = self._nearest(unit, *purpose, rank)
            if not found:
                return NON_PRIVATE
            for view in found:
                counts.update(view.at(level))
        return _normalised(counts, self.relation(unit)) if purposes else NON_PRIVATE

    def compositions(
        self, unit: str, observer: str, level: int | None = None
    ) -> dict[Place, Composition]:
        """The composition of each group at each level (or at the one given) that events list."""
        levels: list[int | None] = [*sorted(self.levels(unit))] or [None]
        return {
            (at, group): self.composition(unit, observer, at, group)
            for at in (levels if level is None else [level])
            for group in self.groups(unit)
        }

    def _of(self, unit: str) -> Iterator[_Group]:
        return (group for (u, *_), group in self._groups.items() if u == unit)

    def _is_exposed(self, unit: str, observer: str) -> bool:
        return any(u == unit and _rank(o) <= _rank(observer) for u, o in self._exposed)

    def _nearest(self, unit: str, purpose: str, group: str | None, rank: int) -> list[_Group]:
        """What was recorded of a purpose for whoever sees no less, releases seen twice once.

        Empty where some release of it was recorded for one who sees less only.
        """
        views = [self._groups.get((unit, o, purpose, group)) for o in OBSERVERS]
        less = [view for view in views[:rank] if view is not None]
        found = [view for view in views[rank:] if view is not None]
        if not less and len(found) == 1:
            return found  # nothing was seen twice
        kept: list[_Group] = []
        covered: set[int | None] = set()
        for view in found:
            if not view.rounds <= covered:
                kept.append(view)
                covered |= view.rounds - {None}
        return kept if all(view.rounds <= covered for view in less) else []


def _rank(observer: str) -> int:
    """Place in `OBSERVERS`, in which everyone sees what those before see."""
    if observer not in OBSERVERS:
        raise ConfigError(f"observer={observer!r} is unknown: use one of {', '.join(OBSERVERS)}")
    return [str(o) for o in OBSERVERS].index(observer)


def _normalised(counts: Counter[_Source], relation: str) -> Composition:
    """Steps under `relation`; what is not sampled is merged into a single Gaussian."""
    replace_one = relation == "replace_one"
    steps: Counter[Step] = Counter()
    unsampled = 0.0
    for (sampling, stated, noise, rate), count in counts.items():
        if count == 0 or rate == 0.0 or noise == math.inf:
            continue
        step = _step(sampling, stated, min(noise, MOST_NOISE), rate, replace_one)
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
    if sampling == _REPORT:
        return Step("report", noise, 1.0)
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
