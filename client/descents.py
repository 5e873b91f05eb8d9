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
from sottovoce.client.lazy_rows import LazyRows
from sottovoce.privacy.gradients.clipping import clip_factors
from sottovoce.privacy.optimizer.descent import AdamBC, Descent, Tensors, make_descent

MARGIN = 1e-4  # far above the rounding of a sum of clipped gradients


class LocalDescent:
    """K devices on their way from `origin`, by name (K, *shape), which stays as it is.

    `steps`: (K,), descending: whoever takes a step are the first ones. `lazy`: tables, by name,
    that keep their own rows; plain SGD only. `weights`: where the devices are, by name (K, *shape);
    none before the first step, and with noise of their own (n, *shape), of the n that will take
    another step. `signal`: what a device's data did, known
    after `finish`, and `noise`: its own noise, or None where there is none, or none apart.
    `clipped`: (K,) bool, whose signal was cut down.

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
        self,
        training: LocalTraining,
        origin: Tensors,
        steps: NDArray[np.int64],
        *,
        noised: bool,
        lazy: dict[str, LazyRows] | None = None,
    ) -> None:
        self.training, self.origin, self.lazy = training, origin, lazy or {}
        self.steps = torch.from_numpy(steps)
        self.weights: Tensors = {}
        self.signal: Tensors = {}
        self.noise: Tensors | None = {} if noised and training.linear else None
        # Beside noise, or where it pulls on the next step, the signal is kept step by step: the
        # difference of weights would be rounded. Else that difference is the signal.
        self._follows = self.noise is not None or training.drag > 0
        self._descent, self._noise_descent = _descent(training), _descent(training)
        self._variances = torch.zeros(len(steps))
        optimizer = training.optimizer
        # Plain SGD moves by the learning rate times the gradient, which needs no tensor of its own.
        self._rate = training.learning_rate if training.plain else 1.0
        self._pulled_from = origin if optimizer.weight_decay > 0 else {}
        self.clipped = torch.zeros(len(steps), dtype=torch.bool)
        if training.projects_steps:
            self._radii, self._pulls = _public_shares(training, steps)

    def step(
        self,
        number: int,
        gradients: Tensors,
        drawn: Tensors | None,
        deviation: float | Tensor = 0.0,
        longest: Tensor | None = None,
    ) -> None:
        """Step `number` of the first n devices, which still have one; both sets are used up.

        `gradients`: (n, *shape) sums over the (expected) batch size. `drawn`: their noise, or that
        of the first ones where the others have none, of a `deviation` that the devices' Adam must
        know where it is their own (n,). `longest`: (n,) bounds on the norms of `gradients`, where
        there are any.
        """
        if self.training.projects_steps:
            self._project(number, gradients, longest)
        for name, table in self.lazy.items():
            table.move(gradients.pop(name))
        if self.training.plain and self.noise is not None:
            return self._plain(number, gradients, drawn or {})
        if drawn is not None and self.noise is None:
            for name, draw in drawn.items():
                gradients[name][: len(draw)].add_(draw)
            drawn = None
        if self.noise is not None and not self.training.plain:
            drawn = _filled(drawn or {}, gradients)  # without noise, momentum still moves
        if isinstance(deviation, Tensor) and isinstance(self._descent, AdamBC):
            self._average(self._descent, deviation**2)
        moves = self._moves(self._descent, gradients, self.signal, self._pulled_from)
        noises: Tensors = {}
        if drawn is not None and self.noise is not None:
            noises = self._moves(self._noise_descent, drawn, self.noise, {})
        for name, move in moves.items():
            self._go(name, move)
            if name in noises:
                self.weights[name][: len(noises[name])].sub_(noises[name], alpha=self._rate)
            if self._follows:
                self._take_away(self.signal, name, move)
        for name, move in noises.items():
            assert self.noise is not None
            self._take_away(self.noise, name, move)

    def _plain(self, number: int, gradients: Tensors, drawn: Tensors) -> None:
        """A noised step of plain SGD; weights that no step will read any more are not kept."""
        assert self.noise is not None
        left = int((self.steps > number + 1).sum())
        for name, gradient in gradients.items():
            draw = drawn.get(name, gradient[:0])
            if left:
                before = self.weights.get(name, self.origin[name])[:left]
                out = self.weights[name][:left] if name in self.weights else None
                now = torch.sub(before, gradient[:left], alpha=self._rate, out=out)
                self.weights[name] = now
                now[: len(draw)].sub_(draw[:left], alpha=self._rate)
            self._take_away(self.signal, name, gradient)
            if len(draw):
                self._take_away(self.noise, name, draw)

    @property
    def direct(self) -> bool:
        """Whether a step only moves `weights`, by the learning rate times the gradient."""
        return self.training.plain and not self._follows and self.training.example is None

    def begin(self) -> None:
        """Put all devices at their origin, ready to be moved in place."""
        self.weights = {
            name: start.clone(memory_format=torch.contiguous_format)
            for name, start in self.origin.items()
        }

    def finish(self) -> tuple[Tensor, Tensor]:
        """Clip what is not clipped yet. Norms (K,) before that, and which are finite (K,).

        A device whose signal is not finite is left with a signal of zero: it must be dropped.
        """
        for name, origin in self.origin.items():
            if not self._follows:
                there = self.weights.get(name)
                self.signal[name] = torch.zeros(origin.shape) if there is None else (
                    there.sub_(origin))
            elif name not in self.signal:
                self.signal[name] = torch.zeros(origin.shape)
            if self.noise is not None and name not in self.noise:
                self.noise[name] = torch.zeros(origin.shape)
        for name, table in self.lazy.items():
            self.signal[name], noise = table.finish()
            if self.noise is not None and noise is not None:
                self.noise[name] = noise
        bound = None if self.training.projects_steps else self.training.update_clip_norm
        norms, finite, clipped = finished(self.signal, bound)
        self.clipped |= clipped
        return norms, finite

    def _go(self, name: str, move: Tensor) -> None:
        if name not in self.weights:
            if len(move) == len(self.steps):
                self.weights[name] = torch.sub(self.origin[name], move, alpha=self._rate)
                return
            self.weights[name] = self.origin[name].clone()
        self.weights[name][: len(move)].sub_(move, alpha=self._rate)

    def _take_away(self, part: Tensors, name: str, move: Tensor) -> None:
        """part - move; the first move, which nobody else needs any more, becomes the part."""
        if name not in part:
            if len(move) == len(self.steps):
                part[name] = move.mul_(-self._rate)
                return
            part[name] = move.new_zeros((len(self.steps), *move.shape[1:]))
        part[name][: len(move)].sub_(move, alpha=self._rate)

    def _average(self, adam: AdamBC, variances: Tensor) -> None:
        """Second moments hold the noise of several steps: what they have of it, for each device."""
        beta, steps = adam.beta2, adam.count + 1
        self._variances = beta * self._variances[: len(variances)] + (1 - beta) * variances
        adam.noise_variance = self._variances / (1 - beta**steps)

    def _project(self, number: int, gradients: Tensors, longest: Tensor | None) -> None:
        """Each device's z_s = g_s + k_s wd theta_0 to its radius, and its g_s back from it."""
        here = len(next(iter(gradients.values())))
        if longest is not None and not self._pulled_from:
            return self._project_some(gradients, torch.nonzero(
                longest * (1 + MARGIN) > self._radii[:here]).squeeze(1))
        pull = self._pulls[self.steps[:here] - 1 - number]
        for name, origin in self._pulled_from.items():
            gradients[name].add_(origin[:here] * columns(pull, origin))
        norms, radii = stacked_norms(gradients), self._radii[:here]
        _scale(gradients, clip_factors(norms, radii, here))
        for name, origin in self._pulled_from.items():
            gradients[name].sub_(origin[:here] * columns(pull, origin))
        self.clipped[:here] |= norms > radii

    def _project_some(self, gradients: Tensors, some: Tensor) -> None:
        """The gradients of devices `some` (m,) to their radii."""
        if not len(some):
            return
        norms, radii = stacked_norms({n: g[some] for n, g in gradients.items()}), self._radii[some]
        factors = clip_factors(norms, radii, len(some))
        over = factors != 1
        for gradient in gradients.values() if bool(over.any()) else ():
            gradient[some[over]] *= columns(factors[over], gradient)
        self.clipped[some] |= norms > radii

    def _moves(
        self, descent: Descent, gradients: Tensors, part: Tensors, origin: Tensors
    ) -> Tensors:
        """What a part of the way takes away in this step, pulls included."""
        training = self.training
        if training.plain:
            return gradients
        moves = descent.step(gradients)
        decay = training.learning_rate * training.optimizer.weight_decay
        for name, move in moves.items():
            if training.drag and name in part:
                move.add_(part[name][: len(move)], alpha=training.drag)
            if origin:
                move.add_(origin[name][: len(move)], alpha=decay)
        return moves


def _filled(drawn: Tensors, like: Tensors) -> Tensors:
    """`drawn` with zeros for those at the end that are in `like` alone."""
    found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    for name, draw in drawn.items():
        found[name][: len(draw)] = draw
    return found


def finished(signal: Tensors, bound: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Signals (K, *shape) clipped in place to `bound`; unclipped norms, who is finite, who clipped.

    All (K,). A signal that is not finite becomes zero.
    """
    norms = stacked_norms(signal)
    finite = torch.isfinite(norms)
    if not bool(finite.all()):
        for tensor in signal.values():
            tensor[~finite] = 0.0
    if bound is None:
        return norms, finite, torch.zeros(len(norms), dtype=torch.bool)
    clipped = norms > bound
    if bool(clipped.any()):
        _scale(signal, clip_factors(norms, bound, len(norms)))
    return norms, finite, clipped


def stacked_norms(tensors: Tensors) -> Tensor:
    """(K,) L2 norm of each device's tensors, over all names together.

    `sum` adds up in pairs; `torch.linalg.vector_norm` one after the other, which loses one part in
    ten thousand where a large coordinate stands among many small ones.
    """
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
