"""The fleet: the devices behind one Flower node, and what passes between it and the coordinator.

A fleet answers a round with the *sum* of its devices' clipped updates, never with single ones:
that is all a server with secure aggregation would see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.client.example_clipping import ExampleClipping as ExampleClipping
from sottovoce.privacy.mechanisms.private_metrics import MetricBounds


@dataclass(frozen=True)
class DeviceOptimizer:
    """How a device moves along its gradients.

    `name`: sgd or adam. `momentum`: mu of SGD. `proximal`: FedProx' pull towards the global model
    (Li et al. 2020, arXiv:1812.06127). `weight_decay`: pull towards zero. Both pulls act on the
    weights themselves, outside of clipped gradients and momentum. `beta1`, `beta2`, `eps_floor`:
    of Adam (`AdamBC`).
    """

    name: str = "sgd"
    momentum: float = 0.0
    proximal: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps_floor: float | None = None


@dataclass(frozen=True)
class LocalTraining:
    """Everything a device needs to know of a round but the model: it decides epsilon.

    `learning_rate`: of a local step. `plan`: batches. `example`: per-example clipping and noise,
    or None. `update_clip_norm`: bound S on a device's signal, or None. `optimizer`: of the steps.
    `metric_bounds`: to which devices cut their figures where those are noised, else None.
    """

    learning_rate: float
    plan: BatchPlan
    example: ExampleClipping | None
    update_clip_norm: float | None
    optimizer: DeviceOptimizer = DeviceOptimizer()
    metric_bounds: MetricBounds | None = None

    def __post_init__(self) -> None:
        if not self.drag < 1:
            raise ConfigError(
                f"learning_rate * (proximal + weight_decay) = {self.drag:g} must be below 1, or a "
                "step overshoots what it is pulled to: lower strategy.learning_rate"
            )

    def at(self, server_round: int) -> LocalTraining:
        """Training in one round, whose noise may differ from another's."""
        example = None if self.example is None else self.example.at(server_round)
        return self if example is self.example else replace(self, example=example)

    @property
    def drag(self) -> float:
        """Share of its distance from the start that a device gives back in a step."""
        return self.learning_rate * (self.optimizer.proximal + self.optimizer.weight_decay)

    @property
    def step_deviation(self) -> float:
        """Standard deviation of the noise in a (first) step's gradient, in each coordinate."""
        return 0.0 if self.example is None else self.example.deviation(self.plan.batch_size)

    @property
    def plain(self) -> bool:
        """Whether a step is minus the learning rate times its gradient, and no more."""
        return self.optimizer.name == "sgd" and not self.optimizer.momentum and not self.drag

    @property
    def linear(self) -> bool:
        """Whether an update is a sum of its steps with public coefficients, as is its own noise.

        Adam's steps are not (`step_weights`), and with thresholds that follow a quantile the
        noise's deviation hangs on the data.
        """
        return self.optimizer.name == "sgd" and (self.example is None or self.example.steady)

    @property
    def projects_steps(self) -> bool:
        """Whether the bound S is shared out to the steps, or put on the finished update."""
        return self.linear and self.example is not None and self.update_clip_norm is not None

    @property
    def keeps_untouched_rows(self) -> bool:
        """Whether a table's row without gradient stays put but for noise that may be summed."""
        return self.optimizer.weight_decay == 0 and (self.linear or self.step_deviation == 0)

    def step_weights(self, steps: int) -> NDArray[np.float64]:
        """(steps,) w: the update is -learning_rate * sum_s w[s] g_s, g_s the gradient of step s.

        A gradient enters the momentum, which moves the weights in every step that is left, and
        every move shrinks by 1 - drag in each step after it:
        w[s] = sum_{j <= n} mu^j (1 - drag)^(n - j), n = steps - 1 - s. All ones for plain SGD.
        """
        weights = np.zeros(steps)
        weight = 0.0
        for left in range(steps):
            weight = self.optimizer.momentum * weight + (1 - self.drag) ** left
            weights[steps - 1 - left] = weight
        return weights

    def noise_variance(self, level: int) -> float:
        """Variance, in each coordinate, of the noise that passes unclipped inside an update.

        Steps' noises are independent and enter with `step_weights`. Unless `linear` there is
        none: the whole noised update is clipped as one.
        """
        if not self.linear or self.step_deviation == 0:
            return 0.0
        weights = self.step_weights(self.plan.steps(level, 1 << level))
        return float(weights @ weights) * (self.learning_rate * self.step_deviation) ** 2


ABSENCES = ("unavailable", "failed", "late")
"""Totals that count devices which did not answer under `conditions`, by the reason."""

PARTIAL = "partial"
"""The total that counts devices which handed in a part of their work."""


@dataclass
class FleetReply:
    """What a fleet returns for a round.

    `sums`: summed clipped updates by parameter name. `devices_by_level`: devices in the sum.
    `dropped`: devices left out, for a non-finite update or as `ABSENCES`. `totals`: sums over
    devices or rows, from which the coordinator makes means: examples, loss, clipped_devices,
    clipped_examples, norm; or, where metrics are private, the `bounded_figures` of devices alone.
    Beside them the counts of `ABSENCES` and `PARTIAL`, where conditions are simulated.
    """

    sums: dict[str, Tensor]
    devices_by_level: dict[int, int]
    dropped: int
    totals: dict[str, float] = field(default_factory=dict)


class Fleet(ABC):
    """Devices that train when asked. `training`: what they do."""

    training: LocalTraining

    def set_clip_norm(self, clip_norm: float | None) -> None:
        """Clip updates to `clip_norm` from now on; None: as before.

        Raises ConfigError where devices do not clip their updates at all, or noise them themselves:
        whoever moved the bound counted on neither.
        """
        if clip_norm is None or clip_norm == self.training.update_clip_norm:
            return
        if self.training.update_clip_norm is None or self.training.example is not None:
            raise ConfigError(
                f"clip_norm={clip_norm:g} was sent to devices that do not clip to one norm alone: "
                "use privacy.device.clipping=adaptive with privacy=device only"
            )
        self.training = replace(self.training, update_clip_norm=clip_norm)

    def call(self, devices: NDArray[np.int64], members: NDArray[np.int64]) -> None:
        """Learn by which numbers, (devices,), a gateway knows the run's `devices`.

        Raises ConfigError where there are no real devices behind this node.
        """
        raise ConfigError(
            "this node has no gateway: start it with --node-config 'gateway=\"FOLDER\"'"
        )

    @abstractmethod
    def train(
        self,
        parameters: dict[str, Tensor],
        devices: NDArray[np.int64],
        server_round: int,
        levels: NDArray[np.uint8] | None = None,
    ) -> FleetReply:
        """Train `devices` from the global `parameters` and sum their clipped updates.

        `levels`: (devices,) what they reported, under which they are counted; None: their own.
        Raises ConfigError for reports where local steps must follow the true level.
        """
