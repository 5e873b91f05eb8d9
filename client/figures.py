"""What devices say of a round where its metrics are private: figures cut to public bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from sottovoce.client.groups import LocalUpdates
from sottovoce.privacy.mechanisms.private_metrics import FIGURES, NORMS, PREFIX, MetricBounds


def device_figures(updates: LocalUpdates, bounds: MetricBounds, clip_norm: float) -> Tensor:
    """(devices, figures) of `FIGURES`, each from 0 to 1: a device's mean loss and its visits over
    their bounds, and its unclipped norm over `NORMS` clip norms.

    *Guarantee*: a device's row has norm at most sqrt(len(FIGURES)), and depends on no other device.
    """
    visits = updates.visits.double()
    norms = updates.norms.double().nan_to_num(nan=0.0)
    found = torch.stack([
        torch.ones_like(visits),
        updates.clipped.double(),
        updates.losses.double().nan_to_num(nan=0.0) / visits.clamp_min(1) / bounds.loss,
        visits / bounds.examples,
        norms / (NORMS * clip_norm),
    ], dim=1)
    return found.clamp(0.0, 1.0)


def bounded_figures(
    updates: LocalUpdates, keep: Tensor, bounds: MetricBounds, clip_norm: float
) -> dict[str, float]:
    """Sums of figures over the first devices of a group, those that `keep` (devices,) marks."""
    rows = device_figures(updates, bounds, clip_norm)[: len(keep)][keep]
    return dict(zip([PREFIX + name for name in FIGURES], rows.sum(0).tolist(), strict=True))
