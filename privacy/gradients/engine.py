"""eDP-SGD: exact per-example clipping for one model, or for many devices' models, in one pass.

One forward pass, one backward pass of the *sum* of the rows' losses, and from the factors it
leaves the norm of every row's gradient and the clipped sum of every group. No per-row gradient is
ever stored, and the sum is assembled from the very factors whose norms were measured.

Sources: Dupuy et al. 2022, arXiv:2107.14586 (eDP-SGD); Bu et al. 2023, arXiv:2210.00038
(book-keeping); Abadi et al. 2016, arXiv:1607.00133 (DP-SGD).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import CodeType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.clipping import Clipping, as_clipping, clip_scales
from sottovoce.privacy.gradients.factors import Factor, clipped_sum, wide, zero_rows
from sottovoce.privacy.gradients.factors import descend as apply_factors
from sottovoce.privacy.gradients.grouping import REMEDIES, Grouped, track
from sottovoce.privacy.gradients.micro_batches import (
    MicroBatches,
    check_units,
    mean_squares,
    row_scales,
)
from sottovoce.privacy.gradients.norms import Memo, squared_norms
from sottovoce.privacy.gradients.probe import check_rows_apart


@dataclass
class ClippedSums:
    """What a backward pass gives: sums by parameter name (groups, *shape), norms (units,).

    A unit is what is clipped: a row, or a micro-batch of rows. Units whose norm is not finite
    contribute nothing. Without a threshold no norm is measured and `norms` is empty.
    """

    sums: dict[str, Tensor]
    norms: Tensor


# Models, and the code of the losses with which their rows were found to be apart.
_looked_at: WeakKeyDictionary[nn.Module, set[CodeType]] = WeakKeyDictionary()


def clipped_gradients(
    model: nn.Module,
    losses: Callable[[nn.Module], Tensor],
    clip_norm: float | Clipping,
    groups: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """Sum of clipped per-row gradients for each group of rows.

    `losses` takes the tracked model and returns per-row losses (rows,), rows group by group, as
    many in each; every group starts from the model's own weights. Returns a tensor
    (groups, *shape) for each parameter with `requires_grad`, in the order of
    `model.parameters()`, and the unclipped norms (rows,). The model and its `.grad` fields are
    left as they were. `clip_norm` may also be a rule (`sottovoce.privacy.Clipping`).

    Raises UnsupportedLayer where a parameter has no per-row gradient, ValueError for a bad
    `clip_norm`, `groups` or loss shape. Rows with a non-finite gradient contribute nothing.

    *Guarantee*: each row adds a vector of L2 norm at most `clip_norm` (over all parameters
    together) to its group's sum. Sensitivity `clip_norm` under add/remove of one example.
    *Assumes*: row i of `losses` depends on example i only.
    """
    rule = as_clipping(clip_norm)
    grouped = track(model)
    grouped.tape.inside = 1  # a tape of this one pass holds nobody else's rows
    seen, code = _looked_at.setdefault(model, set()), getattr(losses, "__code__", None)
    grouped.probed = code is not None and code in seen
    result = backward(grouped, losses(grouped.module), rule, groups)
    if grouped.probed and code is not None:
        seen.add(code)
    return list(result.sums.values()), result.norms


def backward(
    grouped: Grouped,
    losses: Tensor,
    clipping: float | Tensor | Clipping | None,
    groups: int,
    micro: MicroBatches | None = None,
    units: float = 1.0,
) -> ClippedSums:
    """Backward pass of `losses` (rows,) and the clipped sums it leaves.

    `clipping`: a rule; or its threshold, one for all or one for each group (groups,); or None for
    plain sums. `micro`: for a rule that clips micro-batches, who is in which; the sums are then
    those of the clipped means. `units`: what clipped sums are divided by.
    """
    rule = None if clipping is None else as_clipping(clipping)
    rows = _check_losses(losses, groups)
    check_units(rule, rows, groups, micro)
    if not rows:
        _check_trained(grouped)
        grouped.tape.take(0, check=False)
        floats, shapes = _floats(grouped), grouped.shapes()
        sums = {name: floats.new_zeros((groups, *shape)) for name, shape in shapes.items()}
        return ClippedSums(sums, floats.new_zeros(0 if micro is None else micro.count))
    _record(grouped, losses)
    with torch.no_grad(), _full_precision(losses.device.type):
        micro = None if micro is None else micro.to(losses.device)
        return _assemble(grouped, rows, rule, groups, micro, units)


def descend(grouped: Grouped, losses: Tensor, weights: dict[str, Tensor], rate: float) -> None:
    """weights - rate * (gradient of the sum of each group's losses), in place; no row is clipped.

    `losses`: (rows,), group by group. `weights`: by name (groups, *shape), contiguous.
    """
    rows = _check_losses(losses, len(next(iter(weights.values()))))
    if not rows:
        grouped.tape.take(0, check=False)
        return
    _record(grouped, losses)
    with torch.no_grad(), _full_precision(losses.device.type):
        shared: dict[int, Tensor] = {}
        for name, uses in grouped.tape.take(rows).items():
            apply_factors(uses, weights[name], rate, shared)


def _record(grouped: Grouped, losses: Tensor) -> None:
    """Leave the factors of a backward pass on the tape."""
    _check_trained(grouped)
    if len(losses) > 1 and losses.requires_grad and not grouped.probed:
        check_rows_apart(grouped.tape, list(grouped.parameters.values()), losses)
        grouped.probed = True
    _backward_pass(grouped, losses)


def _assemble(
    grouped: Grouped,
    rows: int,
    rule: Clipping | None,
    groups: int,
    micro: MicroBatches | None,
    units: float,
) -> ClippedSums:
    factors = grouped.tape.take(rows)
    shapes = grouped.shapes()
    scales: dict[str, Tensor | None] = dict.fromkeys(factors)
    if rule is None or not factors:
        norms = _floats(grouped)
    else:
        squares = _row_squares(factors) if micro is None else mean_squares(factors, micro)
        found, norms = clip_scales(squares, rule, groups, shapes)
        found = found if micro is None else row_scales(found, micro)
        shares = {id(scale): scale / units for scale in found.values()}  # most are one tensor
        scales |= {name: shares[id(scale)] for name, scale in found.items()}
        if not math.isfinite(float(norms.sum())):
            finite = torch.isfinite(norms)
            finite = finite if micro is None else micro.to_rows(finite)
            factors = {name: zero_rows(uses, finite) for name, uses in factors.items()}
    sums: dict[str, Tensor] = {}
    known: dict[tuple[int, ...], str] = {}  # both biases of an LSTM have one factor
    for name in list(factors):  # as recorded, big tables last; factors go as sums come
        uses, scale = factors.pop(name), scales[name]
        twin = known.setdefault((id(scale), *map(id, uses)), name)
        if twin in sums:
            sums[name] = sums[twin].clone()
        else:
            sums[name] = clipped_sum(uses, scale, shapes[name], groups)
    for name in shapes.keys() - sums.keys():
        sums[name] = _floats(grouped).new_zeros((groups, *shapes[name]))
    return ClippedSums({name: sums[name] for name in shapes}, norms)


def _row_squares(factors: dict[str, list[Factor]]) -> dict[str, Tensor]:
    memo = Memo()
    return {name: squared_norms(uses, memo) for name, uses in factors.items()}


def _floats(grouped: Grouped) -> Tensor:
    """An empty tensor of the type and on the device of sums."""
    return wide(next(iter(grouped.parameters.values())).new_empty(0))


@contextmanager
def _exactly(device: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _full_precision(device: str) -> AbstractContextManager[None]:
    """No autocast and no TensorFloat-32: a norm of 10 bits would let more than C through."""
    usual = device == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return nullcontext() if usual and not torch.is_autocast_enabled(device) else _exactly(device)


def _check_losses(losses: Tensor, groups: int) -> int:
    if losses.dim() != 1:
        raise ValueError(
            f"losses have shape {tuple(losses.shape)}: return one loss per row (reduction='none')"
        )
    if groups < 1 or losses.shape[0] % groups:
        raise ValueError(f"{losses.shape[0]} rows do not divide into groups={groups}")
    return losses.shape[0]


def _check_trained(grouped: Grouped) -> None:
    """Raise where other parameters train by now than those that were tracked."""
    known = {id(parameter) for parameter in grouped.parameters.values()}
    for name, parameter in grouped.module.named_parameters():
        if parameter.requires_grad != (id(parameter) in known):
            change = "unfrozen" if parameter.requires_grad else "frozen"
            raise UnsupportedLayer(
                f"parameter {name!r} was {change} after the model had been prepared: set "
                "requires_grad first, then build the optimizer anew"
            )


def _backward_pass(grouped: Grouped, losses: Tensor) -> None:
    """Fill the tape; raise if a parameter was used where no tracked leaf saw it."""
    if grouped.tape.pending:
        grouped.tape.take(0, check=False)
        raise ValueError(
            "another backward pass came before this one (loss.backward()?), and its gradients "
            "would slip in unclipped: leave the backward pass to the engine"
        )
    if not losses.requires_grad:
        raise UnsupportedLayer("the losses do not depend on any trainable parameter")
    names, tensors = list(grouped.parameters), list(grouped.parameters.values())
    # A sum, not ones as output gradients: those would make torch import its symbolic shapes.
    grads = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
    stray = [name for name, grad in zip(names, grads, strict=True) if grad is not None]
    if stray:
        grouped.tape.take(0, check=False)
        raise UnsupportedLayer(
            f"parameter {stray[0]!r} is used outside its own layer (a functional call or a raw "
            f"parameter), where its per-example gradient cannot be seen: {REMEDIES}"
        )
