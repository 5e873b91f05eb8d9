"""LSTM as two tracked linears over time, with a hand-written backward pass.

Per step the cell is  i, f, g, o = x W_ih^T + h W_hh^T + b;  c' = f c + i g;  h' = o tanh(c').
The backward pass yields the gate gradients (rows, T, 4H) of every step; they are the output
gradients of both linears, so norms and clipped sums follow as for any other linear. Everything
that does not depend on the step before is computed for all steps at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.factors import Dense, Direct
from sottovoce.privacy.layers import Leaf, grouped_matmul
from sottovoce.privacy.tape import Tape


def _recur(pre: Tensor, state: Tensor, matrix: Tensor) -> Tensor:
    """pre + state @ matrix, for (rows, ·) and a shared matrix, or (groups, B, ·) and a stack."""
    if matrix.dim() == 2:
        return torch.addmm(pre, state, matrix)
    return torch.baddbmm(pre, state, matrix)


class _LSTMFunction(torch.autograd.Function):
    """One layer, one direction. Outputs: hidden states (rows, T, H) and the last cell (rows, H)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, weights: list[str], leaf: Leaf, *params: Tensor
    ) -> tuple[Tensor, Tensor]:
        w_ih, w_hh = params[0], params[1]
        bias = params[2] + params[3] if len(params) == 4 else None
        lead = (x.shape[0],) if w_hh.dim() == 2 else (w_hh.shape[0], x.shape[0] // w_hh.shape[0])
        size = w_hh.shape[-1]
        gates = grouped_matmul(x, w_ih, bias).transpose(0, 1).contiguous()
        gates = gates.view(x.shape[1], *lead, 4 * size)
        cells = gates.new_empty((x.shape[1] + 1, *lead, size))
        hidden = torch.empty_like(cells)
        cells[0], hidden[0] = c0.view(*lead, size), h0.view(*lead, size)
        matrix = w_hh.transpose(-1, -2)
        for t in range(x.shape[1]):
            gate = _recur(gates[t], hidden[t], matrix)
            gate[..., : 2 * size].sigmoid_()
            gate[..., 2 * size : 3 * size].tanh_()
            gate[..., 3 * size :].sigmoid_()
            i, f, g, o = gate.chunk(4, dim=-1)
            torch.addcmul(f * cells[t], i, g, out=cells[t + 1])
            torch.mul(o, cells[t + 1].tanh(), out=hidden[t + 1])
            gates[t] = gate
        ctx.save_for_backward(x, gates, cells, hidden, *params)
        ctx.weights, ctx.leaf = weights, leaf
        out = hidden[1:].reshape(x.shape[1], x.shape[0], size).transpose(0, 1).contiguous()
        return out, cells[-1].reshape(x.shape[0], size).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gates, cells, hidden, *params = ctx.saved_tensors
        g_out, g_cell = grads
        w_ih, w_hh = params[0], params[1]
        size, lead = w_hh.shape[-1], gates.shape[1:-1]
        g_out = g_out.transpose(0, 1).reshape(x.shape[1], *lead, size)
        d_gates, d_hidden, d_cell = _through_time(
            gates, cells, g_out, g_cell.reshape(*lead, size), w_hh
        )
        d_gates = d_gates.view(x.shape[1], x.shape[0], 4 * size).transpose(0, 1)
        before = hidden[:-1].reshape(x.shape[1], x.shape[0], size).transpose(0, 1)
        names = ctx.weights
        ctx.leaf.record(names[0], Dense(x, d_gates))
        ctx.leaf.record(names[1], Dense(before, d_gates))
        if len(names) == 4:
            total = d_gates.sum(1)
            ctx.leaf.record(names[2], Direct(total))
            ctx.leaf.record(names[3], Direct(total))
        needs = ctx.needs_input_grad
        back = grouped_matmul(d_gates, w_ih.transpose(-1, -2)) if needs[0] else None
        rows = (x.shape[0], size)
        d_h0 = d_hidden.reshape(rows) if needs[1] else None
        d_c0 = d_cell.reshape(rows) if needs[2] else None
        return back, d_h0, d_c0, None, None, *[None] * len(params)


def _through_time(
    gates: Tensor, cells: Tensor, g_out: Tensor, d_cell: Tensor, w_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate gradients of all steps (T, ..., 4H), and the gradients of the first h and c."""
    i, f, g, o = gates.chunk(4, dim=-1)
    squashed = cells[1:].tanh()
    onto_cell = o * (1 - squashed * squashed)
    local = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], dim=-2)
    local_o = squashed * o * (1 - o)
    d_gates = torch.empty_like(gates)
    triple = d_gates[..., : 3 * g.shape[-1]].view(*g.shape[:-1], 3, g.shape[-1])
    single = d_gates[..., 3 * g.shape[-1] :]
    d_hidden = torch.zeros_like(d_cell)
    for t in range(gates.shape[0] - 1, -1, -1):
        d_hidden = g_out[t] + d_hidden
        d_cell = torch.addcmul(d_cell, d_hidden, onto_cell[t])
        torch.mul(d_cell.unsqueeze(-2), local[t], out=triple[t])
        torch.mul(d_hidden, local_o[t], out=single[t])
        d_hidden = torch.matmul(d_gates[t], w_hh)
        d_cell = d_cell * f[t]
    return d_gates, d_hidden, d_cell


class TrackedLSTM(Leaf):
    """`torch.nn.LSTM` over rows, any number of layers and directions; no packed sequences."""

    def __init__(self, layer: nn.LSTM, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        if layer.proj_size:
            raise UnsupportedLayer("LSTM(proj_size=…) has no grouped form: drop the projection")
        self.hidden_size, self.num_layers = layer.hidden_size, layer.num_layers
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
        directions = 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * directions, x.shape[0], self.hidden_size)
        first = state or (zeros, zeros)
        hidden, cell = [], []
        for layer in range(self.num_layers):
            outs = []
            for direction in range(directions):
                at = layer * directions + direction
                out, last, c = self._direction(x, first[0][at], first[1][at], layer, direction)
                outs.append(out)
                hidden.append(last)
                cell.append(c)
            x = torch.cat(outs, dim=-1) if directions == 2 else outs[0]
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        out = x if self.batch_first else x.transpose(0, 1)
        return out, (torch.stack(hidden), torch.stack(cell))

    def _direction(
        self, x: Tensor, h0: Tensor, c0: Tensor, layer: int, direction: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else (
            "weight_ih", "weight_hh")
        names = [kind + suffix for kind in kinds]
        params = [getattr(self, name) for name in names]
        x = x.flip(1) if direction else x
        out, c = _LSTMFunction.apply(x, h0, c0, names, self, *params)  # type: ignore[no-untyped-call]
        return (out.flip(1) if direction else out), out[:, -1], c
