"""Server optimisers: what the coordinator does with a round's mean update.

The mean update is treated as a negative gradient (Reddi et al. 2021, arXiv:2003.00295, algorithm
2). Whatever the optimiser does is post-processing of the noised mean and costs no privacy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sottovoce.client.errors import ConfigError

Tensors = dict[str, Tensor]


class ServerOptimizer(ABC):
    """Moves the global parameters by a mean update; its state survives a checkpoint."""

    @abstractmethod
    def step(self, parameters: Tensors, update: Tensors) -> Tensors:
        """New global parameters. Neither argument is changed."""

    def state(self) -> Tensors:
        """Tensors that `load` restores."""
        return {}

    def load(self, state: Tensors) -> None:  # noqa: B027
        """Take up a state that `state` gave."""


class FedAvg(ServerOptimizer):
    """theta + lr * mean update (McMahan et al. 2017, arXiv:1602.05629)."""

    def __init__(self, learning_rate: float = 1.0) -> None:
        self.learning_rate = learning_rate

    def step(self, parameters: Tensors, update: Tensors) -> Tensors:
        return {n: p + self.learning_rate * update[n] for n, p in parameters.items()}


class FedAdam(ServerOptimizer):
    """Adam on the mean update (Reddi et al. 2021), with bias correction (Kingma & Ba 2015).

    `tau` is added to the root of the second moment; it bounds how far a quiet coordinate, where
    the update is mostly privacy noise, may move.
    """

    def __init__(
        self, learning_rate: float, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-8
    ) -> None:
        self.learning_rate, self.beta1, self.beta2, self.tau = learning_rate, beta1, beta2, tau
        self.count = 0
        self.first: Tensors = {}
        self.second: Tensors = {}

    def step(self, parameters: Tensors, update: Tensors) -> Tensors:
        self.count += 1
        result = {}
        for name, parameter in parameters.items():
            delta = update[name]
            zero = torch.zeros_like(delta)
            first = self.first.get(name, zero).mul(self.beta1).add(delta, alpha=1 - self.beta1)
            second = self.second.get(name, zero).mul(self.beta2)
            second = second.addcmul(delta, delta, value=1 - self.beta2)
            self.first[name], self.second[name] = first, second
            mean = first / (1 - self.beta1**self.count)
            root = (second / (1 - self.beta2**self.count)).sqrt()
            result[name] = parameter + self.learning_rate * mean / (root + self.tau)
        return result

    def state(self) -> Tensors:
        moments = {f"first.{n}": t for n, t in self.first.items()}
        moments |= {f"second.{n}": t for n, t in self.second.items()}
        return moments | {"count": torch.tensor(self.count)}

    def load(self, state: Tensors) -> None:
        self.count = int(state["count"])
        for kind, target in (("first.", self.first), ("second.", self.second)):
            target.clear()
            target.update(
                {n.removeprefix(kind): t for n, t in state.items() if n.startswith(kind)}
            )


def make_server_optimizer(
    name: str, *, learning_rate: float, beta1: float, beta2: float, tau: float
) -> ServerOptimizer:
    """The optimiser of a `strategy` config; ConfigError for an unknown name."""
    if name == "fedavg":
        return FedAvg(learning_rate)
    if name == "fedadam":
        return FedAdam(learning_rate, beta1, beta2, tau)
    raise ConfigError(f"strategy.name={name!r} is unknown: choose fedavg or fedadam")
