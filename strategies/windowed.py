"""Participation on a timeline: what an example is subjected to while its device keeps it.

An example lives for `retention` periods. Of all participations of its device only those in that
window touch it, and the device may be at another level in each of its periods. The ledger's rows
for the example unit are therefore *profiles*: (lowest level, highest level) of a window's
participations. For each profile it holds how often at most a device took part at each level,

    a[profile][level] = max over devices with that profile of participations at level in the window

and whenever such a maximum rises by one, one participation at that level is booked on the profile's
row. A row with one level alone is that of devices that stay there; its number is the level's own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.simulations.timeline import Timeline
from sottovoce.strategies.levels import MAX_LEVEL
from sottovoce.strategies.participation import Participation

LEVELS = MAX_LEVEL + 1
ROWS = LEVELS + LEVELS * LEVELS

Row = tuple[int, int]
"""(row of the ledger, level at which its examples take part once more)."""


class WindowedParticipation(Participation):
    """Rounds taken part in, by device, period of the window and level.

    `limit`: most rounds of a device over the whole run, or None.

    *Guarantee*: after `raised` was booked, what any example was subjected to is, level by level, no
    more than what the row of its device's profile has: the profile of the window in which the
    device last trained on it holds all participations that touched it, is covered by its row then,
    and rows only grow. Booking both under one noise multiplier, the row composes no fewer of each
    level's steps.
    *Assumes*: devices delete what has left the window; a device's level is constant in a period.
    """

    def __init__(self, timeline: Timeline, limit: int | None = None) -> None:
        super().__init__(limit)
        self.timeline = timeline
        self.width = min(timeline.retention, timeline.periods)
        self.last_round = 0
        self.taken: NDArray[np.int32] = np.zeros((0, self.width), dtype=np.int32)
        self.at_level: NDArray[np.uint8] = np.zeros((0, self.width), dtype=np.uint8)
        self.rows: NDArray[np.int32] = np.zeros((ROWS, LEVELS), dtype=np.int32)

    @property
    def next_round(self) -> int:
        return self.last_round + 1

    def raised(
        self, devices: NDArray[np.int64], levels: NDArray[np.uint8], server_round: int
    ) -> list[list[Row]]:
        """Count one more round for `devices` (sorted, unique) at `levels`.

        What to book: lists of rows that are raised by one participation each, no row twice in one.
        """
        before = self.devices
        self.add(devices, levels, server_round)
        taken, at_level = self._moved_to(server_round)
        place = np.searchsorted(self.devices, before)
        self.taken = np.zeros((len(self.devices), self.width), dtype=np.int32)
        self.at_level = np.zeros((len(self.devices), self.width), dtype=np.uint8)
        self.taken[place], self.at_level[place] = taken, at_level
        self.last_round = server_round
        here = np.searchsorted(self.devices, devices)
        self.taken[here, -1] += 1
        self.at_level[here, -1] = levels
        needed = _needed(self.taken[here], self.at_level[here])
        rises = np.maximum(needed - self.rows, 0)
        self.rows += rises
        return _one_by_one(rises)

    def ahead(self, levels_of: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> list[list[Row]]:
        """The most that the next round can raise, whoever takes part.

        `levels_of`: level of each device in that round, -1 where it holds nothing.
        """
        taken, at_level = self._moved_to(self.next_round)
        levels = levels_of(self.devices)
        able = (levels >= 0) & ((self.counts < self.limit) if self.limit is not None else True)
        taken, at_level = taken[able].copy(), at_level[able].copy()
        taken[:, -1] += 1
        at_level[:, -1] = levels[able]
        needed = _needed(taken, at_level)
        newcomers = np.arange(LEVELS)
        needed[newcomers, newcomers] = np.maximum(needed[newcomers, newcomers], 1)
        return _one_by_one(np.maximum(needed - self.rows, 0))

    def _moved_to(self, server_round: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Participations of the window of `server_round`, the oldest period first."""
        period = self.timeline.period_of
        by = min(period(server_round) - period(self.last_round), self.width)
        if by == 0:
            return self.taken, self.at_level
        taken, at_level = np.zeros_like(self.taken), np.zeros_like(self.at_level)
        taken[:, : self.width - by] = self.taken[:, by:]
        at_level[:, : self.width - by] = self.at_level[:, by:]
        return taken, at_level

    def state(self) -> dict[str, Tensor]:
        return super().state() | {
            "taken": torch.from_numpy(self.taken),
            "at_level": torch.from_numpy(self.at_level),
            "rows": torch.from_numpy(self.rows),
            "last_round": torch.tensor([self.last_round]),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        super().load(state)
        self.taken = state["taken"].numpy().astype(np.int32)
        self.at_level = state["at_level"].numpy().astype(np.uint8)
        self.rows = state["rows"].numpy().astype(np.int32)
        self.last_round = int(state["last_round"][0])


def _needed(taken: NDArray[np.int32], at_level: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(ROWS, LEVELS) what rows must hold to cover devices with these participations.

    `taken`, `at_level`: (devices, periods).
    """
    needed = np.zeros((ROWS, LEVELS), dtype=np.int32)
    if not len(taken):
        return needed
    profiles = np.zeros((len(taken), LEVELS), dtype=np.int32)
    for slot in range(taken.shape[1]):
        profiles[np.arange(len(taken)), at_level[:, slot]] += taken[:, slot]
    lowest = (profiles > 0).argmax(axis=1)
    highest = MAX_LEVEL - (profiles[:, ::-1] > 0).argmax(axis=1)
    rows = np.where(lowest == highest, lowest, LEVELS + lowest * LEVELS + highest)
    np.maximum.at(needed, rows, profiles)
    return needed


def _one_by_one(rises: NDArray[np.int32]) -> list[list[Row]]:
    """Rises, (ROWS, LEVELS), as lists of single ones; a row is at most once in each list."""
    found: list[list[Row]] = []
    for row in np.flatnonzero(rises.any(axis=1)).tolist():
        ones = [level for level in range(LEVELS) for _ in range(int(rises[row, level]))]
        for place, level in enumerate(ones):
            if place == len(found):
                found.append([])
            found[place].append((row, level))
    return found
