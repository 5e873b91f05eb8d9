"""The slow definition of eDP-SGD: one example, one device, one step at a time, by plain autograd.

Fast paths are tested against these loops. They share no code with the engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def clipped_loop(
    model: nn.Module, loss_of_row: Callable[[nn.Module, int], Tensor], rows: range, clip_norm: float
) -> tuple[list[Tensor], Tensor]:
    """Sum over rows of clipped gradients by trainable parameter, and the unclipped norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in parameters]
    norms = []
    for row in rows:
        grads = torch.autograd.grad(loss_of_row(model, row), parameters, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, grads, strict=True)
        ]
        norm = torch.stack([g.double().pow(2).sum() for g in dense]).sum().sqrt()
        for total, g in zip(sums, dense, strict=True):
            total += g * min(1.0, clip_norm / float(norm)) if norm > 0 else 0
        norms.append(norm)
    return sums, torch.stack(norms) if norms else torch.zeros(0)


def train_device(
    model: nn.Module,
    loss_of_examples: Callable[[nn.Module, list[int]], Tensor],
    steps: list[list[int]],
    *,
    learning_rate: float,
    batch_size: int,
    example_clip: float | None,
    update_clip: float | None,
    noise: Callable[[], dict[str, Tensor]] | None = None,
    momentum: float = 0.0,
    proximal: float = 0.0,
    weight_decay: float = 0.0,
    adam: tuple[float, float, float, float] | None = None,
    mean_gradients: Callable[[nn.Module, int], dict[str, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """One device's local round: (clipped signal, noise, norm of the unclipped signal).

    `loss_of_examples` gives per-example losses (n,); `noise` draws one step's noise by name, that
    of a mean gradient. `adam`: beta1, beta2, floor and noise variance of DP-AdamBC, whose noise
    stays in the signal. `weight_decay` and `proximal` act on the weights themselves.
    `mean_gradients`: another way from the model and a step's number to its mean gradient.
    """
    model = copy.deepcopy(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in named.items()}
    signal = {n: torch.zeros_like(p) for n, p in named.items()}
    drift = {n: torch.zeros_like(p) for n, p in named.items()}
    speed = {n: torch.zeros_like(p) for n, p in named.items()}
    drift_speed = {n: torch.zeros_like(p) for n, p in named.items()}
    squares = {n: torch.zeros_like(p) for n, p in named.items()}
    drag = learning_rate * (proximal + weight_decay)

    def reach(at: int, through_momentum: bool) -> float:
        """How far the weights end up when step `at` alone pushes them, by 1."""
        place = v = 0.0
        for step in range(len(steps)):
            push = float(step == at)
            v = momentum * v + push
            place = (1 - drag) * place + learning_rate * (v if through_momentum else push)
        return place

    for number, batch in enumerate(steps):
        if mean_gradients is None:
            moves = _mean_gradients(model, loss_of_examples, batch, batch_size, example_clip)
        else:
            moves = mean_gradients(model, number)
        if example_clip is not None and update_clip is not None and adam is None:
            pull = weight_decay * reach(number, False) / reach(number, True)
            whole = {n: moves[n] + pull * start[n] for n in named}
            _scale_to(whole, update_clip / sum(reach(s, True) for s in range(len(steps))))
            moves = {n: whole[n] - pull * start[n] for n in named}
        drawn = noise() if noise else {n: torch.zeros_like(p) for n, p in named.items()}
        for n, p in named.items():
            if adam is None:
                speed[n] = momentum * speed[n] + moves[n]
                drift_speed[n] = momentum * drift_speed[n] + drawn[n]
                step = speed[n]
            else:
                beta1, beta2, floor, variance = adam
                g = moves[n] + drawn[n]
                speed[n] = beta1 * speed[n] + (1 - beta1) * g
                squares[n] = beta2 * squares[n] + (1 - beta2) * g * g
                second = squares[n] / (1 - beta2 ** (number + 1)) - variance
                step = speed[n] / (1 - beta1 ** (number + 1)) / second.clamp(min=floor).sqrt()
            pulled = signal[n] * (1 - drag) - learning_rate * weight_decay * start[n]
            signal[n] = pulled - learning_rate * step
            drift[n] = drift[n] * (1 - drag) - learning_rate * drift_speed[n]
            p.data = start[n] + signal[n] + drift[n]
    norm = _norm(signal)
    if update_clip is not None and (example_clip is None or adam is not None):
        _scale_to(signal, update_clip)
    return signal, drift, norm


def _mean_gradients(
    model: nn.Module,
    loss_of_examples: Callable[[nn.Module, list[int]], Tensor],
    batch: list[int],
    batch_size: int,
    example_clip: float | None,
) -> dict[str, Tensor]:
    """By name: the gradient of the mean loss, or the sum of clipped ones over the batch size."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if example_clip is not None:
        sums, _ = clipped_loop(
            model, lambda m, i: loss_of_examples(m, [batch[i]])[0], range(len(batch)), example_clip
        )
        return {n: total / batch_size for n, total in zip(named, sums, strict=True)}
    grads = torch.autograd.grad(
        loss_of_examples(model, batch).mean(), list(named.values()), allow_unused=True
    )
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(named.items(), grads, strict=True)
    }


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(np.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors.values())))


def _scale_to(tensors: dict[str, Tensor], bound: float) -> None:
    factor = min(1.0, bound / max(_norm(tensors), 1e-30))
    for tensor in tensors.values():
        tensor.mul_(factor)
