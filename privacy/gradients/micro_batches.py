"""Micro-batches: examples that are clipped together, as their mean, and who is in which.

Every example takes its micro-batch by its own coin, among a public number of them. Membership of
the others then does not hang on whether an example is there. Cutting a batch into consecutive
chunks would: one example less moves every later one up, and into other chunks.

Source of the mode: Dupuy et al. 2022, arXiv:2107.14586; the assignment by coin is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sottovoce.privacy.gradients.clipping import Clipping
from sottovoce.privacy.gradients.factors import Bundles, Factor
from sottovoce.privacy.gradients.norms import Memo, squared_norms


@dataclass(frozen=True)
class MicroBatches:
    """Which micro-batch each row of a pass belongs to.

    `unit`: (rows,) int64 in [0, count), or -1 for a row that only fills up. `count`: micro-batches
    of all groups together, those of the first group first, equally many in each.

    *Guarantee*: one example changes the mean of one micro-batch only.
    *Assumes*: `unit` of an example depends neither on other examples nor on its place; `count` is
    public.
    """

    unit: Tensor
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or bool((self.unit >= self.count).any()):
            raise ValueError(f"units of rows must be below count={self.count}, which is 1 or more")

    @classmethod
    def drawn(cls, rows: int, count: int, generator: np.random.Generator) -> MicroBatches:
        """An independent, uniform coin for each of `rows` rows of one group."""
        return cls(torch.from_numpy(generator.integers(count, size=rows)), count)

    def to(self, device: torch.device) -> MicroBatches:
        return MicroBatches(self.unit.to(device), self.count)

    @property
    def members(self) -> Tensor:
        """(count,) number of rows of each micro-batch."""
        return torch.bincount(self.unit[self.unit >= 0], minlength=self.count)

    def by_size(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches of equal size together: their numbers (k,), and rows (k, size)."""
        members = self.members
        order = self.unit[self.unit >= 0].argsort(stable=True)
        order = (self.unit >= 0).nonzero().squeeze(1)[order]
        first = members.cumsum(0) - members
        for size in sorted(set(members.tolist()) - {0}):
            units = (members == size).nonzero().squeeze(1)
            places = first[units].unsqueeze(1) + torch.arange(size, device=units.device)
            yield units, order[places]

    def to_rows(self, values: Tensor) -> Tensor:
        """(count,) values, one for each micro-batch, as its rows have them; 0 in filling rows."""
        return torch.where(self.unit >= 0, values[self.unit.clamp(min=0)], values.new_zeros(()))

    def means(self, gradients: Tensor) -> Tensor:
        """(count, *shape) means of rows' gradients (rows, *shape), 0 for an empty micro-batch."""
        there = self.unit >= 0
        sums = gradients.new_zeros((self.count, *gradients.shape[1:]))
        sums.index_add_(0, self.unit[there], gradients[there])
        return sums / self.members.clamp(min=1).view(-1, *[1] * (gradients.dim() - 1))

    def weights(self, scale: Tensor) -> Tensor:
        """(rows,) weights of rows' gradients in the sum of means scaled by `scale` (count,)."""
        return self.to_rows(scale / self.members.clamp(min=1))


def mean_squares(
    factors: Mapping[str, list[Factor]], micro: MicroBatches
) -> dict[str, Tensor]:
    """(count,) squared norms of the mean gradients of micro-batches, by parameter; 0 if empty."""
    squares: dict[str, Tensor] = {}
    members = micro.members
    for units, index in micro.by_size():
        bundles, memo = Bundles(index), Memo()
        for name, uses in factors.items():
            found = squared_norms([use.bundled(bundles) for use in uses], memo)
            if name not in squares:
                squares[name] = found.new_zeros(micro.count)
            squares[name][units] = found / members[units] ** 2
    return squares


def row_scales(scales: Mapping[str, Tensor], micro: MicroBatches) -> dict[str, Tensor]:
    """Factors (rows,) by parameter from those of micro-batches; equal ones stay one tensor."""
    distinct = {id(scale): scale for scale in scales.values()}
    weights = {key: micro.weights(scale) for key, scale in distinct.items()}
    return {name: weights[id(scale)] for name, scale in scales.items()}


def count_of(expected_batch_size: float, micro_batch_size: float) -> int:
    """The public number of micro-batches: of the expected batch, never of the one drawn."""
    return max(1, round(expected_batch_size / micro_batch_size))


def check_units(rule: Clipping | None, rows: int, groups: int, micro: MicroBatches | None) -> None:
    """Raise ValueError unless micro-batches are given just where `rule` clips them."""
    wanted = rule is not None and rule.mode == "micro_batch"
    if wanted and micro is None:
        raise ValueError("clipping=micro_batch needs micro=MicroBatches(...): who is in which")
    if micro is None:
        return
    if not wanted:
        raise ValueError("micro-batches were given, but clipping is not micro_batch")
    if len(micro.unit) != rows or micro.count % groups:
        raise ValueError(
            f"micro-batches of {len(micro.unit)} rows, {micro.count} in all, do not fit "
            f"{rows} rows in groups={groups}"
        )
    own = torch.arange(rows, device=micro.unit.device) // max(1, rows // groups)
    theirs = micro.unit // (micro.count // groups)
    if bool(((micro.unit >= 0) & (own != theirs)).any()):
        raise ValueError("a row is in a micro-batch of another group: number them group by group")
