"""eDP-SGD: exact per-example clipping for one model, or for many devices' models, in one pass.

One forward pass, one backward pass of the *sum* of the rows' losses, and from the factors it
leaves the norm of every row's gradient and the clipped sum of every group. No per-row gradient is
ever stored, and the sum is assembled from the very factors whose norms were measured.

Sources: Dupuy et al. 2022, arXiv:2107.14586 (eDP-SGD); Bu et al. 2023, arXiv:2210.00038
(book-keeping); Abadi et al. 2016, arXiv:1607.00133 (DP-SGD).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.factors import Grams, clipped_sum, squared_norms, wide, zero_rows
from sottovoce.privacy.grouping import REMEDIES, Grouped, track

# Float32 rounding may carry a rescaled gradient past the threshold; one part in a million less
# keeps the released norm of every row at or below it.
SAFETY = 1.0 - 1e-6


@dataclass
class ClippedSums:
    """What a backward pass gives: sums by parameter name (groups, *shape), norms (rows,).

    `finite`: (rows,) bool; rows whose gradient was not finite contribute nothing. Without a
    threshold no norm is measured and both are empty.
    """

    sums: dict[str, Tensor]
    norms: Tensor
    finite: Tensor


def clipped_gradients(
    model: nn.Module,
    losses: Callable[[nn.Module], Tensor],
    clip_norm: float,
    groups: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """Sum of clipped per-row gradients for each group of rows.

    `losses` takes the tracked model and returns per-row losses (rows,), rows group by group, as
    many in each; every group starts from the model's own weights. Returns a tensor
    (groups, *shape) for each parameter with `requires_grad`, in the order of
    `model.parameters()`, and the unclipped norms (rows,). The model and its `.grad` fields are
    left as they were.

    Raises UnsupportedLayer where a parameter has no per-row gradient, ValueError for a bad
    `clip_norm`, `groups` or loss shape. Rows with a non-finite gradient contribute nothing.

    *Guarantee*: each row adds a vector of L2 norm at most `clip_norm` (over all parameters
    together) to its group's sum. Sensitivity `clip_norm` under add/remove of one example.
    *Assumes*: row i of `losses` depends on example i only.
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm={clip_norm} must be above 0")
    grouped = track(model)
    result = backward(grouped, losses(grouped.module), clip_norm, groups)
    return list(result.sums.values()), result.norms


def backward(
    grouped: Grouped, losses: Tensor, clip_norm: float | Tensor | None, groups: int
) -> ClippedSums:
    """Backward pass of `losses` (rows,) and the clipped sums it leaves.

    `clip_norm`: one threshold, one for each group (groups,), or None for plain sums.
    """
    rows = _check_losses(losses, groups)
    _backward_pass(grouped, losses)
    return _assemble(grouped, rows, clip_norm, groups)


@torch.no_grad()
def _assemble(
    grouped: Grouped, rows: int, clip_norm: float | Tensor | None, groups: int
) -> ClippedSums:
    factors = grouped.tape.take(rows)
    shapes = grouped.shapes()
    sample = next(iter(grouped.parameters.values()))
    scale = wide(sample.new_empty(0)).new_ones(rows)
    norms = finite = scale.new_zeros(0)
    if clip_norm is not None:
        grams: Grams = {}
        squares = (squared_norms(uses, grams) for uses in factors.values())
        norms = torch.sqrt(sum(squares, scale.new_zeros(rows)))
        finite = torch.isfinite(norms)
        if not bool(finite.all()):
            factors = {name: zero_rows(uses, finite) for name, uses in factors.items()}
        scale = clip_factors(norms, clip_norm, groups)
    sums = {
        name: clipped_sum(factors.get(name, []), scale, shape, groups)
        for name, shape in shapes.items()
    }
    return ClippedSums(sums, norms, finite)


def clip_factors(norms: Tensor, clip_norm: float | Tensor, groups: int) -> Tensor:
    """(rows,) factors min(1, C / norm); 0 where the norm is not finite.

    Scaling by them projects onto the ball of radius C (less one part in a million), which never
    moves two vectors further apart.
    """
    if isinstance(clip_norm, Tensor):
        clip_norm = clip_norm.repeat_interleave(len(norms) // groups)
    factor = (clip_norm * SAFETY / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factor, torch.zeros_like(norms))


def _check_losses(losses: Tensor, groups: int) -> int:
    if losses.dim() != 1:
        raise ValueError(
            f"losses have shape {tuple(losses.shape)}: return one loss per row (reduction='none')"
        )
    if groups < 1 or losses.shape[0] % groups:
        raise ValueError(f"{losses.shape[0]} rows do not divide into groups={groups}")
    return losses.shape[0]


def _backward_pass(grouped: Grouped, losses: Tensor) -> None:
    """Fill the tape; raise if a parameter was used where no tracked leaf saw it."""
    if not losses.requires_grad:
        raise UnsupportedLayer("the losses do not depend on any trainable parameter")
    names, tensors = list(grouped.parameters), list(grouped.parameters.values())
    grads = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
    stray = [name for name, grad in zip(names, grads, strict=True) if grad is not None]
    if stray:
        grouped.tape.take(losses.shape[0])
        raise UnsupportedLayer(
            f"parameter {stray[0]!r} is used outside its own layer (a functional call or a raw "
            f"parameter), where its per-example gradient cannot be seen: {REMEDIES}"
        )
