"""Who took part how often: what example-level accounting and the participation bound read.

A device's rounds compose for its examples' privacy, so the worst case of a level is its most
frequent participant. Counts are kept for devices that took part at least once, nobody else.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Participation:
    """Rounds taken part in, by device. `limit`: most rounds a device may join, or None."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.devices: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.counts: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self.worst: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.devices)

    def allowed(self, devices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `devices` (sorted) that may still take part."""
        if self.limit is None or not len(self.devices):
            return devices
        at = np.minimum(np.searchsorted(self.devices, devices), len(self.devices) - 1)
        seen = np.where(self.devices[at] == devices, self.counts[at], 0)
        return devices[seen < self.limit]

    def may_rise(self, level: int) -> bool:
        """Whether the next round could raise the worst count of `level`."""
        return self.limit is None or self.worst.get(level, 0) < self.limit

    def add(self, devices: NDArray[np.int64], levels: NDArray[np.uint8]) -> list[int]:
        """Count one more round for `devices` (sorted, unique); levels whose worst count rose."""
        merged = np.union1d(self.devices, devices)
        counts = np.zeros(len(merged), dtype=np.int32)
        counts[np.searchsorted(merged, self.devices)] = self.counts
        here = np.searchsorted(merged, devices)
        counts[here] += 1
        self.devices, self.counts = merged, counts
        risen = []
        for level in np.unique(levels).tolist():
            worst = int(counts[here[levels == level]].max())
            if worst > self.worst.get(level, 0):
                self.worst[level] = worst
                risen.append(level)
        return risen

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load` restores."""
        worst = sorted(self.worst.items())
        return {
            "devices": torch.from_numpy(self.devices),
            "counts": torch.from_numpy(self.counts),
            "worst": torch.tensor(worst, dtype=torch.int64).reshape(len(worst), 2),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.devices = state["devices"].numpy().astype(np.int64)
        self.counts = state["counts"].numpy().astype(np.int32)
        self.worst = {int(level): int(count) for level, count in state["worst"].tolist()}
