"""RMSNorm and GroupNorm as tracked leaves, Hugging Face's kinds of RMSNorm among them.

A norm is a row-wise function without parameters, then a gain (and a bias) per feature. Only the
second half is tracked: the gain's per-row gradient is sum_t g * x, the bias's sum_t g.

Sources: Zhang & Sennrich 2019, arXiv:1910.07467 (RMSNorm); Wu & He 2018, arXiv:1803.08494
(GroupNorm).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.factors import Direct, wide
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.linear import Leaf, applied, by_rows


class _GainFunction(torch.autograd.Function):
    """x (rows, T, D) times gain + `plus`, and + bias; vectors (D,) or (groups, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor | None, plus: float, leaf: Leaf
    ) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.plus, ctx.leaf = plus, leaf
        y = _scaled(x, gain, plus)
        return y if bias is None else _in_groups(y, bias).add(_vector(bias)).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gain = ctx.saved_tensors
        (g,) = grads
        if "weight" in ctx.leaf.names:
            # Gemma's gain works in float32 whatever type it is kept in.
            kept = torch.promote_types(g.dtype, ctx.leaf.weight.dtype)
            ctx.leaf.record("weight", Direct((g * x).sum(1).to(kept)))
        if "bias" in ctx.leaf.names:
            ctx.leaf.record("bias", Direct(g.sum(1)))
        back = _scaled(g, gain, ctx.plus) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None


def _scaled(x: Tensor, gain: Tensor, plus: float) -> Tensor:
    gain = gain + plus if plus else gain
    return _in_groups(x, gain).mul(_vector(gain)).view(x.shape)


def _in_groups(x: Tensor, vector: Tensor) -> Tensor:
    """x (rows, T, D) as it is, or (groups, B T, D) where the vector is (groups, D)."""
    return x if vector.dim() == 1 else x.reshape(vector.shape[0], -1, x.shape[-1])


def _vector(vector: Tensor) -> Tensor:
    return vector if vector.dim() == 1 else vector.unsqueeze(1)


class _RMSNormFunction(torch.autograd.Function):
    """y = gain n, n = x / rms(x); x (rows, T, D). Backward: dx = (d - n mean(d n)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, leaf: Leaf) -> Tensor:
        rstd = wide(x).pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, gain)
        ctx.leaf = leaf
        return _scaled(wide(x) * rstd, gain, 0.0).to(torch.promote_types(x.dtype, gain.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, rstd, gain = ctx.saved_tensors
        g = wide(grads[0])
        normal = wide(x) * rstd
        each = g * normal
        if "weight" in ctx.leaf.names:
            ctx.leaf.record("weight", Direct(each.sum(1)))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        inner = _scaled(each, gain, 0.0).mean(-1, keepdim=True)
        back = _scaled(g, gain, 0.0).sub_(normal.mul_(inner)).mul_(rstd)
        return back.to(x.dtype), None, None, None


class TrackedRMSNorm(Leaf):
    """`torch.nn.RMSNorm` over the last dimension: input (rows, ..., D)."""

    weight: Tensor

    def __init__(self, layer: nn.RMSNorm, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        if len(layer.normalized_shape) != 1:
            raise UnsupportedLayer(
                f"RMSNorm over {tuple(layer.normalized_shape)}: only the last dimension is "
                "supported; freeze the layer or normalise one dimension"
            )
        self.normalized_shape, self.eps = layer.normalized_shape, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        self.tape.see(x.shape[0])
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return applied(_RMSNormFunction, by_rows(x), self.weight, eps, self).view(x.shape)


class TrackedHubRMSNorm(Leaf):
    """A `transformers` RMSNorm: the mean square is taken in float32, as there.

    How the classes differ is kept in three facts, which subclasses state: what is added to the
    gain, whether the normalised input is rounded to the input's type before the gain or after it,
    and whether the gain is applied in float32.
    """

    weight: Tensor
    plus = 0.0
    round_first = True
    gain_in_float32 = False

    def __init__(self, layer: Any, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        self.eps = layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps

    def forward(self, x: Tensor) -> Tensor:
        self.tape.see(x.shape[0])
        normal = self.normalised(x)
        normal = normal.to(x.dtype) if self.round_first else normal
        gain = self.weight.float() if self.gain_in_float32 else self.weight
        y = applied(_GainFunction, by_rows(normal), gain, None, self.plus, self).view(x.shape)
        return y if self.round_first else y.to(x.dtype)

    def normalised(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class TrackedGemmaRMSNorm(TrackedHubRMSNorm):
    """Gemma's: a gain of 1 + weight, all of it in float32."""

    plus = 1.0
    round_first = False
    gain_in_float32 = True


class TrackedLateRMSNorm(TrackedHubRMSNorm):
    """OLMo 2's and GPT-OSS's: rounded to the input's type after the gain."""

    round_first = False


class TrackedT5LayerNorm(TrackedHubRMSNorm):
    """T5's: only the mean square is in float32, and the output has the gain's type."""

    def forward(self, x: Tensor) -> Tensor:
        self.tape.see(x.shape[0])
        normal = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            normal = normal.to(self.weight.dtype)
        return applied(_GainFunction, by_rows(normal), self.weight, None, 0.0, self).view(x.shape)


class _GroupNormFunction(torch.autograd.Function):
    """x (rows, C, places); gain and bias (C,) or (groups, C)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor | None, leaf: TrackedGroupNorm
    ) -> Tensor:
        shared = gain.dim() == 1
        y: Tensor
        y, mean, rstd = torch.ops.aten.native_group_norm(
            x, *((gain, bias) if shared else (None, None)), *x.shape, leaf.num_groups, leaf.eps
        )
        ctx.save_for_backward(x, mean, rstd, gain)
        ctx.leaf = leaf
        if shared:
            return y
        y = _by_channel(y, gain, torch.mul)
        return y if bias is None else _by_channel(y, bias, torch.add)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, rstd, gain = ctx.saved_tensors
        g = grads[0].contiguous()
        if "weight" in ctx.leaf.names:
            apart = x.view(*mean.shape, -1)
            normal = (apart - mean.unsqueeze(2)).mul_(rstd.unsqueeze(2)).view(x.shape)
            ctx.leaf.record("weight", Direct((normal * g).sum(2)))
        if "bias" in ctx.leaf.names:
            ctx.leaf.record("bias", Direct(g.sum(2)))
        back = None
        if ctx.needs_input_grad[0]:
            shared = gain if gain.dim() == 1 else None
            g = g if shared is not None else _by_channel(g, gain, torch.mul)
            back = torch.ops.aten.native_group_norm_backward(
                g, x, mean, rstd, shared, *x.shape, ctx.leaf.num_groups, [True, False, False]
            )[0]
        return back, None, None, None


def _by_channel(x: Tensor, vectors: Tensor, operation: Any) -> Tensor:
    """x (rows, C, places) with `vectors` (groups, C) applied group by group."""
    apart = x.reshape(vectors.shape[0], -1, *x.shape[1:])
    result: Tensor = operation(apart, vectors[:, None, :, None])
    return result.view(x.shape)


class TrackedGroupNorm(Leaf):
    """`torch.nn.GroupNorm`: input (rows, C, ...); gain and bias per channel."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.GroupNorm, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        self.num_groups, self.num_channels = layer.num_groups, layer.num_channels
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        self.tape.see(x.shape[0])
        flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:])).contiguous()
        return applied(_GroupNormFunction, flat, self.weight, self.bias, self).view(x.shape)
