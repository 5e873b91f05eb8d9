"""Who took part how often and when: what example-level accounting and participation bounds read.

A device's rounds compose for its examples' privacy, so the worst case of a level is its most
frequent participant. Counts are kept for devices that took part at least once, nobody else.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Participation:
    """Rounds taken part in, by device.

    `limit`: most rounds a device may join, or None. `separation`: a device that took part in round
    r is not asked again before round r + separation, or None. These are what a claim without
    sampling rests on: whatever a sampler draws passes through `allowed`.
    """

    def __init__(self, limit: int | None = None, separation: int | None = None) -> None:
        self.limit, self.separation = limit, separation
        self.devices: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.counts: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self.last: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        self.worst: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.devices)

    def barred(self, server_round: int = 0) -> NDArray[np.int64]:
        """Sorted ids of the devices that may not take part in `server_round`."""
        barred = np.zeros(len(self.devices), dtype=bool)
        if self.limit is not None:
            barred |= self.counts >= self.limit
        if self.separation is not None:
            barred |= server_round - self.last < self.separation
        return self.devices[barred]

    def allowed(self, devices: NDArray[np.int64], server_round: int = 0) -> NDArray[np.int64]:
        """Those of `devices` (sorted) that may take part in `server_round`."""
        return devices[~np.isin(devices, self.barred(server_round), assume_unique=True)]

    def may_rise(self, level: int) -> bool:
        """Whether the next round could raise the worst count of `level`."""
        return self.limit is None or self.worst.get(level, 0) < self.limit

    def add(
        self, devices: NDArray[np.int64], levels: NDArray[np.uint8], server_round: int = 0
    ) -> list[int]:
        """Count one more round for `devices` (sorted, unique); levels whose worst count rose."""
        at = np.searchsorted(self.devices, devices)
        known = np.append(self.devices, -1)[at] == devices
        self._insert(devices[~known], at[~known])
        here = np.searchsorted(self.devices, devices)
        self.counts[here] += 1
        self.last[here] = server_round
        risen = []
        for level in np.unique(levels).tolist():
            worst = int(self.counts[here[levels == level]].max())
            if worst > self.worst.get(level, 0):
                self.worst[level] = worst
                risen.append(level)
        return risen

    def _insert(self, fresh: NDArray[np.int64], at: NDArray[np.int64]) -> None:
        """Make room for devices that took part never before, in front of places `at`."""
        first = np.append(True, fresh[1:] != fresh[:-1])[: len(fresh)]
        fresh, at = fresh[first], at[first]
        if not len(fresh):
            return
        places = at + np.arange(len(fresh))
        old = np.ones(len(self.devices) + len(fresh), dtype=bool)
        old[places] = False
        devices, (counts, last) = np.empty(len(old), np.int64), np.zeros((2, len(old)), np.int32)
        devices[places], devices[old] = fresh, self.devices
        counts[old], last[old] = self.counts, self.last
        self.devices, self.counts, self.last = devices, counts, last

    def state(self) -> dict[str, Tensor]:
        """Tensors that `load` restores."""
        worst = sorted(self.worst.items())
        return {
            "devices": torch.from_numpy(self.devices.copy()),
            "counts": torch.from_numpy(self.counts.copy()),
            "last": torch.from_numpy(self.last.copy()),
            "worst": torch.tensor(worst, dtype=torch.int64).reshape(len(worst), 2),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.devices = state["devices"].numpy().astype(np.int64)
        self.counts = state["counts"].numpy().astype(np.int32)
        last = state.get("last", torch.zeros(len(self.devices)))  # older checkpoints have none
        self.last = last.numpy().astype(np.int32)
        self.worst = {int(level): int(count) for level, count in state["worst"].tolist()}
