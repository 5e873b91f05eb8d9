"""Activity levels: the public buckets in which devices report how much they have.

Level l stands for a device with n in [2**l, 2**(l+1)) training examples; the last level is open.
A device says its level, never its count; sampling, local plans and accounting read levels only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_LEVEL = 15


def activity_levels(activity: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Level of each device: floor(log2(activity)), at most `MAX_LEVEL`.

    `activity`: (devices,) integers >= 1; raises ValueError where one is below 1.
    """
    if len(activity) and int(activity.min()) < 1:
        device = int(np.argmin(activity))
        raise ValueError(f"device {device} has no examples: every device needs at least one")
    bounds = np.array([2**level for level in range(1, MAX_LEVEL + 1)], dtype=np.int64)
    largest = int(activity.max()) if len(activity) else 1
    table = np.searchsorted(bounds, np.arange(min(largest, 2**MAX_LEVEL) + 1), side="right")
    clipped = np.minimum(activity, len(table) - 1)
    found: NDArray[np.uint8] = table.astype(np.uint8)[clipped]
    return found


def row_of(lowest: int, highest: int) -> int:
    """The ledger's row for devices that were at levels from `lowest` to `highest`.

    The level's own number for those that stayed; beyond `MAX_LEVEL` for others.
    """
    levels = MAX_LEVEL + 1
    return lowest if lowest == highest else levels + lowest * levels + highest


def levels_of_row(row: int) -> tuple[int, int]:
    """(lowest, highest) level of a row."""
    return (row, row) if row <= MAX_LEVEL else divmod(row - MAX_LEVEL - 1, MAX_LEVEL + 1)


def row_text(row: int) -> str:
    """A row's name: the level, or "3 to 5" for devices that moved between these."""
    low, high = levels_of_row(row)
    return str(low) if low == high else f"{low} to {high}"


def level_size(level: int) -> int:
    """Smallest number of examples of a device at `level`."""
    return 1 << level


def representative_size(level: int) -> float:
    """Public stand-in for the number of examples of a device at `level`: the middle of its range.

    1, 2.5, 5.5, 11.5, ... for levels 0, 1, 2, 3, ...
    """
    return (level_size(level) + level_size(level + 1) - 1) / 2
