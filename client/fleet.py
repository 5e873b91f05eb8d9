"""The fleet: the devices behind one Flower node, and what passes between it and the coordinator.

A fleet answers a round with the *sum* of its devices' clipped updates, never with single ones:
that is all a server with secure aggregation would see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.batches import BatchPlan


@dataclass(frozen=True)
class ExampleClipping:
    """On-device eDP-SGD: what each local step does to its examples' gradients.

    `clip_norm`: bound on one example's gradient. `noise_multiplier`: standard deviation of the
    noise on a step's sum over `clip_norm`.
    """

    clip_norm: float
    noise_multiplier: float


@dataclass(frozen=True)
class LocalTraining:
    """Everything a device needs to know of a round but the model: it decides epsilon.

    `learning_rate`: of local SGD. `plan`: batches. `example`: per-example clipping and noise, or
    None. `update_clip_norm`: bound S on a device's signal, or None.
    """

    learning_rate: float
    plan: BatchPlan
    example: ExampleClipping | None
    update_clip_norm: float | None

    def noise_variance(self, level: int) -> float:
        """Variance, in each coordinate, of the noise inside one device's update."""
        if self.example is None:
            return 0.0
        step = self.example.noise_multiplier * self.example.clip_norm / self.plan.batch_size
        return self.plan.steps(level, 1 << level) * (self.learning_rate * step) ** 2


@dataclass
class FleetReply:
    """What a fleet returns for a round.

    `sums`: summed clipped updates by parameter name. `devices_by_level`: devices in the sum.
    `dropped`: devices left out for a non-finite update. `totals`: sums over devices or rows, from
    which the coordinator makes means: examples, loss, clipped_devices, clipped_examples, norm.
    """

    sums: dict[str, Tensor]
    devices_by_level: dict[int, int]
    dropped: int
    totals: dict[str, float] = field(default_factory=dict)


class Fleet(ABC):
    """Devices that train when asked."""

    @abstractmethod
    def train(
        self, parameters: dict[str, Tensor], devices: NDArray[np.int64], server_round: int
    ) -> FleetReply:
        """Train `devices` from the global `parameters` and sum their clipped updates."""
