"""Reference models: what the released model would say of data that it was not trained on.

Trained centrally and briefly, from the run's initial model, on training data without any candidate;
each on a random half of it, so that they differ. Costly, and so off by default.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from sottovoce.client.examples import Examples
from sottovoce.client.tasks.base import Task, to_device

STEPS = 400
BATCH = 32
LEARNING_RATE = 3e-3


def train_references(
    task: Task,
    initial: nn.Module,
    known: Examples,
    count: int,
    generator: np.random.Generator,
) -> tuple[nn.Module, ...]:
    """`count` models after `STEPS` of Adam each, all of it decided by `generator`."""
    return tuple(_trained(task, initial, known, generator) for _ in range(count))


def _trained(
    task: Task, initial: nn.Module, known: Examples, generator: np.random.Generator
) -> nn.Module:
    """Without dropout: a model in evaluation mode, whose gradients are those of the whole."""
    model = copy.deepcopy(initial).eval()
    device = next(model.parameters()).device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    half = generator.permutation(len(known))[: max(1, len(known) // 2)]
    for _ in range(STEPS):
        rows = generator.choice(half, min(BATCH, len(half)), replace=False)
        batch = to_device(task.collate(known.take(np.sort(rows))), device)
        slopes = torch.autograd.grad(task.losses(model, batch).mean(), weights, allow_unused=True)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope
        optimizer.step()
    return model
