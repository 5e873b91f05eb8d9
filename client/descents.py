"""The way of K devices through their local steps: what is signal and what is their own noise.

With g_s a step's (clipped) mean gradient and e_s its noise, a device at theta = theta_0 + delta
does, in step s of T,

    v      <- mu v + g_s + e_s
    delta  <- (1 - lr (prox + wd)) delta - lr v - lr wd theta_0

which is linear: delta = signal + noise, each following the same rule with g or e alone (the last
term is the signal's), and step s enters the end with a public coefficient w_s that depends on T
only (`LocalTraining.step_weights`). Adam is not linear, and the noise of a threshold that follows a
quantile has no public deviation; there the two parts stay together.

Sources: FedProx: Li et al. 2020, arXiv:1812.06127. Decoupled weight decay: Loshchilov and Hutter
2019, arXiv:1711.05101. Optimisers: `sottovoce.privacy.optimizer.descent`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.fleet import LocalTraining
from sottovoce.privacy.gradients.clipping import clip_factors
from sottovoce.privacy.optimizer.descent import AdamBC, Descent, Tensors, make_descent


class LocalDescent:
    """K devices on their way. `weights`: by name (K, *shape), moved in place; `steps`: (K,).

    `signal`: what a device's data did, by name (K, *shape); `noise`: its own noise, or None where
    there is none, or none apart. `clipped`: (K,) bool, whose signal was cut down.

    *Guarantee*: with S = `training.update_clip_norm`, |signal| <= S for each device after `finish`,
    whatever its data and noise (device unit), and the whole update is post-processing of sums that
    were noised as `training.example` says (example unit, add/remove).

    SGD with example noise: step s contributes -lr w_s z_s to the final signal, where
    z_s = g_s + k_s wd theta_0 and k_s = (1 - drag)^(T - 1 - s) / w_s: the second term sums up to
    all of weight decay's pull. Each z_s is projected to the ball of radius S / (lr sum_s w_s)
    *before* its noise, so the triangle inequality gives |signal| <= S. Adding a vector that does
    not depend on the data, projecting, and taking it away again moves no two gradients further
    apart: the noised step keeps its sensitivity. (Clipping the finished signal alone would not do:
    from the second step on a signal depends on earlier noise, which is then no longer Gaussian
    given the signal.) The noise is -lr sum_s w_s e_s, exactly Gaussian; the signal may depend on
    it, which `DeviceMechanism` allows.

    Adam with example noise: moves depend on noise through the second moment, so the whole noised
    update counts as signal and is clipped to S as one; no own noise is left to account for, and
    only the coordinator's counts for the device unit. The same with thresholds that follow a
    quantile: the deviation of a step's noise hangs on the thresholds, so on the device's data, and
    the coordinator could not top it up to a public sum without learning it. Without example noise
    the finished signal is clipped likewise.
    """

    def __init__(
        self, training: LocalTraining, weights: Tensors, steps: NDArray[np.int64], *, noised: bool
    ) -> None:
        self.training, self.weights = training, weights
        self.steps = torch.from_numpy(steps)
        self.signal = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        self.noise: Tensors | None = None
        self._descent = _descent(training)
        self._variances = torch.zeros(len(steps))
        if noised and training.linear:
            self.noise = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
            self._noise_descent = _descent(training)
        decays = training.optimizer.weight_decay > 0
        self._origin = {name: t.clone() for name, t in weights.items()} if decays else {}
        self.clipped = torch.zeros(len(steps), dtype=torch.bool)
        if training.projects_steps:
            self._radii, self._pulls = _public_shares(training, steps)

    def step(
        self,
        number: int,
        gradients: Tensors,
        drawn: Tensors | None,
        deviation: float | Tensor = 0.0,
    ) -> None:
        """Step `number` of every device that still has one; both sets of tensors are used up.

        `gradients`: (K, *shape) sums over the (expected) batch size. `drawn`: their noise, of a
        `deviation` that the devices' Adam must know where it is their own (K,).
        """
        if self.training.projects_steps:
            self._project(number, gradients)
        if drawn is not None and self.noise is None:
            for name, draw in drawn.items():
                gradients[name].add_(draw)
        if isinstance(deviation, Tensor) and isinstance(self._descent, AdamBC):
            self._average(self._descent, deviation**2)
        self._move(number, self.signal, self._descent.step(gradients), self._origin)
        if drawn is not None and self.noise is not None:
            self._move(number, self.noise, self._noise_descent.step(drawn), {})

    def _average(self, adam: AdamBC, variances: Tensor) -> None:
        """Second moments hold the noise of several steps: what they have of it, for each device."""
        beta, steps = adam.beta2, adam.count + 1
        self._variances = beta * self._variances + (1 - beta) * variances
        adam.noise_variance = self._variances / (1 - beta**steps)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Clip what is not clipped yet. Norms (K,) before that, and which are finite (K,).

        A device whose signal is not finite is left with a signal of zero: it must be dropped.
        """
        norms = stacked_norms(self.signal)
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            for tensor in self.signal.values():
                tensor[~finite] = 0.0
        bound = self.training.update_clip_norm
        if bound is not None and not self.training.projects_steps:
            self.clipped = norms > bound
            _scale(self.signal, clip_factors(norms, bound, len(norms)))
        return norms, finite

    def _project(self, number: int, gradients: Tensors) -> None:
        """Each device's z_s = g_s + k_s wd theta_0 to its radius, and its g_s back from it."""
        pull = self._pulls[(self.steps - 1 - number).clamp_min(0)]
        for name, origin in self._origin.items():
            gradients[name].add_(origin * columns(pull, origin))
        norms = stacked_norms(gradients)
        _scale(gradients, clip_factors(norms, self._radii, len(norms)))
        for name, origin in self._origin.items():
            gradients[name].sub_(origin * columns(pull, origin))
        self.clipped |= (norms > self._radii) & (self.steps > number)

    def _move(self, number: int, part: Tensors, moves: Tensors, origin: Tensors) -> None:
        """Take `moves` and the pulls away from one part and from the weights."""
        training = self.training
        still = (self.steps > number).to(torch.float32)
        together = bool(still.all())
        for name, move in moves.items():
            if training.drag:
                move.add_(part[name], alpha=training.drag)
            if origin:
                decay = training.learning_rate * training.optimizer.weight_decay
                move.add_(origin[name], alpha=decay)
            if not together:
                move.mul_(columns(still, move))
            part[name].sub_(move)
            self.weights[name].sub_(move)


def stacked_norms(tensors: Tensors) -> Tensor:
    """(K,) L2 norm of each device's tensors, over all names together."""
    squares = [tensor.reshape(len(tensor), -1).pow(2).sum(1) for tensor in tensors.values()]
    return torch.stack(squares).sum(0).sqrt()


def _descent(training: LocalTraining) -> Descent:
    optimizer = training.optimizer
    return make_descent(
        optimizer.name,
        training.learning_rate,
        momentum=optimizer.momentum,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps_floor=optimizer.eps_floor,
        noise_variance=training.step_deviation**2,
    )


def _public_shares(training: LocalTraining, steps: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """(K,) radius of every step of each device, and (most steps,) wd k by steps that are left."""
    assert training.update_clip_norm is not None
    longest = max(int(steps.max(initial=0)), 1)
    weights = training.step_weights(longest)[::-1]
    totals = np.cumsum(weights)[np.maximum(steps, 1) - 1]
    radii = training.update_clip_norm / (training.learning_rate * totals)
    kept = (1 - training.drag) ** np.arange(longest)
    ratios = np.divide(kept, weights, out=np.zeros(longest), where=weights > 0)
    pulls = training.optimizer.weight_decay * ratios
    return torch.from_numpy(radii).float(), torch.from_numpy(pulls).float()


def columns(values: Tensor, like: Tensor) -> Tensor:
    """(K,) as (K, 1, ...), to go with a stack (K, *shape)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _scale(tensors: Tensors, factors: Tensor) -> None:
    for tensor in tensors.values():
        tensor.mul_(columns(factors, tensor))
