"""Tracked leaves: layers that keep their factors instead of a weight gradient.

Each leaf stands in for a torch layer of the same name and parameters. Its weights are either the
layer's own (shared by all rows) or stacked (groups, *shape), one set for each group of rows; its
backward pass records (input, output gradient) on the tape and returns *no* weight gradient, so a
weight that still has one after the pass was used behind the leaf's back.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients import gemm
from sottovoce.privacy.gradients.factors import Dense, Direct, Factor, OneHot, Summed
from sottovoce.privacy.gradients.tape import Tape


def by_rows(tensor: Tensor) -> Tensor:
    """(rows, ..., D) as (rows, T, D), T the product of what lies between (1 if nothing does)."""
    if tensor.dim() <= 3:
        return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def grouped_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (rows, [T,] in); W (out, in), or (groups, out, in), rows group by group."""
    if weight.dim() == 2:
        return gemm.linear(x, weight, bias)
    groups, out, width = weight.shape
    y = gemm.stacked_linear(x.reshape(groups, -1, width), weight, bias)
    return y.view(*x.shape[:-1], out)


def grouped_back(g: Tensor, weight: Tensor) -> Tensor:
    """g W for g (rows, [T,] out): the gradient of the input of `grouped_matmul`."""
    weight = weight.to(g.dtype)  # under autocast the output is narrower than the weight
    if weight.dim() == 2:
        return gemm.matmul(g, weight)
    flat = g.reshape(weight.shape[0], -1, g.shape[-1])
    return gemm.stacked_matmul(flat, weight).view(*g.shape[:-1], weight.shape[2])


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """`function.apply`, which torch leaves untyped."""
    return cast(Tensor, function.apply(*inputs))  # type: ignore[no-untyped-call]


class Leaf(nn.Module):
    """Base of tracked leaves: knows its tape and the names of its trainable parameters."""

    def __init__(self, layer: nn.Module, tape: Tape, names: dict[str, str]) -> None:
        super().__init__()
        self.tape = tape
        self.names = names  # own parameter name -> name in the model, trainable ones only
        self.train(layer.training)
        for name, parameter in layer._parameters.items():  # None where a bias is left out
            self.register_parameter(name, parameter)

    def record(self, own_name: str, factor: Factor) -> None:
        if own_name in self.names:
            self.tape.record(self.names[own_name], factor)


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, leaf: Leaf) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaf = leaf
        return grouped_matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        g = by_rows(grads[0])  # one object for both, so that its Gram product is made once
        if "weight" in ctx.leaf.names:
            ctx.leaf.record("weight", Dense(by_rows(x), g))
        if "bias" in ctx.leaf.names:
            ctx.leaf.record("bias", Summed(g))
        back = grouped_back(grads[0], weight) if ctx.needs_input_grad[0] else None
        return back, None, None, None


class TrackedLinear(Leaf):
    """`torch.nn.Linear` over rows: input (rows, ..., in), output (rows, ..., out)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        self.tape.see(x.shape[0])
        return applied(_LinearFunction, x, self.weight, self.bias, self)


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return gemm.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gemm.matmul(grads[0], ctx.weight.to(grads[0].dtype)), None, None


class FrozenLinear(nn.Module):
    """`torch.nn.Linear` whose parameters do not train, on the faster library (`gemm`)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return gemm.linear(x, self.weight, self.bias)
        return applied(_FrozenLinearFunction, x, self.weight, self.bias)


class _EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, leaf: TrackedEmbedding) -> Tensor:
        ctx.save_for_backward(index)
        ctx.leaf = leaf
        if weight.dim() == 2:
            return F.embedding(index, weight)
        groups, vocabulary, width = weight.shape
        offset = torch.arange(groups, device=index.device).mul_(vocabulary).view(-1, 1)
        flat = (index.reshape(groups, -1) + offset).view(index.shape)
        return F.embedding(flat, weight.view(groups * vocabulary, width))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        (g,) = grads
        padding = ctx.leaf.padding_idx
        if padding is not None:
            g = g.masked_fill((index == padding).unsqueeze(-1), 0.0)
        ctx.leaf.record("weight", OneHot(index, g))
        return None, None, None


class TrackedEmbedding(Leaf):
    """`torch.nn.Embedding` over rows: indices (rows, ...), output (rows, ..., D).

    One row of indices for all rows (shape (1, T) or (T,), as position ids often come) is repeated
    for each, so that each row's gradient stays its own.
    """

    weight: Tensor

    def __init__(self, layer: nn.Embedding, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            raise UnsupportedLayer(
                "Embedding(max_norm=…) and scale_grad_by_freq look at other rows: switch them off"
            )
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self.for_all = False

    def forward(self, index: Tensor) -> Tensor:
        rows = self.tape.rows_now
        if index.dim() == 1 and (self.for_all or index.shape[0] != (rows or index.shape[0])):
            self.for_all = True  # and so they are when a batch happens to have as many rows
            index = index.unsqueeze(0)
        if index.dim() and index.shape[0] == 1 and rows is not None and rows > 1:
            index = index.expand(rows, *index.shape[1:])
        self.tape.see(index.shape[0])
        flat = index.reshape(index.shape[0], math.prod(index.shape[1:]))
        result = applied(_EmbeddingFunction, flat, self.weight, self)
        return result.view(*index.shape, self.embedding_dim)


class _LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, leaf: Leaf
    ) -> Tensor:
        shared = weight.dim() == 1
        affine = (weight, bias) if shared else (None, None)
        normalise = torch.ops.aten.native_layer_norm
        y, mean, rstd = normalise(x, x.shape[-1:], *affine, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.leaf = leaf
        if shared:
            return cast(Tensor, y)
        y = _per_group(y, weight, torch.mul)
        return y if bias is None else _per_group(y, bias, torch.add)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, rstd, weight = ctx.saved_tensors
        (g,) = grads
        if "weight" in ctx.leaf.names:
            ctx.leaf.record("weight", Direct((x - mean).mul_(rstd).mul_(g).sum(1)))
        if "bias" in ctx.leaf.names:
            ctx.leaf.record("bias", Direct(g.sum(1)))  # g itself would be kept for long
        back = None
        if ctx.needs_input_grad[0]:
            shared = weight if weight.dim() == 1 else None
            g = g.contiguous() if shared is not None else _per_group(g, weight, torch.mul)
            back = torch.ops.aten.native_layer_norm_backward(
                g, x, x.shape[-1:], mean, rstd, shared, None, [True, False, False]
            )[0]
        return back, None, None, None, None


def _per_group(x: Tensor, vector: Tensor, operation: Any) -> Tensor:
    """x (rows, T, D) combined with a vector (D,), or with (groups, D) group by group."""
    if vector.dim() == 1:
        result: Tensor = operation(x, vector)
        return result
    groups = vector.shape[0]
    result = operation(x.reshape(groups, -1, x.shape[-1]), vector.unsqueeze(1))
    return result.view(x.shape)


class TrackedLayerNorm(Leaf):
    """`torch.nn.LayerNorm` over the last dimension: input (rows, ..., D)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.LayerNorm, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        if len(layer.normalized_shape) != 1:
            raise UnsupportedLayer(
                f"LayerNorm over {tuple(layer.normalized_shape)}: only the last dimension is "
                "supported; freeze the layer or normalise one dimension"
            )
        self.normalized_shape, self.eps = layer.normalized_shape, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        self.tape.see(x.shape[0])
        flat = by_rows(x)
        y = applied(_LayerNormFunction, flat, self.weight, self.bias, self.eps, self)
        return y.view(x.shape)
