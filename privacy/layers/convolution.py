"""Convolution over time, and the linear layer that `transformers` calls Conv1D.

A convolution is a linear layer on patches: with p[t] = the inputs that output t sees, laid end to
end, y[t] = W p[t] + b. Its factors are those of a linear layer (Rochette, Manoel & Tramel 2019,
arXiv:1912.06015; Bu, Mao & Xu 2022, arXiv:2205.10683). Patches are laid out in the backward pass
only, from the input that is kept anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.factors import Dense, Direct, Summed, wide
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.linear import Leaf, applied, by_rows, grouped_matmul


class _ConvolutionFunction(torch.autograd.Function):
    """x (rows, C, L), padded already; weight ([groups,] out, C / parts, k)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: TrackedConv1d
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf = leaf
        stacks = _stacks(weight)
        y = F.conv1d(
            _aside(x, stacks),
            weight.reshape(-1, *weight.shape[-2:]),
            None if bias is None else bias.reshape(-1),
            leaf.stride, 0, leaf.dilation, leaf.parts * stacks,
        )
        return _back(y, stacks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (g,) = grads
        leaf: TrackedConv1d = ctx.leaf
        if "weight" in leaf.names:
            leaf.record("weight", leaf.factor(x, g))
        if "bias" in leaf.names:
            leaf.record("bias", Summed(g.transpose(1, 2)))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        stacks = _stacks(weight)
        weight = weight.to(g.dtype)  # under autocast the output is narrower than the weight
        inputs = _aside(x, stacks)
        back = conv1d_input(  # type: ignore[no-untyped-call]
            inputs.shape, weight.reshape(-1, *weight.shape[-2:]), _aside(g, stacks),
            leaf.stride, 0, leaf.dilation, leaf.parts * stacks,
        )
        return _back(back, stacks), None, None, None


def _stacks(weight: Tensor) -> int:
    return weight.shape[0] if weight.dim() == 4 else 1


def _aside(x: Tensor, stacks: int) -> Tensor:
    """(stacks B, C, L) as (B, stacks C, L): every stack of weights sees its own channels."""
    if stacks == 1:
        return x
    apart = x.reshape(stacks, -1, *x.shape[1:])
    return apart.transpose(0, 1).flatten(1, 2)


def _back(y: Tensor, stacks: int) -> Tensor:
    if stacks == 1:
        return y
    apart = y.reshape(y.shape[0], stacks, -1, y.shape[2])
    return apart.transpose(0, 1).flatten(0, 1)


class TrackedConv1d(Leaf):
    """`torch.nn.Conv1d`: input (rows, C, L). Every padding and padding mode keeps to its row.

    With `groups` above 1 (a depthwise convolution, say) the weight's per-row gradients are built
    outright: they take rows times the size of the weight.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv1d, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = (
            layer.kernel_size, layer.stride, layer.dilation)
        self.parts = self.groups = layer.groups
        self.padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        span = layer.dilation[0] * (layer.kernel_size[0] - 1)
        if layer.padding == "same":
            self.sides = (span // 2, span - span // 2)
        else:
            side = 0 if isinstance(layer.padding, str) else int(layer.padding[0])
            self.sides = (side, side)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise UnsupportedLayer(
                f"a tracked Conv1d takes (rows, channels, length), not {tuple(x.shape)}: add the "
                "dimension of rows"
            )
        self.tape.see(x.shape[0])
        if any(self.sides):
            x = F.pad(x, self.sides, mode=self.padding_mode)
        return applied(_ConvolutionFunction, x, self.weight, self.bias, self)

    def factor(self, x: Tensor, g: Tensor) -> Dense | Direct:
        """Factor of the weight from the padded input (rows, C, L) and g (rows, out, places)."""
        patches = self._patches(x, g.shape[2])
        if self.parts == 1:
            return Dense(patches.flatten(2), g.transpose(1, 2))
        rows, places, channels, span = patches.shape
        apart = patches.reshape(rows, places, self.parts, channels // self.parts, span)
        g = g.reshape(rows, self.parts, -1, places)
        grad = torch.einsum("rgot,rtgck->rgock", wide(g), wide(apart))
        return Direct(grad.flatten(1, 2))

    def _patches(self, x: Tensor, places: int) -> Tensor:
        """(rows, places, C, k): what each output sees, as a view of the input."""
        row, channel, step = x.stride()
        shape = (x.shape[0], places, x.shape[1], self.kernel_size[0])
        return x.as_strided(
            shape, (row, step * self.stride[0], channel, step * self.dilation[0]),
            x.storage_offset(),
        )


class _TransposedFunction(torch.autograd.Function):
    """x W + b with W ([groups,] in, out): its factor is a linear layer's with the sides swapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, leaf: Leaf) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf = leaf
        return grouped_matmul(x, weight.transpose(-1, -2), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (g,) = grads
        if "weight" in ctx.leaf.names:
            ctx.leaf.record("weight", Dense(g, x))
        if "bias" in ctx.leaf.names:
            ctx.leaf.record("bias", Summed(g))
        back = grouped_matmul(g, weight.to(g.dtype)) if ctx.needs_input_grad[0] else None
        return back, None, None, None


class TrackedConv1D(Leaf):
    """`transformers.pytorch_utils.Conv1D`, GPT-2's linear layer: input (rows, ..., in)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Any, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        self.nx, self.nf = layer.nx, layer.nf

    def forward(self, x: Tensor) -> Tensor:
        self.tape.see(x.shape[0])
        y = applied(_TransposedFunction, by_rows(x), self.weight, self.bias, self)
        return y.view(*x.shape[:-1], self.nf)
