"""What the coordinator notes of canary devices, from the releases that it publishes.

Every round: the inner product of what moves the model (times its public divisor, so a noised sum
again) with each canary's direction, its squared norm by parameter, and a fixed random sample of its
coordinates. All of it is post-processing of the release; who was asked, and how many answered, is
not, and is kept for the audit alone.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.privacy.audit.directions import Directions, flatten

if TYPE_CHECKING:
    from sottovoce.simulations.canary_devices import CanaryDevices

SAMPLE = 4096  # coordinates kept of every release


class CanaryWatch:
    """The canaries of one run, seen by its coordinator.

    `inside`: (canaries,) bool, each one's fair coin: nobody else is ever asked. `directions`: of
    direction canaries; None for others. `divisor`: the public number that sums are divided by.
    `record`: of the newest round, None before the first.
    """

    def __init__(
        self,
        canaries: CanaryDevices,
        inside: NDArray[np.bool_],
        directions: Directions,
        divisor: float,
    ) -> None:
        self.canaries, self.inside, self.divisor = canaries, inside, divisor
        self.directions = directions
        self.record: dict[str, Any] | None = None
        generator = np.random.default_rng([canaries.seed, directions.size])
        size = min(SAMPLE, directions.size)
        self._sample = np.sort(generator.choice(directions.size, size, replace=False))
        self._drawn: list[int] = []
        self._asked = 0

    def admit(self, devices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `devices` (sorted) that are asked: all but the canaries that are out."""
        first = self.canaries.first
        drawn = devices[self.canaries.are(devices)] - first
        self._drawn = drawn.tolist()
        devices = devices[~np.isin(devices, drawn[~self.inside[drawn]] + first)]
        self._asked = len(devices)
        return devices

    def observe(
        self,
        server_round: int,
        update: dict[str, Tensor],
        *,
        deviation: float,
        clip_norm: float | None,
        answered: int,
    ) -> None:
        """Note a round. `update`: by which the model moved, before the server's optimiser.

        `deviation`: of the noise that the sum should have in each coordinate, 0 without any.
        """
        whole = {name: tensor.double() * self.divisor for name, tensor in update.items()}
        flat = flatten(whole)
        kept = flat[self._sample].astype("<f4")
        self.record = {
            "round": server_round,
            "drawn": self._drawn,
            "asked": self._asked,
            "answered": answered,
            "deviation": deviation,
            "clip_norm": clip_norm,
            "squares": {name: _square(whole[name]) for name in sorted(whole)},
            "sample": base64.b64encode(kept.tobytes()).decode(),
        }
        if self.canaries.kind == "direction":
            self.record["dots"] = [float(dot) for dot in self.directions.dots(whole)]

    def header(self, level: int, rate: float) -> dict[str, Any]:
        """What is known before round 1: JSON values. `rate`: of the canaries' activity level."""
        canaries = self.canaries
        return {
            "kind": canaries.kind,
            "count": canaries.count,
            "first": canaries.first,
            "activity": canaries.activity,
            "level": level,
            "rate": rate,
            "seed": canaries.seed,
            "inside": np.flatnonzero(self.inside).tolist(),
            "norm": canaries.norm,
            "loudness": [canaries.loudness(canary) for canary in range(canaries.count)]
            if canaries.kind == "direction" else [],
            "divisor": self.divisor,
            "sizes": {name: math.prod(shape) for name, shape in self.directions.shapes.items()},
        }


def _square(tensor: Tensor) -> float:
    return float(tensor.pow(2).sum())
