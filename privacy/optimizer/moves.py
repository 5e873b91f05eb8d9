"""What happens to parameters once a gradient is noised: descent and decoupled weight decay.

    p <- (1 - lr weight_decay) p - descent(gradient)

Post-processing, all of it: no ledger needs to know. Source of decoupled decay: Loshchilov and
Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sottovoce.privacy.optimizer.descent import AdamBC, make_descent


class Moves:
    """Moves parameters by noised gradients, with whatever state the descent keeps.

    `optimizer`: sgd or adam. `noise_variance`: of the first step's noise, in each coordinate.

    Raises ValueError for impossible settings.
    """

    def __init__(
        self,
        optimizer: str,
        lr: float,
        *,
        momentum: float,
        betas: tuple[float, float],
        noise_variance: float,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1)")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} must be in [0, 1)")
        self.descent = make_descent(
            optimizer, lr, momentum=momentum, beta1=betas[0], beta2=betas[1],
            noise_variance=noise_variance,
        )
        self._mean_variance = 0.0

    @torch.no_grad()
    def move(
        self,
        parameters: Mapping[str, nn.Parameter],
        gradients: dict[str, Tensor],
        *,
        lr: float,
        weight_decay: float,
        noise_variance: float,
    ) -> None:
        """One step in place; `gradients` are used up. `noise_variance`: of their noise."""
        self.descent.learning_rate = lr
        if isinstance(self.descent, AdamBC):
            self._note(self.descent, noise_variance)
        kept = 1 - lr * weight_decay
        for name, change in self.descent.step(gradients).items():
            parameter = parameters[name]
            if kept != 1:
                parameter.mul_(kept)
            parameter.sub_(change.to(parameter.dtype))

    def _note(self, adam: AdamBC, variance: float) -> None:
        """Second moments average the noise of several steps, which may have had different one."""
        self._mean_variance = adam.beta2 * self._mean_variance + (1 - adam.beta2) * variance
        adam.noise_variance = self._mean_variance / (1 - adam.beta2 ** (adam.count + 1))

    def state(self) -> dict[str, Any]:
        return {
            "kind": type(self.descent).__name__,
            "descent": self.descent.state(),
            "mean_variance": self._mean_variance,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state` gave; ValueError where it is of another optimiser."""
        kind = type(self.descent).__name__
        if state["kind"] != kind:
            raise ValueError(f"this is the state of {state['kind']}, not of {kind}")
        self.descent.load(state["descent"])
        self._mean_variance = float(state["mean_variance"])
