"""Who may take part when: the only thing that a claim without sampling rests on.

Source: b-min-separation with at most k participations, Choquette-Choo et al. 2023,
arXiv:2306.08153, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A bound on one unit's participations in a run of `rounds` rounds.

    Two participations are at least `min_separation` rounds apart (1: any two rounds), and there are
    at most `max_participations` (None: as many as fit). Raises ValueError for impossible values.
    """

    rounds: int
    min_separation: int = 1
    max_participations: int | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "min_separation", "max_participations"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
                raise ValueError(f"{name}={value} must be a whole number of at least 1")
        if self.min_separation > self.rounds:
            raise ValueError(
                f"min_separation={self.min_separation} is more than rounds={self.rounds}: "
                f"for one participation at most set min_separation={self.rounds}"
            )

    @property
    def participations(self) -> int:
        """The most rounds that one unit can be in."""
        fitting = 1 + (self.rounds - 1) // self.min_separation
        return min(fitting, self.max_participations or fitting)

    def all_allowed(self) -> Iterator[tuple[int, ...]]:
        """Every allowed set of rounds (from 0), the empty one included: for small schedules."""
        yield from self._after((), 0)

    def _after(self, taken: tuple[int, ...], first: int) -> Iterator[tuple[int, ...]]:
        yield taken
        if len(taken) < self.participations:
            for at in range(first, self.rounds):
                yield from self._after((*taken, at), at + self.min_separation)
