"""Examples as flat arrays: what populations hand out and tasks collate.

A cohort's examples are one array of word indices with offsets, never a list of Python objects: a
thousand devices are gathered, shipped and padded by a handful of numpy calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Schema:
    """Public label sets of a population; empty where it has no labels.

    `slots` are BIO tags, `"O"` first.
    """

    intents: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Examples of several devices, in device order.

    `tokens`: (total tokens,) int32, indices into the population's word table. `offsets`:
    (examples + 1,) int64. `device_offsets`: (devices + 1,) int64, into examples. `intent`:
    (examples,) int32 or None. `slots`: (total tokens,) int32 or None.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    device_offsets: NDArray[np.int64]
    intent: NDArray[np.int32] | None = None
    slots: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def devices(self) -> int:
        return len(self.device_offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(examples,) tokens of each example."""
        return np.diff(self.offsets)

    def take(self, rows: NDArray[np.int64]) -> Examples:
        """The examples at `rows`, in that order, as the data of one device."""
        positions, offsets = gather_ranges(self.offsets, rows)
        return Examples(
            tokens=self.tokens[positions],
            offsets=offsets,
            device_offsets=np.array([0, len(rows)], dtype=np.int64),
            intent=None if self.intent is None else self.intent[rows],
            slots=None if self.slots is None else self.slots[positions],
        )


def gather_ranges(
    offsets: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the ranges `offsets[r]:offsets[r + 1]` end to end, and their new offsets."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    new = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=new[1:])
    positions = np.arange(new[-1], dtype=np.int64) + np.repeat(starts - new[:-1], lengths)
    return positions, new
