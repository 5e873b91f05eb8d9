"""EmbeddingBag: the sum or the mean of a row's embeddings, as a tracked leaf.

y[r] = sum_t w[r, t] E[i[r, t]], so the gradient of the table in row r is sum_t w[r, t] onehot(i) g
with one g for all positions. Its squared norm is |g|^2 sum_{t,s} w_t w_s [i_t = i_s]: the counts of
the words, not a Gram product of gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.factors import Bag
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.linear import Leaf, applied

SMALL = 1 << 20  # numbers up to which looking all words up is cheaper than torch's fused kernel


class _BagFunction(torch.autograd.Function):
    """index (rows, T); table ([groups,] V, D); weight (rows, T), or None for a plain mean."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, table: Tensor, weight: Tensor | None, leaf: Leaf) -> Any:
        flat, rows = _flat_table(index, table)
        ctx.save_for_backward(index, weight, rows, flat)
        ctx.leaf = leaf
        few = index.numel() * table.shape[-1] <= SMALL
        if weight is None and table.dim() == 2 and few:
            return F.embedding(rows, flat).mean(1)
        mode = "mean" if weight is None else "sum"
        return F.embedding_bag(rows, flat, mode=mode, per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        index, weight, rows, flat = ctx.saved_tensors
        (g,) = grads
        ctx.leaf.record("weight", Bag(index, weight, g))
        back = None
        if ctx.needs_input_grad[2]:
            back = (F.embedding(rows, flat) * g.unsqueeze(1)).sum(2)
        return None, None, back, None


def _flat_table(index: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """A stack of tables as one long one, and the indices into it."""
    if table.dim() == 2:
        return table, index
    groups, vocabulary, width = table.shape
    offset = torch.arange(groups, device=index.device).mul_(vocabulary).view(-1, 1)
    rows = (index.reshape(groups, -1) + offset).view(index.shape)
    return table.view(groups * vocabulary, width), rows


class TrackedEmbeddingBag(Leaf):
    """`torch.nn.EmbeddingBag`, modes sum and mean: indices (rows, T), output (rows, D)."""

    weight: Tensor

    def __init__(self, layer: nn.EmbeddingBag, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        if layer.mode == "max":
            raise UnsupportedLayer(
                "EmbeddingBag(mode='max') has no tracked form: use mode='mean', or an Embedding "
                "and amax(1)"
            )
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            raise UnsupportedLayer(
                "EmbeddingBag(max_norm=…) and scale_grad_by_freq look at other rows: switch them "
                "off"
            )
        self.mode, self.padding_idx = layer.mode, layer.padding_idx
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        if input.dim() != 2 or offsets is not None:
            raise UnsupportedLayer(
                "a tracked EmbeddingBag takes indices (rows, T), not flat ones with offsets: pad "
                "the bags with padding_idx"
            )
        self.tape.see(input.shape[0])
        weight = self._weights(input, per_sample_weights)
        return applied(_BagFunction, input, self.weight, weight, self)

    def _weights(self, index: Tensor, given: Tensor | None) -> Tensor | None:
        """(rows, T) weight of each word in its bag's sum; None where all weigh 1 / T."""
        if given is not None and self.mode != "sum":
            raise ValueError(f"per_sample_weights need mode='sum', not mode={self.mode!r}")
        own = self.tape.own(index) if self.padding_idx is None else index != self.padding_idx
        if own is None:
            if self.mode == "mean":
                return None
            return torch.ones_like(index, dtype=self.weight.dtype) if given is None else given
        real = own.to(self.weight.dtype)
        if self.mode == "mean":
            return real / real.sum(1, keepdim=True).clamp_min(1.0)
        return real if given is None else real * given
