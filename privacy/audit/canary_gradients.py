"""Gradients of single candidates: their norms, and how the model moved along them.

The engine of `sottovoce.privacy.gradients` gives each row's gradient in one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.tasks.base import Batch, to_device
from sottovoce.privacy.audit.canary_view import CanaryView
from sottovoce.privacy.audit.roc import Scores
from sottovoce.privacy.gradients.engine import clipped_gradients

AT_ONCE = 2**24  # weights of single gradients in memory: 64 MB
ROWS = 64
UNCLIPPED = 1e6


def norms(view: CanaryView) -> Scores:
    """(candidates,) norm of each gradient at the released model."""
    found = np.empty(len(view.candidates))
    for rows, batch in _batches(view, ROWS):
        found[rows] = _gradients(view, view.model, batch, 1)[1]
    return found


def projections(view: CanaryView) -> Scores:
    """(candidates,) cosine between the way that the model went and each one's own descent.

    Gradients are those at the initial and at the released model, on average.
    """
    with torch.no_grad():
        before, after = _weights(view.initial_model), _weights(view.model)
        way = [end - start for start, end in zip(before, after, strict=True)]
        length = torch.stack([part.double().square().sum() for part in way]).sum().sqrt()
    found = np.zeros(len(view.candidates))
    weights = sum(part.numel() for part in way)
    for model in (view.initial_model, view.model):
        for rows, batch in _batches(view, min(ROWS, max(1, AT_ONCE // weights))):
            gradients, size = _gradients(view, model, batch, len(rows))
            along = sum(
                (g.flatten(1) @ part.to(g).flatten()).double().cpu().numpy()
                for g, part in zip(gradients, way, strict=True)
            )
            found[rows] -= along / np.maximum(size * float(length), 1e-30) / 2
    return found


def _gradients(
    view: CanaryView, model: nn.Module, batch: Batch, groups: int
) -> tuple[list[Tensor], Scores]:
    """Gradients summed by group, and each row's norm (rows,), float64."""
    def row_losses(tracked: nn.Module) -> Tensor:
        return view.task.losses(tracked, batch)

    training = model.training
    model.eval()
    try:
        gradients, size = clipped_gradients(model, row_losses, UNCLIPPED, groups=groups)
    finally:
        model.train(training)
    return gradients, size.double().cpu().numpy()


def _batches(view: CanaryView, rows: int) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    device = next(view.model.parameters()).device
    for chosen, batch in view.task.evaluation_batches(view.candidates, rows):
        yield chosen, to_device(batch, device)


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]
