"""What a group of K devices trains on and hands over, and how its batches are cut for a pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.tasks import Batch
from sottovoce.privacy.mechanisms.noise_streams import NoiseStreams

PASS_COST = 24


@dataclass
class GroupData:
    """The batches of K devices. `null` rows stand for nobody: they fill uneven steps.

    `batch`: collated examples of all K devices, the null row last; its `lengths` are the positions
    that count in each row. `rows`: for each step, (K, B) indices into the batch, each device's from
    its shortest example to its longest, filled up in front with the null row (length 0).
    `touched`: (K, U) embedding rows that each device uses, row 0 first, padded with 0;
    `touched_counts`: (K,). `steps`: (K,) steps of each, descending. `seeds`: (batch rows, steps) of
    dropout, or None where there is none. `micro_batches`: (batch rows, steps) number of the
    example's micro-batch, those of the first device first, -1 for the null row; or None.
    """

    batch: Batch
    rows: list[NDArray[np.int64]]
    touched: NDArray[np.int64]
    touched_counts: NDArray[np.int64]
    steps: NDArray[np.int64]
    seeds: NDArray[np.int64] | None = None
    micro_batches: NDArray[np.int64] | None = None


@dataclass
class LocalUpdates:
    """What K devices hand over, the embedding table in its cut-down form.

    `signal`: by name (K, *shape), the data-dependent part, already clipped. `noise`: the same
    shapes, or None. `finite`: (K,) bool. `norms`: (K,) of the unclipped signal. `losses`: (K,) of
    each device, summed over the examples it visited; `visits`: (K,) how many those were. `owed`:
    (K,) variance of noise that is part of the update but not in `noise`, in each of its
    coordinates: whoever adds updates up draws it for the sum; None where nothing is owed.
    `materialised`: (K, U) variance of what is in `noise`, in the touched rows of a cut table whose
    rows do not all have the same (`LazyRows`); None where `owed` tells it. Where updates were added
    up while they were trained (`BagTrainer`), `signal` is empty.
    """

    signal: dict[str, Tensor]
    noise: dict[str, Tensor] | None
    finite: Tensor
    norms: Tensor
    clipped: Tensor
    losses: Tensor
    visits: Tensor
    clipped_examples: int
    owed: Tensor | None = None
    materialised: Tensor | None = None

    @property
    def loss(self) -> float:
        return float(self.losses.sum())

    @property
    def examples(self) -> int:
        return int(self.visits.sum())


@dataclass
class DeviceNoise:
    """Each device's own noise: on its sums, None for no noise; on its counts, needed where
    thresholds follow a quantile. For the devices that are really there.
    """

    sums: NoiseStreams | None = None
    counts: list[np.random.Generator] | None = None


def length_buckets(lengths: NDArray[np.int64]) -> list[slice]:
    """Columns of a step cut in two where that saves the most padding.

    `lengths`: (K, B), ascending along each row. Clipped sums add up over any division of the
    rows, so a cut changes nothing but cost, taken as rows times longest row; a pass of its own
    costs about as much as `PASS_COST` positions of every device.
    """
    columns = lengths.shape[1]
    if columns == 0:
        return []
    longest = np.maximum(lengths.max(axis=0), 1)
    cuts = np.arange(1, columns)
    costs = cuts * longest[cuts - 1] + (columns - cuts) * longest[-1] + PASS_COST
    if not len(cuts) or costs.min() >= columns * longest[-1]:
        return [slice(0, columns)]
    at = int(cuts[costs.argmin()])
    return [slice(0, at), slice(at, columns)]


def shortened(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    """The batch's rows at `rows`, without the padding that none of them needs."""
    index = torch.from_numpy(rows)
    lengths = batch["lengths"][index]
    longest = max(int(lengths.max()), 1)
    return {
        name: tensor[:, :longest][index] if tensor.dim() > 1 else tensor[index]
        for name, tensor in batch.items()
    }
