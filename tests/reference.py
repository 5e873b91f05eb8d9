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
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """One device's local round: (clipped signal, noise, norm of the unclipped signal).

    `loss_of_examples` gives per-example losses (n,); `noise` draws one step's noise by name,
    already scaled to a step.
    """
    model = copy.deepcopy(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    signal = {n: torch.zeros_like(p) for n, p in named.items()}
    drift = {n: torch.zeros_like(p) for n, p in named.items()}
    for batch in steps:
        if example_clip is None:
            grads = torch.autograd.grad(
                loss_of_examples(model, batch).mean(), list(named.values()), allow_unused=True
            )
            moves = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(named.values(), grads, strict=True)
            ]
        else:
            moves, _ = clipped_loop(
                model, lambda m, i, b=batch: loss_of_examples(m, [b[i]])[0],
                range(len(batch)), example_clip,
            )
            moves = [total / batch_size for total in moves]
        step = {n: learning_rate * move for n, move in zip(named, moves, strict=True)}
        if example_clip is not None and update_clip is not None:
            _scale_to(step, update_clip / len(steps))
        drawn = noise() if noise else {n: torch.zeros_like(p) for n, p in named.items()}
        with torch.no_grad():
            for n, p in named.items():
                p -= step[n] + drawn[n]
                signal[n] -= step[n]
                drift[n] -= drawn[n]
    norm = _norm(signal)
    if example_clip is None and update_clip is not None:
        _scale_to(signal, update_clip)
    return signal, drift, norm


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(np.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors.values())))


def _scale_to(tensors: dict[str, Tensor], bound: float) -> None:
    factor = min(1.0, bound / max(_norm(tensors), 1e-30))
    for tensor in tensors.values():
        tensor.mul_(factor)
