"""LSTM as tracked linears over time, both directions at once, with a hand-written backward pass.

Per step the cell is  i, f, g, o = x W_ih^T + h W_hh^T + b;  c' = f c + i g;  h' = o tanh(c')
(Hochreiter and Schmidhuber 1997, with forget gates). The backward pass yields the gate gradients
of every step; they are the output gradients of both linears, so norms and clipped sums follow as
for any other linear.

A *lane* is a direction, or a direction of one group of stacked weights: states are
(lanes, n, H), n rows each, and every step is one batched program over all lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients import gemm
from sottovoce.privacy.gradients.factors import Dense, Summed
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers import native_lstm
from sottovoce.privacy.layers.dropout import dropped
from sottovoce.privacy.layers.linear import Leaf
from sottovoce.privacy.layers.native_lstm import in_full

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass
class Lanes:
    """How rows (K n, ...) of K groups and D directions are laid out: lane d K + k."""

    directions: int
    groups: int

    def of_rows(self, x: Tensor) -> Tensor:
        """(rows, T, width) as (groups, T, n, width)."""
        return x.reshape(self.groups, -1, *x.shape[1:]).transpose(1, 2)

    def to_rows(self, x: Tensor) -> Tensor:
        """(groups, T, n, width) as (rows, T, width); a view where there is one group."""
        return x.transpose(1, 2).flatten(0, 1) if self.groups > 1 else x[0].transpose(0, 1)

    def by_direction(self, x: Tensor) -> Tensor:
        """(lanes, ...) as (directions, groups, ...)."""
        return x.view(self.directions, self.groups, *x.shape[1:])

    def states(self, state: Tensor) -> Tensor:
        """(directions, rows, H) as (lanes, n, H)."""
        return state.reshape(self.directions * self.groups, -1, state.shape[2])


def directed(x: Tensor, direction: int, dim: int = 1) -> Tensor:
    """Time turned round for the second direction."""
    return x.flip(dim) if direction else x


def stacked(weight: Tensor) -> Tensor:
    """A shared weight (out, in) as a stack of one."""
    return weight if weight.dim() == 3 else weight.unsqueeze(0)


def lane_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(groups, T, n, in) times a stack (groups, out, in), plus (groups, out)."""
    groups, length, rows, width = x.shape
    y = gemm.stacked_linear(x.reshape(groups, -1, width), weight, bias)
    return y.view(groups, length, rows, y.shape[-1])


def lane_step(pre: Tensor, state: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = pre + state W^T in every lane: (lanes, n, ·), W (lanes, out, in)."""
    if gemm.one_by_one(state, weight):
        for lane in range(len(state)):
            out[lane] = gemm.step(pre[lane], state[lane], weight[lane])
    else:
        torch.baddbmm(pre, state, weight.transpose(1, 2), out=out)


def fast_tanh(x: Tensor, out: Tensor) -> Tensor:
    """tanh(x) = 2 sigmoid(2x) - 1, which torch computes four times faster."""
    return torch.mul(x, 2, out=out).sigmoid_().mul_(2).sub_(1)


class _LSTMFunction(torch.autograd.Function):
    """One layer. Outputs: (rows, T, D H), last hidden states and last cells (D, rows, H)."""

    @staticmethod
    @in_full
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, names: list[str], leaf: Leaf, *params: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kinds = len(params) // h0.shape[0]
        own = [params[at : at + kinds] for at in range(0, len(params), kinds)]
        lanes = Lanes(len(own), stacked(own[0][1]).shape[0])
        matrix = torch.cat([stacked(p[1]) for p in own])
        gates = torch.cat([
            lane_linear(directed(lanes.of_rows(x), d), stacked(p[0]), _bias(p))
            for d, p in enumerate(own)
        ])
        hidden, cells, squashed = _run(gates, lanes.states(h0), lanes.states(c0), matrix)
        ctx.save_for_backward(x, gates, cells, hidden, squashed, *params)
        ctx.lanes, ctx.names, ctx.leaf, ctx.kinds = lanes, names, leaf, kinds
        by_direction = lanes.by_direction(hidden[:, 1:])
        out = torch.cat(
            [lanes.to_rows(directed(h, d)) for d, h in enumerate(by_direction)], dim=2
        )
        ends = (lanes.directions, x.shape[0], hidden.shape[-1])
        return out.contiguous(), hidden[:, -1].reshape(ends), cells[:, -1].reshape(ends)

    @staticmethod
    @in_full
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gates, cells, hidden, squashed, *params = ctx.saved_tensors
        lanes, kinds = ctx.lanes, ctx.kinds
        own = [params[at : at + kinds] for at in range(0, len(params), kinds)]
        size = cells.shape[-1]
        if ctx.leaf.tape.listener is not None:
            gates = gates.clone()  # the pass after the probe needs them once more
        onto = torch.cat([
            directed(lanes.of_rows(grads[0][..., d * size : (d + 1) * size]), d)
            for d in range(lanes.directions)
        ])
        onto[:, -1] += lanes.states(grads[1])
        matrix = torch.cat([stacked(p[1]) for p in own])
        d_hidden, d_cell = _back(
            gates, cells, squashed, onto, lanes.states(grads[2]).clone(), matrix
        )
        d_gates, d_x = lanes.by_direction(gates), None
        before = lanes.by_direction(hidden[:, :-1])
        for d in range(lanes.directions):
            names = ctx.names[d * kinds : (d + 1) * kinds]
            g = lanes.to_rows(d_gates[d])
            ctx.leaf.record(names[0], Dense(directed(x, d), g))
            ctx.leaf.record(names[1], Dense(lanes.to_rows(before[d]), g))
            for name in names[2:]:
                ctx.leaf.record(name, Summed(g))
            if ctx.needs_input_grad[0]:
                back = lane_linear(d_gates[d], stacked(own[d][0]).transpose(1, 2), None)
                back = lanes.to_rows(directed(back, d))
                d_x = back if d_x is None else d_x + back
        ends = (lanes.directions, x.shape[0], size)
        return d_x, d_hidden.reshape(ends), d_cell.reshape(ends), None, None, *[None] * len(params)


def _bias(params: tuple[Tensor, ...]) -> Tensor | None:
    return (params[2] + params[3]).view(-1, params[2].shape[-1]) if len(params) == 4 else None


def _run(
    gates: Tensor, h0: Tensor, c0: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward in time. `gates` (lanes, T, n, 4H) holds what comes from the input, then the gates.

    Returns hidden states and cells (lanes, T + 1, n, H) and tanh of the cells (lanes, T, n, H).
    """
    lanes, length, rows, width = gates.shape
    size = width // 4
    cells = gates.new_empty((lanes, length + 1, rows, size))
    hidden, squashed = torch.empty_like(cells), torch.empty_like(cells[:, 1:])
    hidden[:, 0], cells[:, 0] = h0, c0
    for t in range(length):
        z = gates[:, t]
        lane_step(z, hidden[:, t], matrix, out=z)
        candidate = z[..., 2 * size : 3 * size].mul_(2)
        z.sigmoid_()
        candidate.mul_(2).sub_(1)  # tanh, as in `fast_tanh`
        i, f, g, o = z.chunk(4, dim=-1)
        torch.mul(f, cells[:, t], out=cells[:, t + 1]).addcmul_(i, g)
        torch.mul(o, fast_tanh(cells[:, t + 1], squashed[:, t]), out=hidden[:, t + 1])
    return hidden, cells, squashed


def _back(
    gates: Tensor, cells: Tensor, squashed: Tensor, onto: Tensor, d_cell: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward in time: `gates` becomes the gates' gradients.

    `onto`: (lanes, T, n, H) gradients that reach the hidden states from outside. `d_cell`: that of
    the last cell. Returns the gradients of the first hidden states and cells.
    """
    turned = matrix.transpose(1, 2)
    d_hidden = onto[:, -1].clone()
    for t in range(gates.shape[1] - 1, -1, -1):
        z, s = gates[:, t], squashed[:, t]
        i, f, g, o = z.chunk(4, dim=-1)
        d_cell += torch.ops.aten.tanh_backward(d_hidden * o, s)
        d_o = torch.ops.aten.sigmoid_backward(d_hidden.mul_(s), o)
        d_i = torch.ops.aten.sigmoid_backward(d_cell * g, i)
        d_g = torch.ops.aten.tanh_backward(d_cell * i, g)
        d_f = torch.ops.aten.sigmoid_backward(d_cell * cells[:, t], f)
        d_cell *= f
        torch.cat([d_i, d_f, d_g, d_o], dim=-1, out=z)
        before = onto[:, t - 1] if t else torch.zeros_like(d_hidden)
        lane_step(before, z, turned, out=d_hidden)
    return d_hidden, d_cell


class TrackedLSTM(Leaf):
    """`torch.nn.LSTM` over rows, any number of layers and directions; no packed sequences."""

    def __init__(self, layer: nn.LSTM, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        if layer.proj_size:
            raise UnsupportedLayer("LSTM(proj_size=…) has no grouped form: drop the projection")
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers = layer.num_layers
        self.bidirectional, self.batch_first = layer.bidirectional, layer.batch_first
        self.bias, self.dropout = layer.bias, layer.dropout

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise UnsupportedLayer(
                "a tracked LSTM takes a tensor (rows, T, features), not a packed or unbatched "
                "sequence: pad the batch and mask the loss"
            )
        x = x if self.batch_first else x.transpose(0, 1)
        self.tape.see(x.shape[0])
        count = 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * count, x.shape[0], self.hidden_size)
        first = state or (zeros, zeros)
        if x.shape[2] != self.input_size:
            raise ValueError(f"a tracked LSTM takes {self.input_size} features, not {x.shape[2]}")
        if any(each.shape != zeros.shape for each in first):
            raise ValueError(
                f"first states of a tracked LSTM have shapes {[tuple(s.shape) for s in first]}: "
                f"both must be {tuple(zeros.shape)}, (layers x directions, rows, hidden size)"
            )
        hidden, cell = [], []
        for layer in range(self.num_layers):
            part = slice(layer * count, (layer + 1) * count)
            x, h, c = self._layer(x, first[0][part], first[1][part], layer)
            hidden.append(h)
            cell.append(c)
            if layer < self.num_layers - 1:
                x = dropped(x, self.dropout, self.training, self.tape)
        out = x if self.batch_first else x.transpose(0, 1)
        return out, (torch.cat(hidden), torch.cat(cell))

    def _layer(
        self, x: Tensor, h0: Tensor, c0: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        suffixes = (f"_l{layer}", f"_l{layer}_reverse")[: 2 if self.bidirectional else 1]
        kinds = KINDS if self.bias else KINDS[:2]
        names = [kind + suffix for suffix in suffixes for kind in kinds]
        params = [getattr(self, name) for name in names]
        x, h0, c0 = (each.to(params[0].dtype) for each in (x, h0, c0))
        native = x.numel() > 0 and native_lstm.suited(x, h0, c0, *params)
        function = native_lstm.NativeLSTMFunction if native else _LSTMFunction
        result: tuple[Tensor, Tensor, Tensor] = function.apply(  # type: ignore[no-untyped-call]
            x, h0, c0, names, self, *params
        )
        return result
