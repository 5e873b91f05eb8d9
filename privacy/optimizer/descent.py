"""Optimisers for noised gradients: SGD with momentum, and Adam without the bias of the noise.

    SGD       v <- mu v + g                     move = lr v
    AdamBC    m <- b1 m + (1 - b1) g            move = lr m^ / sqrt(max(v^ - Phi, floor))
              v <- b2 v + (1 - b2) g^2          m^ = m / (1 - b1^t),  v^ = v / (1 - b2^t)

Phi is the variance of the noise in a gradient's coordinate, (sigma C / B)^2 for a sum noised with
sigma C and divided by B. Noise of zero mean leaves m^ unbiased but raises v^ by Phi, which makes
plain Adam on noised gradients little more than SGD with momentum.

    descent = make_descent("adam", 1e-3, noise_variance=(sigma * clip_norm / batch_size) ** 2)
    for name, move in descent.step(gradients).items():
        parameters[name].sub_(move)

A descent reads nothing but the gradients it is given, coordinate by coordinate: after noised
gradients it is post-processing, whatever its state. It works on stacks (groups, *shape) as on
single tensors.

Sources: Polyak 1964; Kingma and Ba 2015, arXiv:1412.6980; DP-AdamBC: Tang, Shpilevskiy and
Lecuyer 2023, arXiv:2312.14334, algorithm 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sottovoce.client.errors import ConfigError

Tensors = dict[str, Tensor]

FLOOR = 1e-8


class Descent(ABC):
    """What a step takes away from the parameters, given their gradients.

    `learning_rate` may be changed between steps.
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    @abstractmethod
    def step(self, gradients: Tensors) -> Tensors:
        """The moves, by name and in the gradients' shapes: parameter <- parameter - move.

        Every step must name the same parameters. Stacks may get shorter: the groups at their end
        then take no more steps. The gradients are used up: their memory becomes the moves'.
        """

    def state(self) -> Tensors:
        """Tensors that `load` restores."""
        return {}

    def load(self, state: Tensors) -> None:  # noqa: B027
        """Take up a state that `state` gave."""


class SGD(Descent):
    """lr v with v <- momentum v + g; the first v is g, as in torch.optim.SGD."""

    def __init__(self, learning_rate: float, momentum: float = 0.0) -> None:
        super().__init__(learning_rate)
        self.momentum = momentum
        self.velocity: Tensors = {}

    def step(self, gradients: Tensors) -> Tensors:
        for name, gradient in gradients.items():
            if self.momentum:
                velocity = _state(self.velocity, name, gradient)
                gradient.copy_(velocity.mul_(self.momentum).add_(gradient))
            if self.learning_rate != 1:
                gradient.mul_(self.learning_rate)
        return gradients

    def state(self) -> Tensors:
        return {f"velocity.{name}": tensor for name, tensor in self.velocity.items()}

    def load(self, state: Tensors) -> None:
        self.velocity = _beginning("velocity.", state)


class AdamBC(Descent):
    """Adam whose second moment is freed of the noise's share (DP-AdamBC).

    `noise_variance`: Phi, of the noise in each coordinate of a gradient; 0 gives Adam with
    sqrt(max(v^, floor)) for its divisor. The attribute may be changed between steps, and hold one
    for each group (groups,). `eps_floor`: least value under the root (the paper's gamma'); a
    coordinate that holds nothing but noise may move about lr sqrt(Phi / eps_floor) a step.
    """

    def __init__(
        self,
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        *,
        eps_floor: float = FLOOR,
        noise_variance: float = 0.0,
    ) -> None:
        super().__init__(learning_rate)
        self.beta1, self.beta2 = beta1, beta2
        self.eps_floor = eps_floor
        self.noise_variance: float | Tensor = noise_variance
        self.count = 0
        self.first: Tensors = {}
        self.second: Tensors = {}

    def step(self, gradients: Tensors) -> Tensors:
        self.count += 1
        return {name: self._move(name, gradient) for name, gradient in gradients.items()}

    def _move(self, name: str, gradient: Tensor) -> Tensor:
        first = _state(self.first, name, gradient)
        second = _state(self.second, name, gradient)
        first.mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        variance = torch.div(second, 1 - self.beta2**self.count, out=gradient)
        noise = self.noise_variance
        if isinstance(noise, Tensor):
            noise = noise[: len(gradient)].view(-1, *[1] * (gradient.dim() - 1))
        root = variance.sub_(noise).clamp_(min=self.eps_floor).sqrt_()
        step = self.learning_rate / (1 - self.beta1**self.count)
        return torch.div(first, root, out=root).mul_(step)

    def state(self) -> Tensors:
        moments = {f"first.{name}": tensor for name, tensor in self.first.items()}
        moments |= {f"second.{name}": tensor for name, tensor in self.second.items()}
        return moments | {"count": torch.tensor(self.count)}

    def load(self, state: Tensors) -> None:
        self.count = int(state["count"])
        self.first = _beginning("first.", state)
        self.second = _beginning("second.", state)


def make_descent(
    name: str,
    learning_rate: float,
    *,
    momentum: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps_floor: float | None = None,
    noise_variance: float = 0.0,
) -> Descent:
    """The descent called `name`, sgd or adam; ConfigError for another, or for momentum with adam.

    `eps_floor`: None takes the noise variance, and 1e-8 at least, so that noise alone moves a
    coordinate by no more than about `learning_rate` a step.
    """
    if name == "sgd":
        return SGD(learning_rate, momentum)
    if name != "adam":
        raise ConfigError(f"optimizer={name} does not exist: choose sgd or adam")
    if momentum:
        raise ConfigError(
            f"momentum={momentum:g} has no meaning for adam: set its beta1, and momentum=0"
        )
    floor = max(FLOOR, noise_variance) if eps_floor is None else eps_floor
    return AdamBC(
        learning_rate, beta1, beta2, eps_floor=floor, noise_variance=noise_variance
    )


def _state(states: Tensors, name: str, like: Tensor) -> Tensor:
    """What is kept for a gradient, zeros at first; for a stack, of its groups."""
    if name not in states:
        states[name] = torch.zeros_like(like)
    return states[name][: len(like)] if like.dim() else states[name]


def _beginning(prefix: str, state: Tensors) -> Tensors:
    """Copies of the tensors whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): t.clone() for n, t in state.items() if n.startswith(prefix)}
