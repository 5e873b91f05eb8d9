"""GRU as tracked linears over time, with a hand-written backward pass.

With a = W_ih x + b_ih and b = W_hh h + b_hh, each cut into three parts, a step of the cell is

    r = s(a_r + b_r),  z = s(a_z + b_z),  n = tanh(a_n + r b_n),  h' = (1 - z) n + z h

(Cho et al. 2014, arXiv:1406.1078, in cuDNN's form). Every gate's gradient is that of h' times a
factor known from the forward pass, so a step back is one product with those factors and one with
W_hh. Both directions and all groups of rows run as one batch of matrices over time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.factors import Dense, Summed
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.dropout import dropped
from sottovoce.privacy.layers.linear import Leaf, applied, grouped_back, grouped_matmul

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _GRUFunction(torch.autograd.Function):
    """One layer, all its directions: x (rows, T, in), h0 (directions, rows, H).

    `params`: for each direction w_ih, w_hh and, with biases, b_ih, b_hh; `names`: theirs. Returns
    (rows, T, directions H).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, names: list[list[str]], leaf: Leaf, *params: Tensor
    ) -> Tensor:
        sides = _by_direction(params, len(names))
        groups = sides[0][1].shape[0] if sides[0][1].dim() == 3 else 1
        given = torch.stack([
            _timed(grouped_matmul(_turned(x, d), side[0], side[2] if len(side) == 4 else None),
                   groups)
            for d, side in enumerate(sides)
        ], dim=1).flatten(1, 2)
        matrix, bias = _recurrent(sides)
        size = matrix.shape[1]
        hidden = given.new_empty((x.shape[1] + 1, *given.shape[1:-1], size))
        hidden[0] = h0.reshape(hidden.shape[1:])
        gates, inner = given, torch.empty_like(hidden[1:])  # r, z, n over a; and b_n
        for t in range(x.shape[1]):
            _step(gates[t], inner[t], hidden, t, matrix, bias)
        ctx.save_for_backward(x, gates, inner, hidden, *params)
        ctx.names, ctx.leaf, ctx.groups = names, leaf, groups
        outs = hidden[1:].chunk(len(names), dim=1)
        return torch.cat([_turned(_rowed(out), d) for d, out in enumerate(outs)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gates, inner, hidden, *params = ctx.saved_tensors
        sides = _by_direction(tuple(params), len(ctx.names))
        g_out = torch.stack([
            _timed(_turned(part, d), ctx.groups)
            for d, part in enumerate(grads[0].chunk(len(sides), dim=-1))
        ], dim=1).flatten(1, 2)
        matrix, _ = _recurrent(sides)
        d_a, d_b, d_h0 = _through_time(gates, inner, hidden, g_out.to(gates.dtype), matrix)
        needs = ctx.needs_input_grad
        back = torch.zeros_like(x) if needs[0] else None
        for d, (names, side) in enumerate(zip(ctx.names, sides, strict=True)):
            g_ih, g_hh, before = (
                _rowed(each.chunk(len(sides), dim=1)[d]) for each in (d_a, d_b, hidden[:-1])
            )
            _record(ctx.leaf, names, _turned(x, d), before, g_ih, g_hh)
            if back is not None:
                back += _turned(grouped_back(g_ih, side[0]), d)
        first = d_h0.reshape(len(sides), x.shape[0], -1) if needs[1] else None
        return back, first, None, None, *[None] * len(params)


def _step(
    gate: Tensor, inner: Tensor, hidden: Tensor, t: int, matrix: Tensor, bias: Tensor | None
) -> None:
    """One step for all matrices: `gate` (N, B, 3H) holds a, and r, z, n afterwards."""
    size = inner.shape[-1]
    before = hidden[t]
    b = torch.bmm(before, matrix) if bias is None else torch.baddbmm(bias, before, matrix)
    inner.copy_(b[..., 2 * size :])
    both, n = gate[..., : 2 * size], gate[..., 2 * size :]
    both.add_(b[..., : 2 * size]).sigmoid_()
    n.addcmul_(both[..., :size], inner).tanh_()
    torch.lerp(n, before, both[..., size:], out=hidden[t + 1])


def _through_time(
    gates: Tensor, inner: Tensor, hidden: Tensor, g_out: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all steps' a and b, (T, N, B, 3H) each, and of the first state."""
    r, z, n = gates.chunk(3, dim=-1)
    onto_a = (1 - z) * (1 - n * n)
    local = torch.stack(
        [onto_a * inner * r * (1 - r), (hidden[:-1] - n) * z * (1 - z), onto_a * r], dim=-2
    )
    d_states, d_b = torch.empty_like(inner), torch.empty_like(local)
    onto_state = matrix.transpose(1, 2).to(gates.dtype)
    d_hidden = torch.zeros_like(hidden[0])
    for t in range(gates.shape[0] - 1, -1, -1):
        torch.add(g_out[t], d_hidden, out=d_states[t])
        torch.mul(d_states[t].unsqueeze(-2), local[t], out=d_b[t])
        d_hidden = torch.baddbmm(d_states[t] * z[t], d_b[t].flatten(-2), onto_state)
    d_b = d_b.flatten(-2)
    d_a = torch.cat([d_b[..., : 2 * r.shape[-1]], d_states * onto_a], dim=-1)
    return d_a, d_b, d_hidden


def _record(
    leaf: Leaf, names: list[str], x: Tensor, before: Tensor, g_ih: Tensor, g_hh: Tensor
) -> None:
    leaf.record(names[0], Dense(x, g_ih))
    leaf.record(names[1], Dense(before, g_hh))
    if len(names) == 4:
        leaf.record(names[2], Summed(g_ih))
        leaf.record(names[3], Summed(g_hh))


def _by_direction(params: tuple[Tensor, ...], directions: int) -> list[tuple[Tensor, ...]]:
    each = len(params) // directions
    return [params[d * each : (d + 1) * each] for d in range(directions)]


def _recurrent(sides: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor | None]:
    """W_hh^T (N, H, 3H) and b_hh (N, 1, 3H), N = directions times groups."""
    size = sides[0][1].shape[-1]
    matrix = torch.stack([side[1] for side in sides]).view(-1, 3 * size, size).transpose(1, 2)
    if len(sides[0]) == 2:
        return matrix, None
    return matrix, torch.stack([side[3] for side in sides]).view(-1, 1, 3 * size)


def _turned(x: Tensor, direction: int) -> Tensor:
    """(rows, T, ·) as the direction reads it."""
    return x.flip(1) if direction else x


def _timed(x: Tensor, groups: int) -> Tensor:
    """(rows, T, D) as (T, groups, B, D)."""
    return x.reshape(groups, -1, *x.shape[1:]).permute(2, 0, 1, 3)


def _rowed(x: Tensor) -> Tensor:
    """(T, groups, B, D) as (rows, T, D)."""
    return x.flatten(1, 2).transpose(0, 1)


class TrackedGRU(Leaf):
    """`torch.nn.GRU` over rows, any number of layers and directions; no packed sequences."""

    def __init__(self, layer: nn.GRU, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        self.input_size, self.hidden_size = layer.input_size, layer.hidden_size
        self.num_layers, self.bidirectional = layer.num_layers, layer.bidirectional
        self.batch_first, self.bias, self.dropout = layer.batch_first, layer.bias, layer.dropout

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise UnsupportedLayer(
                "a tracked GRU takes a tensor (rows, T, features), not a packed or unbatched "
                "sequence: pad the batch and mask the loss"
            )
        x = input if self.batch_first else input.transpose(0, 1)
        self.tape.see(x.shape[0])
        directions = 2 if self.bidirectional else 1
        if hx is None:
            hx = x.new_zeros(self.num_layers * directions, x.shape[0], self.hidden_size)
        last = []
        for layer in range(self.num_layers):
            if layer:
                x = dropped(x, self.dropout, self.training, self.tape)
            first = hx[layer * directions : (layer + 1) * directions]
            x = self._layer(x, first, layer, directions)
            last.append(x[:, -1, : self.hidden_size])
            if directions == 2:
                last.append(x[:, 0, self.hidden_size :])
        return (x if self.batch_first else x.transpose(0, 1)), torch.stack(last)

    def _layer(self, x: Tensor, h0: Tensor, layer: int, directions: int) -> Tensor:
        kinds = KINDS if self.bias else KINDS[:2]
        names = [
            [f"{kind}_l{layer}{suffix}" for kind in kinds]
            for suffix in ("", "_reverse")[:directions]
        ]
        params = [getattr(self, name) for direction in names for name in direction]
        return applied(_GRUFunction, x, h0, names, self, *params)
