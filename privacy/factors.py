"""Per-row gradients of one parameter, kept as factors and never built.

One backward pass leaves, for each use of a parameter, the input x and the gradient g of the summed
losses with respect to the output. Row r's gradient is then a sum of products over its positions t:

    Linear weight     sum_t g[r, t] x[r, t]^T            `Dense`
    Embedding table   sum_t g[r, t] onehot(i[r, t])^T     `OneHot`
    bias, gain        a small vector, built outright      `Direct`

From the factors come both the norm (Gram products: Goodfellow 2015; Li et al. 2022,
arXiv:2110.05679, section 4) and the clipped sum (book-keeping: Bu et al. 2023, arXiv:2210.00038,
algorithm 1). A parameter used twice, or shared by two layers, has a list of factors, and the cross
terms between them belong to its norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIRECT_BYTES = 64 << 20  # most memory that a direct norm or a Gram product may take at once


@dataclass
class Dense:
    """Factor of a matrix parameter (out, in). `x`: (rows, T, in); `g`: (rows, T, out)."""

    x: Tensor
    g: Tensor


@dataclass
class OneHot:
    """Factor of a table parameter (V, D). `index`: (rows, T) int64; `g`: (rows, T, D)."""

    index: Tensor
    g: Tensor


@dataclass
class Direct:
    """Per-row gradients themselves. `grad`: (rows, *parameter shape)."""

    grad: Tensor


Factor = Dense | OneHot | Direct


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: half-precision activations would lose the norm."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# By id: the tensor, kept alive so that no other can take its id, and its Gram product.
Grams = dict[int, tuple[Tensor, Tensor]]


def squared_norms(factors: list[Factor], grams: Grams) -> Tensor:
    """(rows,) squared norm of each row's gradient of one parameter, over all its uses.

    `grams`: Gram products of output gradients seen so far in this pass, by id of the tensor: an
    LSTM's two matrices share theirs.
    """
    merged = merge(factors)
    total = sum((_own_norm(factor, grams) for factor in merged), torch.zeros(()))
    if len(merged) == 2:
        total = total + 2 * _cross_term(merged)
    return total.clamp_min(0.0)


def clipped_sum(
    factors: list[Factor], scale: Tensor, shape: torch.Size, groups: int
) -> Tensor:
    """Sum over each group's rows of `scale[row]` times the row's gradient: (groups, *shape).

    `scale`: (rows,). Rows come group by group, equally many in each.
    """
    out: Tensor | None = None
    for factor in merge(factors):
        part = _scaled_sum(factor, scale, shape, groups)
        out = part if out is None else out.add_(part)
    return out if out is not None else scale.new_zeros((groups, *shape))


def zero_rows(factors: list[Factor], keep: Tensor) -> list[Factor]:
    """The same factors with everything of the rows where `keep` is False set to zero.

    Needed before a product: 0 * NaN is NaN, so one broken row would spoil its group's sum.
    """

    def cleaned(tensor: Tensor) -> Tensor:
        mask = keep.view(-1, *[1] * (tensor.dim() - 1))
        return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))

    result: list[Factor] = []
    for factor in factors:
        if isinstance(factor, Dense):
            result.append(Dense(cleaned(factor.x), cleaned(factor.g)))
        elif isinstance(factor, OneHot):
            result.append(OneHot(factor.index, cleaned(factor.g)))
        else:
            result.append(Direct(cleaned(factor.grad)))
    return result


def merge(factors: list[Factor]) -> list[Factor]:
    """At most one factor of each kind: uses of one parameter are laid end to end along T."""
    if len(factors) == 1:
        return factors
    merged: list[Factor] = []
    dense = [factor for factor in factors if isinstance(factor, Dense)]
    if dense:
        x, g = (torch.cat([getattr(f, side) for f in dense], dim=1) for side in "xg")
        merged.append(Dense(x, g))
    onehot = [factor for factor in factors if isinstance(factor, OneHot)]
    if onehot:
        index = torch.cat([factor.index for factor in onehot], dim=1)
        merged.append(OneHot(index, torch.cat([factor.g for factor in onehot], dim=1)))
    direct = [factor for factor in factors if isinstance(factor, Direct)]
    if direct:
        merged.append(Direct(torch.stack([factor.grad for factor in direct]).sum(0)))
    if direct and len(merged) > 1:
        raise NotImplementedError("a parameter is used both as a matrix and as a vector")
    return merged


def _own_norm(factor: Factor, grams: Grams) -> Tensor:
    if isinstance(factor, Direct):
        return wide(factor.grad).flatten(1).pow(2).sum(1)
    if isinstance(factor, OneHot):
        return _onehot_norm(factor.index, wide(factor.g))
    return _dense_norm(factor, grams)


def _dense_norm(factor: Dense, grams: Grams) -> Tensor:
    x, g = wide(factor.x), wide(factor.g)
    rows, length, width = x.shape
    out = g.shape[2]
    if length == 1:
        return x.pow(2).sum((1, 2)) * g.pow(2).sum((1, 2))
    gram = length * (width + out) <= width * out
    per_row = 4 * (2 * length * length if gram else width * out)
    step = max(1, DIRECT_BYTES // per_row)
    if gram and rows <= step:
        if id(factor.g) not in grams:
            grams[id(factor.g)] = (factor.g, torch.bmm(g, g.transpose(1, 2)))
        return torch.bmm(x, x.transpose(1, 2)).mul_(grams[id(factor.g)][1]).sum((1, 2))
    parts = []
    for start in range(0, rows, step):
        xs, gs = x[start : start + step], g[start : start + step]
        if gram:
            product = torch.bmm(xs, xs.transpose(1, 2)).mul_(torch.bmm(gs, gs.transpose(1, 2)))
            parts.append(product.sum((1, 2)))
        else:
            parts.append(torch.bmm(gs.transpose(1, 2), xs).pow_(2).sum((1, 2)))
    return torch.cat(parts)


def _onehot_norm(index: Tensor, g: Tensor) -> Tensor:
    rows, length = index.shape
    step = max(1, DIRECT_BYTES // (8 * length * length))
    parts = []
    for start in range(0, rows, step):
        ids, gs = index[start : start + step], g[start : start + step]
        same = ids.unsqueeze(2) == ids.unsqueeze(1)
        parts.append(torch.bmm(gs, gs.transpose(1, 2)).mul_(same).sum((1, 2)))
    return torch.cat(parts)


def _cross_term(merged: list[Factor]) -> Tensor:
    """<sum_t g_t x_t^T, sum_s onehot(i_s) h_s^T> per row: a table tied to an output layer."""
    dense = next(factor for factor in merged if isinstance(factor, Dense))
    onehot = next(factor for factor in merged if isinstance(factor, OneHot))
    # The matrix is (V, D): dense g runs over V, dense x and the table's g over D.
    index = onehot.index.unsqueeze(1).expand(-1, dense.g.shape[1], -1)
    picked = wide(dense.g).gather(2, index)
    return torch.bmm(wide(dense.x), wide(onehot.g).transpose(1, 2)).mul_(picked).sum((1, 2))


def _scaled_sum(factor: Factor, scale: Tensor, shape: torch.Size, groups: int) -> Tensor:
    if isinstance(factor, Direct):
        grad = wide(factor.grad)
        weight = scale.view(groups, 1, -1)
        stacked = grad.reshape(groups, weight.shape[2], -1)
        return torch.bmm(weight, stacked).view(groups, *shape)
    if isinstance(factor, OneHot):
        return _scaled_table(factor, scale, shape, groups)
    x, g = wide(factor.x), wide(factor.g)
    weight = scale.view(-1, 1, 1)
    x, g = (x * weight, g) if x.shape[2] < g.shape[2] else (x, g * weight)
    x, g = (side.reshape(groups, -1, side.shape[2]) for side in (x, g))
    return torch.bmm(g.transpose(1, 2), x)


def _scaled_table(factor: OneHot, scale: Tensor, shape: torch.Size, groups: int) -> Tensor:
    vocabulary, width = shape
    g = (wide(factor.g) * scale.view(-1, 1, 1)).reshape(-1, width)
    offset = torch.arange(groups, device=g.device).mul_(vocabulary)
    index = (factor.index.reshape(groups, -1) + offset.unsqueeze(1)).reshape(-1)
    table = g.new_zeros((groups * vocabulary, width))
    return table.index_add_(0, index, g).view(groups, *shape)
