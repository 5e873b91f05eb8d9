"""Multi-head attention as a tracked leaf: `torch.nn.MultiheadAttention` and what is built on it.

Attention itself treats rows apart and needs no tracking. Its projections are linear layers whose
weights are slices of one packed parameter: the factor of a slice is that of a linear layer, with
zeros where the output gradients of the other slices would stand.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.factors import Dense, Summed
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.dropout import dropped
from sottovoce.privacy.layers.linear import (
    Leaf,
    TrackedLinear,
    applied,
    grouped_back,
    grouped_matmul,
)


class _SliceFunction(torch.autograd.Function):
    """x W[a:b]^T + b[a:b]. `name`: the weight's; `cut`, `bias_cut`: slices of the output sides."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Leaf, name: str,
        cut: tuple[int, int], bias_cut: tuple[int, int],
    ) -> Tensor:
        part = weight[..., cut[0] : cut[1], :]
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.name, ctx.cut, ctx.bias_cut = leaf, name, cut, bias_cut
        ctx.bias_size = None if bias is None else bias.shape[-1]
        ends = None if bias is None else bias[..., bias_cut[0] : bias_cut[1]]
        return grouped_matmul(x, part, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (g,) = grads
        if ctx.name in ctx.leaf.names:
            ctx.leaf.record(ctx.name, Dense(x, _placed(g, ctx.cut, weight.shape[-2])))
        if "in_proj_bias" in ctx.leaf.names and ctx.bias_size is not None:
            ctx.leaf.record("in_proj_bias", Summed(_placed(g, ctx.bias_cut, ctx.bias_size)))
        back = None
        if ctx.needs_input_grad[0]:
            part = weight[..., ctx.cut[0] : ctx.cut[1], :]
            back = grouped_back(g, part)
        return back, None, None, None, None, None, None


def _placed(g: Tensor, cut: tuple[int, int], size: int) -> Tensor:
    """g in the last dimension's slice `cut`, zeros in the rest of its `size`."""
    return g if g.shape[-1] == size else F.pad(g, (cut[0], size - cut[1]))


class TrackedMultiheadAttention(Leaf):
    """`torch.nn.MultiheadAttention` over rows, `batch_first` or not."""

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None

    def __init__(self, layer: nn.MultiheadAttention, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        if layer.bias_k is not None or layer.add_zero_attn:
            raise UnsupportedLayer(
                "MultiheadAttention(add_bias_kv=True) and add_zero_attn=True have no tracked "
                "form: switch them off, or freeze the layer"
            )
        self.embed_dim, self.num_heads, self.head_dim = (
            layer.embed_dim, layer.num_heads, layer.head_dim)
        self.kdim, self.vdim, self.batch_first = layer.kdim, layer.vdim, layer.batch_first
        self.dropout = layer.dropout
        self.packed = layer.in_proj_weight is not None
        # torch's fused encoder layer reads the weights itself; this tells it not to.
        self._qkv_same_embed_dim = False
        if layer.in_proj_bias is None:
            self.register_parameter("in_proj_bias", None)
        out: nn.Linear = layer.out_proj
        own = {n: names[f"out_proj.{n}"] for n in ("weight", "bias") if f"out_proj.{n}" in names}
        self.out_proj: nn.Module = TrackedLinear(out, tape, own) if own else out

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise UnsupportedLayer(
                f"a tracked MultiheadAttention takes (rows, T, D), not {tuple(query.shape)}: add "
                "the dimension of rows"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask: pass the mask too")
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        self.tape.see(q.shape[0])
        mask = self._mask(key_padding_mask, attn_mask, q)
        mixed, weights = self._mixed(q, k, v, mask, need_weights)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return out, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value after their projections: (rows, T, embed_dim) each."""
        size = self.embed_dim
        if not self.packed:
            return tuple(
                self._slice(x, f"{letter}_proj_weight", (0, size), (i * size, (i + 1) * size))
                for i, (x, letter) in enumerate(zip((query, key, value), "qkv", strict=True))
            )
        if key is query and value is key:
            return self._slice(query, "in_proj_weight", (0, 3 * size)).chunk(3, dim=-1)
        first = self._slice(query, "in_proj_weight", (0, size))
        if value is key:
            both = self._slice(key, "in_proj_weight", (size, 3 * size))
            return (first, *both.chunk(2, dim=-1))
        second = self._slice(key, "in_proj_weight", (size, 2 * size))
        return first, second, self._slice(value, "in_proj_weight", (2 * size, 3 * size))

    def _slice(
        self, x: Tensor, name: str, cut: tuple[int, int], bias_cut: tuple[int, int] | None = None
    ) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        weight = getattr(self, name)
        return applied(
            _SliceFunction, x, weight, self.in_proj_bias, self, name, cut, bias_cut or cut
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores, to be broadcast over (rows, heads, T, S), or None."""
        rows = like.shape[0]
        total = None
        if mask is not None:
            total = _additive(mask, like)
            if mask.dim() == 3:
                total = total.view(rows, self.num_heads, *mask.shape[1:])
        if padding is not None:
            hidden = _additive(padding, like).view(rows, 1, 1, -1)
            total = hidden if total is None else total + hidden
        return total

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention's output (rows, heads, T, head_dim), and its weights if they are needed."""
        rate = self.dropout if self.training else 0.0
        if not need_weights and (rate == 0.0 or self.tape.row_seeds is None):
            return F.scaled_dot_product_attention(q, k, v, mask, rate), None
        scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-1, -2)
        scores = scores if mask is None else scores + mask
        weights = dropped(scores.softmax(-1), rate, self.training, self.tape)
        return weights @ v, weights if need_weights else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask (True: hidden) as what is added to scores; a float one as it is."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
