"""The fallback engine: per-example gradients by Opacus, for layers without a tracked form.

Opacus' hooks build every row's gradient of every parameter, (rows, *shape), with a rule for each
known layer and torch.func for any other. Clipping, sums and noise are ours, so a run has the same
steps and the same claims as with the grouped engine, for several times the time and memory; the
two are each other's reference in tests.

    grouped = track(model)                       # or group(model, 1): weights apart from the model
    result = backward(grouped, losses(grouped.module), clip_norm, groups=1)

Recurrent layers run as Opacus' own cells, on the same parameters. What Opacus cannot see, such as
a weight used in a functional call, shows itself: rows' gradients must add up to autograd's own.

Source: Yousefpour et al. 2021, arXiv:2109.12298.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.clipping import Clipping, as_clipping, clip_scales
from sottovoce.privacy.gradients.engine import ClippedSums
from sottovoce.privacy.gradients.micro_batches import MicroBatches, check_units
from sottovoce.privacy.gradients.opacus_grouping import OpacusGrouped
from sottovoce.privacy.gradients.opacus_grouping import group as group
from sottovoce.privacy.gradients.opacus_grouping import track as track

ENGINE = "privacy.example.engine=opacus"
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-9}  # of a sum, in parts of the rows' norms
COARSE = 1e-2  # the same for half precision


def backward(
    grouped: OpacusGrouped,
    losses: Tensor,
    clipping: float | Tensor | Clipping | None,
    groups: int,
    micro: MicroBatches | None = None,
    units: float = 1.0,
) -> ClippedSums:
    """As `sottovoce.privacy.gradients.engine.backward`: the clipped sums of `losses` (rows,).

    Raises UnsupportedLayer where Opacus found no gradient of a row, or not all of it, or where
    rows mix.
    """
    rule = None if clipping is None else as_clipping(clipping)
    if losses.dim() != 1 or groups < 1 or len(losses) % groups:
        raise ValueError(
            f"losses of shape {tuple(losses.shape)} do not divide into groups={groups}: return "
            "one loss per row"
        )
    check_units(rule, len(losses), groups, micro)
    try:
        samples = _row_gradients(grouped, losses) if len(losses) else {}
    finally:
        _forget(grouped)
    with torch.no_grad():
        samples = {name: _full(sample) for name, sample in samples.items()}
        micro = None if micro is None else micro.to(losses.device)
        return _assemble(grouped, samples, rule, groups, micro, units)


def _assemble(
    grouped: OpacusGrouped,
    samples: dict[str, Tensor],
    rule: Clipping | None,
    groups: int,
    micro: MicroBatches | None,
    units: float,
) -> ClippedSums:
    """`samples`: (rows, *shape) by name, of the parameters that the losses depend on."""
    shapes = grouped.shapes()
    floats = _full(next(iter(grouped.parameters.values())).new_empty(0))
    norms, scales = floats, {n: floats.new_ones(len(sample)) for n, sample in samples.items()}
    if rule is not None and samples:
        if micro is not None:
            samples = {name: micro.means(sample) for name, sample in samples.items()}
        squares = {name: _squares(sample) for name, sample in samples.items()}
        scales, norms = clip_scales(squares, rule, groups, shapes)
        finite = torch.isfinite(norms)
        samples = {name: _where(finite, sample) for name, sample in samples.items()}
    sums = {}
    for name, shape in shapes.items():
        sums[name] = floats.new_zeros((groups, *shape))
        if name in samples:
            weight = scales[name].view(groups, 1, -1) / (1.0 if rule is None else units)
            each = samples[name].reshape(groups, weight.shape[2], -1)
            sums[name] = torch.bmm(weight, each).view(groups, *shape)
    return ClippedSums(sums, norms)


def _row_gradients(grouped: OpacusGrouped, losses: Tensor) -> dict[str, Tensor]:
    """(rows, *shape) gradients by parameter name, checked against autograd's own sum."""
    if not losses.requires_grad:
        raise UnsupportedLayer("the losses do not depend on any trainable parameter")
    if len(losses) > 1 and not grouped.probed:
        _check_rows_apart(grouped, losses)
        grouped.probed = True
    samples, totals = _pass(grouped, losses, len(losses), retain=False)
    _check_complete(samples, totals)
    return samples


def _pass(
    grouped: OpacusGrouped, losses: Tensor, rows: int, *, retain: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows' gradients and autograd's own, of the parameters that the losses depend on."""
    tensors = list(grouped.inner.values())
    totals = torch.autograd.grad(losses.sum(), tensors, allow_unused=True, retain_graph=retain)
    found = {
        name: total
        for name, total in zip(grouped.inner, totals, strict=True) if total is not None
    }
    return {name: _sample_of(name, grouped.inner[name], rows) for name in found}, found


def _check_rows_apart(grouped: OpacusGrouped, losses: Tensor) -> None:
    """Raise if the loss of one row reaches the gradient of another; see `privacy.probe`.

    What Opacus noted in the forward pass is put back for the pass proper.
    """
    half = torch.tensor([row.bit_count() % 2 == 1 for row in range(len(losses))])
    modules = [m for m in grouped.module.modules() if "activations" in vars(m)]
    noted: list[list[Any]] = [list(cast(Any, m).activations) for m in modules]
    calls = {name: cast(Any, p)._forward_counter for name, p in grouped.inner.items()}
    for loud in (half, ~half):
        samples, _ = _pass(grouped, losses[loud.to(losses.device)], len(losses), retain=True)
        for name, sample in samples.items():
            if bool((_squares(_full(sample))[~loud] > 0).any()):
                raise UnsupportedLayer(
                    f"{ENGINE}: parameter {name!r} gets gradients of one row from the loss of "
                    "another: the first dimension of every layer's input must be the rows, and "
                    "nothing may mix them"
                )
        _forget(grouped)
        for module, activations in zip(modules, noted, strict=True):
            cast(Any, module).activations = list(activations)
        for name, count in calls.items():
            cast(Any, grouped.inner[name])._forward_counter = count


def _sample_of(name: str, parameter: Any, rows: int) -> Tensor:
    sample = getattr(parameter, "grad_sample", None)
    if isinstance(sample, list):
        sample = torch.stack(sample).sum(0)
    if sample is None:
        raise UnsupportedLayer(
            f"{ENGINE} found no per-example gradient of parameter {name!r}: call the model in "
            "training mode, once per backward pass, and use the parameter in its own layer only"
        )
    if len(sample) != rows:
        raise UnsupportedLayer(
            f"{ENGINE}: parameter {name!r} saw {len(sample)} rows where the losses have {rows}: "
            "the first dimension of every trainable layer's input must be the rows"
        )
    result: Tensor = sample.detach()
    return result


def _check_complete(samples: dict[str, Tensor], totals: dict[str, Tensor]) -> None:
    """Raise where rows do not add up: part of a gradient would be released without its norm."""
    squares = torch.stack([_squares(_full(sample)) for sample in samples.values()])
    scale = float(squares.sum(0).sqrt().sum())
    if not scale < float("inf"):
        return  # rows that are not finite are dropped; they hide nothing that other batches don't
    for name, total in totals.items():
        gap = float((_full(samples[name]).sum(0) - _full(total)).pow(2).sum().sqrt())
        if not gap <= ROUNDING.get(total.dtype, COARSE) * scale:
            raise UnsupportedLayer(
                f"{ENGINE}: the per-example gradients of parameter {name!r} do not add up to its "
                "gradient: it is used outside of its own layer, or Opacus has no rule for the "
                "layer; freeze it (requires_grad_(False)), and switch autocast and TF32 off"
            )


def _forget(grouped: OpacusGrouped) -> None:
    """Leave nothing for the next pass: neither activations nor half-counted calls."""
    for parameter in grouped.inner.values():
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter._forward_counter = 0  # type: ignore[attr-defined]
        if hasattr(parameter, "_current_grad_sample"):
            del parameter._current_grad_sample
    for module in grouped.module.modules():
        for note in ("activations", "max_batch_len"):
            if note in vars(module):
                delattr(module, note)


def _full(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _squares(gradient: Tensor) -> Tensor:
    """(units,) squared norms of (units, *shape)."""
    return gradient.reshape(len(gradient), -1).pow(2).sum(1)


def _where(keep: Tensor, gradient: Tensor) -> Tensor:
    mask = keep.view(-1, *[1] * (gradient.dim() - 1))
    return torch.where(mask, gradient, gradient.new_zeros(()))
