"""Squared norms of per-row gradients, from their factors.

The gradient of a matrix is sum_t g_t x_t^T, so its squared norm is sum_{t,s} (x_t.x_s)(g_t.g_s):
two Gram products of (T, T), cheap when T is short (Goodfellow 2015; Li et al. 2022,
arXiv:2110.05679, section 4). Where T is long the gradient is built, a few rows at a time.
Neither takes more than `MEMORY_BOUND` bytes at once, whatever the batch and the length.

The terms of a Gram product may cancel, and rounding grows with the terms, not with what is left of
them. A dot product of n numbers may be off by n roundings (Higham 2002, section 3.1), all one way
where its terms are alike. So Gram products are taken in float64 on a CPU, a cacheful at a time; on
a GPU, where that is slow, in float32 from short stretches. Every such norm is raised by a bound on
what it may lack (`slack`), and where that is more than `LOOSE` of it the row's gradient is built
after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from sottovoce.client.native import LEVELS, kernels
from sottovoce.privacy.gradients.factors import (
    PAIRED,
    Dense,
    Direct,
    Factor,
    OneHot,
    Summed,
    joined,
    wide,
)

MEMORY_BOUND = 64 << 20  # bytes that a norm may take for itself


LOOSE = 1e-2  # of a squared norm, that rounding may hide before the gradient is built
STRETCH = 64  # numbers that a float32 dot product adds up in one go
CACHEFUL = 1 << 16  # numbers that are turned into float64 at once


def slack(tensor: Tensor, *lengths: int) -> float:
    """Relative error of sums of `lengths` terms, all of whose roundings go one way: half a
    rounding, itself half of eps, for each term on the average.
    """
    return torch.finfo(tensor.dtype).eps / 4 * (sum(lengths) + 8)


def _stretch(width: int) -> int:
    return max(STRETCH, math.isqrt(width))


def _additions(width: int) -> int:
    """The longest chain of additions in a dot product of `width` numbers."""
    return min(width, _stretch(width)) + width // _stretch(width)


class Measured(Protocol):
    """A factor that knows its own norm, and itself as uses of a table."""

    def squared_norm(self) -> Tensor: ...

    def as_onehot(self) -> OneHot: ...


class Gram:
    """The products (rows, T, T) of a tensor's positions with each other, and their lengths."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # kept alive, so that no other takes its id
        exact = tensor.device.type == "cpu"
        self.products = _exact_products(tensor) if exact else _products(wide(tensor))
        self.additions = _additions(tensor.shape[2])
        self.lengths = self.products.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()  # (rows, T)


def _exact_products(tensor: Tensor) -> Tensor:
    """By the kernel, or by numpy; both know a matrix times its own transpose: half the work."""
    found = _by_kernel(tensor)
    if found is not None:
        return found
    rows, length, width = tensor.shape
    products = np.empty((rows, length, length))
    for some in _parts(rows, CACHEFUL // max(1, length * width)):
        values = tensor[some].detach().double().numpy()
        np.matmul(values, values.transpose(0, 2, 1), out=products[some])
    return torch.from_numpy(products)


def _by_kernel(tensor: Tensor) -> Tensor | None:
    """The products, where there is a kernel that is faster than numpy: with AVX-512."""
    library = kernels()
    if library is None or library.kernels_level() < LEVELS.index("avx512"):
        return None
    if tensor.dtype != torch.float32 or tensor.stride(2) != 1:
        return None
    rows, length, width = tensor.shape
    products = torch.empty((rows, length, length), dtype=torch.float64)
    places = tensor.data_ptr(), rows, length, width, tensor.stride(0), tensor.stride(1)
    failed = library.kernels_gram(*places, products.data_ptr())
    return None if failed else products


def _products(tensor: Tensor) -> Tensor:
    parts = [tensor[:, :, some] for some in _parts(tensor.shape[2], _stretch(tensor.shape[2]))]
    products = torch.bmm(parts[0], parts[0].transpose(1, 2))
    for part in parts[1:]:
        products += torch.bmm(part, part.transpose(1, 2))
    return products


class Memo:
    """Products made so far in this pass, by id of the tensor.

    Query, key and value read the same input; a layer's weight and bias, and all weights of an
    LSTM, share the gradient of their output.
    """

    def __init__(self) -> None:
        self._grams: dict[int, Gram] = {}
        self._squares: dict[int, tuple[Tensor, Tensor]] = {}

    def gram(self, tensor: Tensor) -> Gram:
        if id(tensor) not in self._grams:
            self._grams[id(tensor)] = Gram(tensor)
        return self._grams[id(tensor)]

    def known(self, tensor: Tensor) -> Gram | None:
        return self._grams.get(id(tensor))

    def squared(self, tensor: Tensor) -> Tensor:
        """(rows,) squared norm of each row of a tensor (rows, 1, D), in float64: a small one
        times a large one must not be lost.
        """
        if id(tensor) not in self._squares:
            flat = wide(tensor).squeeze(1).double()
            self._squares[id(tensor)] = (tensor, (flat * flat).sum(1))
        return self._squares[id(tensor)][1]


def squared_norms(factors: list[Factor], memo: Memo) -> Tensor:
    """(rows,) squared norm of each row's gradient of one parameter, over all its uses."""
    if len(factors) == 1:
        return _own_norm(factors[0], memo)
    if all(isinstance(factor, Summed | Direct) for factor in factors):
        return _own_norm(joined([_as_direct(factor) for factor in factors]), memo)
    dense = [factor for factor in factors if isinstance(factor, Dense)]
    tables = [f if isinstance(f, OneHot) else cast(Measured, f).as_onehot()
              for f in factors if not isinstance(f, Dense)]
    if not tables:
        return _own_norm(joined(dense), memo)
    if not dense:
        return _own_norm(joined(tables), memo)
    left, right = joined(dense), joined(tables)
    total = _own_norm(left, memo) + _own_norm(right, memo) + 2 * _cross_term(left, right)
    terms = _lengths(left.x).mul_(_lengths(left.g)).sum(1) * _lengths(right.g).sum(1)
    return total.add_(terms, alpha=2 * slack(total, left.x.shape[2])).clamp_min_(0.0)


def _lengths(tensor: Tensor) -> Tensor:
    """(rows, T) L2 norm of each position of (rows, T, D)."""
    lengths: Tensor = torch.linalg.vector_norm(wide(tensor), dim=2)
    return lengths


def _raised(squares: Tensor, terms: Tensor) -> Tensor:
    """Squared norms (rows,) of gradients that were built from terms whose norms add up to `terms`.

    The sum that is released adds the same terms in another order: each side may be off by about
    half a rounding of all of them, which tells only where nearly nothing is left of them.
    """
    return squares.sqrt().add_(terms, alpha=torch.finfo(terms.dtype).eps).pow_(2)


def _own_norm(factor: Factor, memo: Memo) -> Tensor:
    if isinstance(factor, Dense):
        return _dense_norm(factor, memo)
    if isinstance(factor, OneHot):
        return _table_norm(factor)
    if isinstance(factor, Summed):
        return _summed_norm(factor, memo)
    if isinstance(factor, Direct):
        return wide(factor.grad).flatten(1).pow(2).sum(1)
    return cast(Measured, factor).squared_norm()


def _as_direct(factor: Factor) -> Direct:
    return factor if isinstance(factor, Direct) else Direct(wide(cast(Summed, factor).g).sum(1))


def _summed_norm(factor: Summed, memo: Memo) -> Tensor:
    if factor.g.shape[1] == 1:
        return memo.squared(factor.g).to(wide(factor.g).dtype)
    gram = memo.known(factor.g)
    if gram is None:
        return _added_norm(wide(factor.g))
    added, g = gram.lengths.sum(1), wide(factor.g)
    lack = slack(gram.products, gram.additions) * added.pow(2)
    terms = gram.products.sum((1, 2))
    return _safe(terms, lack, added, lambda some: _added_norm(g[some]), g.dtype)


def _added_norm(g: Tensor) -> Tensor:
    return _raised(g.sum(1).pow_(2).sum(1), _lengths(g).sum(1))


def _dense_norm(factor: Dense, memo: Memo) -> Tensor:
    rows, length, width = factor.x.shape
    out = factor.g.shape[2]
    if length == 1:
        return (memo.squared(factor.x) * memo.squared(factor.g)).to(wide(factor.g).dtype)
    if length * (width + out) > width * out or 8 * length * length > MEMORY_BOUND:
        return _built_norm(wide(factor.x), wide(factor.g))
    step = max(1, MEMORY_BOUND // max(1, 8 * length * length))
    if rows <= step:
        return _gram_norm(memo.gram(factor.x), memo.gram(factor.g))
    parts = [(factor.x[some], factor.g[some]) for some in _parts(rows, step)]
    return torch.cat([_gram_norm(Gram(x), Gram(g)) for x, g in parts])


def _gram_norm(x: Gram, g: Gram) -> Tensor:
    """Terms are at most (sum_t |x_t| |g_t|)^2 together, and rounding a part of that."""
    terms = (x.products * g.products).sum((1, 2))
    added = (x.lengths * g.lengths).sum(1)
    lack = slack(terms, x.additions, g.additions) * added.pow(2)
    return _safe(
        terms, lack, added, lambda some: _built_norm(wide(x.tensor[some]), wide(g.tensor[some])),
        wide(x.tensor[:0]).dtype,
    )


def _safe(
    terms: Tensor, lack: Tensor, added: Tensor, built: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Squared norms (rows,), `lack` added; those of rows where it is too much, from `built`.

    `added`: what the norms of the terms of the gradient add up to (see `_raised`).
    """
    loose = lack > LOOSE * terms
    terms = _raised((terms + lack).clamp_min(0.0).to(dtype), added.to(dtype))
    if bool(loose.any()):
        some = loose.nonzero().squeeze(1)
        terms[some] = built(some)
    return terms


def _built_norm(x: Tensor, g: Tensor) -> Tensor:
    """The gradients built: for a few rows at a time, or for a part of one row's outputs."""
    rows, _, width = x.shape
    out = g.shape[2]
    total = x.new_zeros(rows)
    for part in _parts(out, MEMORY_BOUND // (4 * width)):
        size = 4 * width * (part.stop - part.start)
        for some in _parts(rows, MEMORY_BOUND // size):
            built = torch.bmm(g[some, :, part].transpose(1, 2), x[some])
            total[some] += built.pow_(2).sum((1, 2))
    return _raised(total, _lengths(x).mul_(_lengths(g)).sum(1))


def _table_norm(factor: OneHot) -> Tensor:
    """Squared norm of sum_t g_t onehot(i_t)^T: gradients that meet in a table row add up first."""
    index, g = factor.index, wide(factor.g)
    rows, length = index.shape
    if length == 1 or _all_distinct(index):
        return g.pow(2).sum((1, 2))
    total = g.new_empty(rows)
    bytes_each = 12 * length * length if length <= PAIRED else 4 * g.shape[2] * length + 32 * length
    for some in _parts(rows, MEMORY_BOUND // max(1, bytes_each)):
        norm = _paired_norm if length <= PAIRED else _sorted_norm
        total[some] = norm(index[some], g[some])
    return total


def _all_distinct(index: Tensor) -> bool:
    """Whether all rows read the same table rows, each once: positions counted up."""
    return index.stride(0) == 0 and int(index[0].bincount().max()) == 1


def _paired_norm(index: Tensor, g: Tensor) -> Tensor:
    same = index.unsqueeze(2) == index.unsqueeze(1)
    gram = Gram(g)
    lengths = gram.lengths
    near = torch.einsum("rt,rts,rs->r", lengths, same.to(lengths.dtype), lengths)
    terms = gram.products.mul_(same).sum((1, 2))
    lack = slack(terms, gram.additions) * near
    added = lengths.sum(1)
    return _safe(terms, lack, added, lambda some: _sorted_norm(index[some], g[some]), g.dtype)


def _sorted_norm(index: Tensor, g: Tensor) -> Tensor:
    """Positions that share an index get one slot of a small table (rows, T, D)."""
    rows, length = index.shape
    ordered, order = index.sort(1)
    rank = torch.zeros_like(index)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    slot = torch.empty_like(index).scatter_(1, order, rank)
    slot += torch.arange(rows, device=g.device).mul_(length).unsqueeze(1)
    small = g.new_zeros((rows * length, g.shape[2]))
    small.index_add_(0, slot.flatten(), g.flatten(0, 1))
    return _raised(small.view(rows, -1).pow_(2).sum(1), _lengths(g).sum(1))


def _cross_term(dense: Dense, table: OneHot) -> Tensor:
    """<sum_t g_t x_t^T, sum_s onehot(i_s) h_s^T> per row: a table tied to an output layer.

    The matrix is (V, D): the dense g runs over V, the dense x and the table's g over D.
    """
    rows, length = dense.g.shape[:2]
    other = table.index.shape[1]
    total = wide(dense.x).new_zeros(rows)
    for part in _parts(length, MEMORY_BOUND // max(1, 8 * other)):
        for some in _parts(rows, MEMORY_BOUND // max(1, 8 * other * (part.stop - part.start))):
            x, g = wide(dense.x[some, part]), dense.g[some, part]
            index = table.index[some].unsqueeze(1).expand(-1, g.shape[1], -1)
            near = torch.bmm(x, wide(table.g[some]).transpose(1, 2))
            total[some] += near.mul_(g.gather(2, index)).sum((1, 2))
    return total


def _parts(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
