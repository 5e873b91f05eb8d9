"""A layer of LSTM by the compiled kernel (client/native/lstm.h), where it is built.

The kernel walks one lane after another through all of its time, and time backwards where asked to,
on arrays (rows, T, width) as a layer gets them: nothing is turned, joined or copied around it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sottovoce.client.native import address, kernels, level
from sottovoce.privacy.gradients.factors import Dense, Summed
from sottovoce.privacy.layers.linear import Leaf

_COUNTS = ("lanes", "rows", "length", "width", "size", "reverse", "shared")
_FIRST = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
_KEPT = ("gates", "before", "cells", "squashed")


class _Layer(ctypes.Structure):
    """`Layer` of lstm.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_void_p) for name in ("skipped", *_FIRST, *_KEPT, "out")),
        ("out_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden", "cell", "back")),
        ("added", ctypes.c_int64),
    ]


@dataclass
class Kept:
    """What a direction's forward pass leaves, each (rows, T, ·): activated gates (4 H), hidden
    states that each step began with, cells after it, and their tanh.
    """

    gates: Tensor
    before: Tensor
    cells: Tensor
    squashed: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.gates, self.before, self.cells, self.squashed


def suited(*tensors: Tensor) -> bool:
    """Whether the kernel is there, faster than torch, and takes such tensors."""
    return kernels() is not None and level() != "generic" and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors
    )


def go_ahead(
    x: Tensor, params: tuple[Tensor, ...], h0: Tensor, c0: Tensor, out: Tensor,
    ends: tuple[Tensor, Tensor], direction: int, fillers: Tensor | None = None,
) -> Kept:
    """Fill a direction's part of `out` (rows, T, D H), and last states `ends`, (rows, H) each.

    `x`: (rows, T, in), group by group. `params`: W_ih, W_hh and maybe both biases, of one group
    or stacked. `h0`, `c0`: (rows, H). All float32 and contiguous. `fillers`: (groups,) int64 rows
    that each group begins with and that count for nothing: all of theirs is zero.
    """
    rows, length, _ = x.shape
    size = h0.shape[1]
    kept = Kept(*(x.new_empty(rows, length, wide) for wide in (4 * size, size, size, size)))
    layer = _layer(x, params, c0, kept, out, direction, fillers)
    layer.h0 = address(h0)
    layer.hidden, layer.cell = map(address, ends)
    _run(layer, 0)
    return kept


def go_back(
    x: Tensor, params: tuple[Tensor, ...], c0: Tensor, kept: Kept, onto: Tensor,
    d_hidden: Tensor, d_cell: Tensor, back: Tensor | None, direction: int,
    fillers: Tensor | None = None,
) -> None:
    """Turn `kept.gates` into their gradients.

    `onto`: (rows, T, D H) gradients of all hidden states. `d_hidden`, `d_cell`: (rows, H) those of
    the last states, which become those of the first ones. `back`: (rows, T, in) becomes the
    gradient of x by the first direction, and has that by the second added.
    """
    layer = _layer(x, params, c0, kept, onto, direction, fillers)
    layer.hidden, layer.cell = address(d_hidden), address(d_cell)
    layer.back = None if back is None else address(back)
    layer.added = direction
    _run(layer, 1)


def _layer(
    x: Tensor, params: tuple[Tensor, ...], c0: Tensor, kept: Kept, out: Tensor, direction: int,
    fillers: Tensor | None,
) -> _Layer:
    (rows, length, width), size = x.shape, c0.shape[1]
    groups = params[1].shape[0] if params[1].dim() == 3 else 1
    if rows % groups:
        raise ValueError(f"{rows} rows do not divide into {groups} stacks of weights")
    if fillers is not None and groups not in (1, len(fillers)):
        fillers = None
    lanes = groups if fillers is None else len(fillers)
    layer = _Layer(lanes, rows // lanes, length, width, size, direction, groups < lanes)
    layer.skipped = None if fillers is None else address(fillers)
    names = ("x", "w_ih", "w_hh", "b_ih", "b_hh")
    for name, tensor in zip(names, (x, *params), strict=False):
        setattr(layer, name, address(tensor))
    for name, tensor in zip(_KEPT, kept.tensors(), strict=True):
        setattr(layer, name, address(tensor))
    layer.c0, layer.out = address(c0), address(out) + 4 * direction * size
    layer.out_stride = out.shape[2]
    return layer


def _run(layer: _Layer, backward: int) -> None:
    library = kernels()
    assert library is not None
    if library.kernels_lstm(ctypes.byref(layer), backward):
        raise MemoryError("no memory for the weights of an LSTM layer")


def in_full(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` without autocast, whose products would not fit the states they are written to."""

    @wraps(method)
    def run(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return run


def _leaks(fillers: Tensor | None, grads: tuple[Tensor, ...]) -> Tensor | None:
    """(rows, 1, 1) what reaches fillers, though their losses weigh nothing; 0 in other rows.

    For a probe, which must see it: a layer passes over what is handed on to fillers.
    """
    if fillers is None:
        return None
    sizes = grads[0].abs().sum((1, 2)) + grads[1].abs().sum((0, 2)) + grads[2].abs().sum((0, 2))
    place = torch.arange(len(sizes) // len(fillers))
    return torch.where((place < fillers.unsqueeze(1)).flatten(), sizes, 0.0).view(-1, 1, 1)


class NativeLSTMFunction(torch.autograd.Function):
    """One layer. Outputs: (rows, T, D H), last hidden states and last cells (D, rows, H)."""

    @staticmethod
    @in_full
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, names: list[str], leaf: Leaf, *params: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        directions, rows, size = h0.shape
        kinds = len(params) // directions
        x, h0, c0 = x.contiguous(), h0.contiguous(), c0.contiguous()
        params = tuple(tensor.contiguous() for tensor in params)
        out = x.new_empty(rows, x.shape[1], directions * size)
        fillers = leaf.tape.fillers_of(rows)
        hidden, cell, kept = torch.empty_like(h0), torch.empty_like(c0), list[Tensor]()
        for d in range(directions):
            own = params[d * kinds : (d + 1) * kinds]
            ends = hidden[d], cell[d]
            kept += go_ahead(x, own, h0[d], c0[d], out, ends, d, fillers).tensors()
        ctx.save_for_backward(x, c0, *kept, *params)
        ctx.names, ctx.leaf, ctx.kinds, ctx.fillers = names, leaf, kinds, fillers
        return out, hidden, cell

    @staticmethod
    @in_full
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, c0, *rest = ctx.saved_tensors
        directions, kinds = len(c0), ctx.kinds
        params, onto = rest[4 * directions :], grads[0].contiguous()
        d_hidden, d_cell = (
            each.clone(memory_format=torch.contiguous_format) for each in grads[1:]
        )
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        probed = ctx.leaf.tape.listener is not None
        leaks = _leaks(ctx.fillers, grads) if probed else None
        for d in range(directions):
            kept = Kept(*rest[4 * d : 4 * d + 4])
            if probed:
                kept.gates = kept.gates.clone()  # the pass after the probe needs them once more
            own = tuple(params[d * kinds : (d + 1) * kinds])
            go_back(x, own, c0[d], kept, onto, d_hidden[d], d_cell[d], d_x, d, ctx.fillers)
            increment_version(kept.gates)  # so that autograd refuses to go back once more
            if leaks is not None:
                kept.gates, kept.before = kept.gates + leaks, kept.before + leaks
            names = ctx.names[d * kinds : (d + 1) * kinds]
            ctx.leaf.record(names[0], Dense(x, kept.gates))
            ctx.leaf.record(names[1], Dense(kept.before, kept.gates))
            biases = Summed(kept.gates)  # one for both, which is added up once
            for name in names[2:]:
                ctx.leaf.record(name, biases)
        if leaks is not None and d_x is not None:
            d_x += leaks
        return d_x, d_hidden, d_cell, None, None, *[None] * len(params)
