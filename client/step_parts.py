"""How the rows of a step are divided into passes, so that little of a pass is padding.

Poisson batches differ in size from device to device, and examples in length. Clipped sums add up
over any division of the rows, so a division changes nothing but cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sottovoce.client.groups import GroupData, length_buckets
from sottovoce.privacy.layers import native_lstm

PASS_OPERATIONS = 5e8  # that a processor does in the time that a pass costs beside arithmetic


@dataclass
class Part:
    """Rows of a step of some devices: `rows` (n, B), who is `present`, and their weights.

    `chosen`: (n,) places of the devices among those that take the step, None for all of them.
    """

    number: int
    rows: NDArray[np.int64]
    present: NDArray[np.bool_]
    weights: NDArray[np.float32]
    chosen: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, data: GroupData, number: int, devices: int) -> Part:
        """All rows of step `number` of the first `devices`; every row weighs 1."""
        rows = data.rows[number][:devices]
        present = rows != len(data.batch["lengths"]) - 1
        return cls(number, rows, present, present.astype(np.float32))

    def average(self) -> None:
        """Let every row weigh one part of its device's rows."""
        self.weights = self.present / np.maximum(
            self.present.sum(axis=1, keepdims=True, dtype=np.float32), 1
        )

    def fillers(self) -> NDArray[np.int64]:
        """(n,) rows at the left of each device's that are not there."""
        there = np.logical_or.accumulate(self.present, axis=1)
        absent: NDArray[np.int64] = (~there).sum(axis=1, dtype=np.int64)
        return absent

    def cut(self, columns: slice, devices: NDArray[np.int64] | None = None) -> Part:
        """Some columns, of all devices here or of those at some places among them."""
        own: NDArray[np.int64] | slice = slice(None) if devices is None else devices
        chosen = devices if self.chosen is None else self.chosen[own]
        rows, present, weights = self.rows[own], self.present[own], self.weights[own]
        return Part(
            self.number, rows[:, columns], present[:, columns], weights[:, columns], chosen
        )


def by_size(part: Part, pass_rows: float, depth: int = 2) -> list[Part]:
    """The part in up to `depth` + 1: the last columns of all devices, the others of who has them.

    `pass_rows`: rows whose arithmetic costs as much as a pass does beside it. Rows stand at the
    right of `part.rows`, fillers at the left.
    """
    devices, width = part.rows.shape
    if depth == 0 or width < 2 or devices < 2:
        return [part]
    sizes = part.present.sum(axis=1)
    kept = np.arange(1, width)
    bigger = (sizes[:, None] > kept).sum(axis=0)
    costs = devices * kept + bigger * (width - kept) + pass_rows
    best = int(costs.argmin())
    if costs[best] >= devices * width:
        return [part]
    columns = int(kept[best])
    rest = part.cut(slice(0, width - columns), np.flatnonzero(sizes > columns))
    return [part.cut(slice(width - columns, width)), *by_size(rest, pass_rows, depth - 1)]


def by_length(part: Part, lengths: NDArray[np.int64]) -> list[Part]:
    """The part in one or two: short rows and long ones. `lengths`: of all rows of the batch."""
    buckets = length_buckets(lengths[part.rows])
    return [part] if len(buckets) == 1 else [part.cut(columns) for columns in buckets]


def pass_rows(model: nn.Module, positions: int, table: str | None) -> float:
    """Rows of `positions` each whose arithmetic costs as much as a pass does beside it.

    Layers that pass over fillers (`Tape.fillers`) have no part in it.
    """
    spared = {
        id(parameter) for module in model.modules() if isinstance(module, nn.LSTM)
        for parameter in module.parameters() if native_lstm.suited(parameter)
    }
    weights = sum(
        p.numel() for name, p in model.named_parameters() if name != table and id(p) not in spared
    )
    return PASS_OPERATIONS / max(1, 6 * weights * positions)
