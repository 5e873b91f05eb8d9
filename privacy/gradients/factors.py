"""Per-row gradients of one parameter, kept as factors and never built.

One backward pass leaves, for each use of a parameter, the input x and the gradient g of the summed
losses with respect to the output. Row r's gradient is then a sum of products over its positions t:

    Linear weight     sum_t g[r, t] x[r, t]^T            `Dense`
    Embedding table   sum_t g[r, t] onehot(i[r, t])^T     `OneHot`
    bias              sum_t g[r, t]                       `Summed`
    gain, others      a small vector, built outright      `Direct`

From the factors come both the norm (`sottovoce.privacy.gradients.norms`) and the clipped sum
(book-keeping: Bu et al. 2023, arXiv:2210.00038, algorithm 1). A parameter used twice, or shared by
two layers, has a list of factors, and the cross terms between them belong to its norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sottovoce.privacy.gradients import gemm

PAIRED = 64  # positions up to which comparing all pairs of indices is cheaper than sorting them


class Factor(Protocol):
    """What every kind of factor can do; the norms stand in `sottovoce.privacy.gradients.norms`."""

    def rows(self) -> int:
        """Rows of the pass it was recorded in."""
        ...

    def scaled_sum(self, scale: Tensor | None, shape: torch.Size, groups: int) -> Tensor:
        """(groups, *shape) sum over each group's rows of scale[row] times the row's gradient.

        Without a scale, the plain sum.
        """
        ...

    def bundled(self, bundles: Bundles) -> Factor:
        """The same with the rows of every bundle as one."""
        ...

    def cleaned(self, keep: Tensor) -> Factor:
        """The same with everything of the rows where `keep` is False set to zero."""
        ...


class Bundles:
    """Rows that count as one: `index` (bundles, n) int64, n rows for each bundle."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self._laid: dict[int, tuple[Tensor, Tensor]] = {}  # layers share inputs and gradients

    def laid(self, tensor: Tensor) -> Tensor:
        """(rows, T, ...) as (bundles, n T, ...): the positions of all its rows, end to end."""
        if id(tensor) not in self._laid:
            self._laid[id(tensor)] = (tensor, tensor[self.index].flatten(1, 2))
        return self._laid[id(tensor)][1]

    def added(self, tensor: Tensor) -> Tensor:
        """(rows, ...) as (bundles, ...): the sum over its rows."""
        return tensor[self.index].sum(1)


@dataclass
class Dense:
    """Factor of a matrix parameter (out, in). `x`: (rows, T, in); `g`: (rows, T, out)."""

    x: Tensor
    g: Tensor

    def rows(self) -> int:
        return self.g.shape[0]

    def scaled_sum(self, scale: Tensor | None, shape: torch.Size, groups: int) -> Tensor:
        x, g = wide(self.x), wide(self.g)
        if groups > 1:
            x, g = (side.reshape(groups, -1, side.shape[2]) for side in (x, g))
            own = None if scale is None else scale.view(groups, -1)
            return gemm.stacked_outer_sum(g, x, own).view(groups, *shape)
        if scale is not None:
            weight = scale.view(-1, 1, 1)
            x, g = (x * weight, g) if x.shape[2] < g.shape[2] else (x, g * weight)
        return gemm.outer_sum(*_flat(g, x)).view(1, *shape)

    def bundled(self, bundles: Bundles) -> Dense:
        return Dense(bundles.laid(self.x), bundles.laid(self.g))

    def cleaned(self, keep: Tensor) -> Dense:
        return Dense(_cleaned(self.x, keep), _cleaned(self.g, keep))


@dataclass
class OneHot:
    """Factor of a table parameter (V, D). `index`: (rows, T) int64; `g`: (rows, T, D)."""

    index: Tensor
    g: Tensor

    def rows(self) -> int:
        return self.g.shape[0]

    def scaled_sum(self, scale: Tensor | None, shape: torch.Size, groups: int) -> Tensor:
        vocabulary, width = shape
        g = wide(self.g)
        g = (g if scale is None else g * scale.view(-1, 1, 1)).reshape(-1, width)
        table = g.new_zeros((groups * vocabulary, width))
        return table.index_add_(0, self.flat_index(shape, groups), g).view(groups, *shape)

    def flat_index(self, shape: torch.Size, groups: int) -> Tensor:
        """(rows T,) indices into all groups' tables (V, D), laid end to end."""
        index = self.index.reshape(groups, -1)
        if groups > 1:
            first = torch.arange(groups, device=index.device).mul_(shape[0])
            index = index + first.unsqueeze(1)
        return index.reshape(-1)

    def bundled(self, bundles: Bundles) -> OneHot:
        return OneHot(bundles.laid(self.index), bundles.laid(self.g))

    def cleaned(self, keep: Tensor) -> OneHot:
        return OneHot(self.index, _cleaned(self.g, keep))


@dataclass
class Bag:
    """Factor of a table (V, D) whose rows were summed: `index` (rows, T) int64; `share` (rows, T),
    the weight of each in the sum, or None for 1 / T; `g` (rows, D), gradient of the sum.
    """

    index: Tensor
    share: Tensor | None
    g: Tensor

    def rows(self) -> int:
        return self.g.shape[0]

    def as_onehot(self) -> OneHot:
        length = self.index.shape[1]
        each = self.g.unsqueeze(1).expand(-1, length, -1)
        return OneHot(self.index, each * (1 / length if self.share is None else
                                          self.share.unsqueeze(2)))

    def squared_norm(self) -> Tensor:
        """|g|^2 times what the weights of equal words add up to, squared, summed over words.

        Weights may cancel, and the released sum adds them up in another order: a rounding of all
        of them is added, as in `sottovoce.privacy.gradients.norms`.
        """
        g = wide(self.g)
        words, share = self._words(g), self.share
        if share is not None:
            terms = wide(share).abs().sum(1)
            words = words.sqrt().add_(terms, alpha=torch.finfo(terms.dtype).eps).pow_(2)
        return (g * g).sum(1) * words

    def _words(self, g: Tensor) -> Tensor:
        length = self.index.shape[1]
        if length <= PAIRED:
            same = self.index.unsqueeze(2) == self.index.unsqueeze(1)
            if self.share is None:
                return same.sum((1, 2)).to(g.dtype) / length**2
            share = wide(self.share)  # those of equal words added up before they are squared
            each = torch.einsum("rts,rs->rt", same.to(share.dtype), share)
            return (each * each / same.sum(2)).sum(1)
        ordered, order = self.index.sort(1)
        rank = torch.zeros_like(ordered)
        rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
        share = (g.new_full(rank.shape, 1 / length) if self.share is None
                 else wide(self.share).gather(1, order))
        return torch.zeros_like(share).scatter_add_(1, rank, share).pow_(2).sum(1)

    def scaled_sum(self, scale: Tensor | None, shape: torch.Size, groups: int) -> Tensor:
        if self.countable(shape, groups):
            words = self.counts(shape, groups)
            if scale is not None:
                words *= scale.view(groups, -1, 1)
            return torch.bmm(words.transpose(1, 2), wide(self.g).view(groups, -1, shape[1]))
        if groups > 1 or self.share is not None:
            return self.as_onehot().scaled_sum(scale, shape, groups)
        rows, length = self.index.shape
        g = wide(self.g) * (1 / length if scale is None else (scale * (1 / length)).unsqueeze(1))
        each = g.unsqueeze(1).expand(-1, length, -1).reshape(rows * length, -1)
        return g.new_zeros(shape).index_add_(0, self.index.reshape(-1), each).unsqueeze(0)

    def countable(self, shape: torch.Size, groups: int) -> bool:
        """Whether `counts` are few beside the words."""
        return groups > 1 and groups * shape[0] <= self.index.numel()

    def counts(self, shape: torch.Size, groups: int) -> Tensor:
        """Each row's sum of weights for each word, (groups, rows of one, V)."""
        index = self.index.view(groups, -1, self.index.shape[1])
        if self.share is None:
            share = wide(self.g).new_full((), 1 / index.shape[2]).expand(index.shape)
        else:
            share = wide(self.share).view(index.shape)
        return share.new_zeros((*index.shape[:2], shape[0])).scatter_add_(2, index, share)

    def bundled(self, bundles: Bundles) -> OneHot:
        return self.as_onehot().bundled(bundles)

    def cleaned(self, keep: Tensor) -> Bag:
        return Bag(self.index, self.share, _cleaned(self.g, keep))


@dataclass
class Summed:
    """Factor of a bias (D,), whose gradient is that of the output at every position: `g`
    (rows, T, D). Kept as it is, so that its norm comes from a Gram product made for the weight.
    """

    g: Tensor

    def rows(self) -> int:
        return self.g.shape[0]

    def scaled_sum(self, scale: Tensor | None, shape: torch.Size, groups: int) -> Tensor:
        g = wide(self.g)
        if scale is None:
            return g.sum((0, 1)).unsqueeze(0) if groups == 1 else (
                g.reshape(groups, -1, g.shape[2]).sum(1))
        if groups == 1 and g.shape[1] == 1:
            return scale.unsqueeze(0) @ g.squeeze(1)
        if groups == 1:
            each = scale.view(-1, 1).expand(g.shape[:2])
            if g.transpose(0, 1).is_contiguous():
                each, g = each.t(), g.transpose(0, 1)
            return (each.reshape(1, -1) @ g.reshape(-1, g.shape[2])).view(1, *shape)
        each = scale.view(groups, -1, 1).expand(-1, -1, g.shape[1]).reshape(groups, 1, -1)
        return torch.bmm(each, g.reshape(groups, -1, g.shape[2])).view(groups, *shape)

    def bundled(self, bundles: Bundles) -> Summed:
        return Summed(bundles.laid(self.g))

    def cleaned(self, keep: Tensor) -> Summed:
        return Summed(_cleaned(self.g, keep))


@dataclass
class Direct:
    """Per-row gradients themselves. `grad`: (rows, *parameter shape)."""

    grad: Tensor

    def rows(self) -> int:
        return self.grad.shape[0]

    def scaled_sum(self, scale: Tensor | None, shape: torch.Size, groups: int) -> Tensor:
        grad = wide(self.grad)
        if scale is None:
            return grad.reshape(groups, -1, *shape).sum(1)
        weight = scale.view(groups, 1, -1)
        stacked = grad.reshape(groups, weight.shape[2], -1)
        return torch.bmm(weight, stacked).view(groups, *shape)

    def bundled(self, bundles: Bundles) -> Direct:
        return Direct(bundles.added(wide(self.grad)))

    def cleaned(self, keep: Tensor) -> Direct:
        return Direct(_cleaned(self.grad, keep))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: half-precision activations would lose the norm."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def clipped_sum(
    factors: list[Factor], scale: Tensor | None, shape: torch.Size, groups: int
) -> Tensor:
    """Sum over each group's rows of `scale[row]` times the row's gradient: (groups, *shape).

    `scale`: (rows,), or None for ones. Rows come group by group, equally many in each. There is at
    least one factor.
    """
    out: Tensor | None = None
    for factor in factors:
        part = factor.scaled_sum(scale, shape, groups)
        out = part if out is None else out.add_(part)
    assert out is not None
    return out


def descend(
    factors: list[Factor], weights: Tensor, rate: float, sums: dict[int, Tensor] | None = None
) -> None:
    """weights - rate * (sum of each group's gradients), in place: (groups, *shape), contiguous.

    The sums of small matrices and of tables are never built. `sums`: those made for other
    parameters, by id of a factor that is theirs as well.
    """
    sums = {} if sums is None else sums
    groups, shape = weights.shape[0], weights.shape[1:]
    for factor in factors:
        if isinstance(factor, Dense):
            g, x = (wide(side).reshape(groups, -1, side.shape[2]) for side in (factor.g, factor.x))
            gemm.add_outer_sum(weights.view(groups, *shape[:1], -1), g, x, -rate)
        elif isinstance(factor, Bag) and factor.countable(shape, groups):
            g = wide(factor.g).view(groups, -1, shape[1])
            weights.baddbmm_(factor.counts(shape, groups).transpose(1, 2), g, alpha=-rate)
        elif isinstance(factor, (OneHot, Bag)):
            words = factor if isinstance(factor, OneHot) else factor.as_onehot()
            rows = words.flat_index(shape, groups)
            values = (wide(words.g) * -rate).reshape(-1, shape[1])  # alpha would be far slower
            weights.view(groups * shape[0], shape[1]).index_add_(0, rows, values)
        else:
            if id(factor) not in sums:
                sums[id(factor)] = factor.scaled_sum(None, shape, groups)
            weights.sub_(sums[id(factor)], alpha=rate)


def zero_rows(factors: list[Factor], keep: Tensor) -> list[Factor]:
    """The same factors with everything of the rows where `keep` is False set to zero.

    Needed before a product: 0 * NaN is NaN, so one broken row would spoil its group's sum.
    """
    return [factor.cleaned(keep) for factor in factors]


AnyFactor = TypeVar("AnyFactor", Dense, OneHot, Summed, Direct)


def joined(factors: list[AnyFactor]) -> AnyFactor:
    """Several uses of one parameter as one: laid end to end along their positions."""
    first = factors[0]
    if len(factors) == 1:
        return first
    if isinstance(first, Direct):
        return replace(first, grad=torch.stack([f.grad for f in factors]).sum(0))
    sides = vars(first)
    return replace(first, **{s: torch.cat([vars(f)[s] for f in factors], dim=1) for s in sides})


def _flat(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (rows T, ·), in whichever common order of rows and positions copies least."""
    if g.transpose(0, 1).is_contiguous() and g.shape[0] > 1 and g.shape[1] > 1:
        g, x = g.transpose(0, 1), x.transpose(0, 1)
    return g.reshape(-1, g.shape[2]), x.reshape(-1, x.shape[2])


def _cleaned(tensor: Tensor, keep: Tensor) -> Tensor:
    mask = keep.view(-1, *[1] * (tensor.dim() - 1))
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))
