"""Matrix products of tracked leaves, by compiled kernels or on the faster of torch's libraries.

The kernels (client/native/gemm.h) take stacks of small matrices, on one thread: about twice as fast
as torch's `bmm` on an AMD processor with AVX-512. They add sums of outer products to a stack of
weights in place, scale rows on the way and pass over fillers. Elsewhere torch multiplies float32
matrices with MKL, whose kernels for processors that are not Intel's use half of their vector width;
the oneDNN library in the same build does not, and is about twice as fast there too. Which of them
computes follows from processor, threads and sizes alone, never from a clock: a seeded run gives the
same bytes each time.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sottovoce.client.native import Library, address, kernels

WORTHWHILE = 1 << 21  # multiplications below which oneDNN's call costs more than it saves
SMALL = 1 << 20  # multiplications of a stack below which a call of torch's is over sooner


def compiled(stack: Tensor, width: int, *others: Tensor) -> Library | None:
    """The kernels, where they are the fastest for a stack (K, n, ·) times matrices of a `width`."""
    worthwhile = len(stack) > 1 and stack.numel() * width >= SMALL
    found = kernels() if worthwhile and torch.get_num_threads() == 1 else None
    if found is None or found.kernels_level() == 0:
        return None
    fit = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (stack, *others))
    return found if fit else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (..., in), W (out, in), b (out,)."""
    if _faster(x, weight):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def matmul(g: Tensor, weight: Tensor) -> Tensor:
    """g W: g (..., out), W (out, in)."""
    return _onednn(g, weight.t(), None) if _faster(g, weight) else torch.matmul(g, weight)


def outer_sum(g: Tensor, x: Tensor) -> Tensor:
    """sum_n g_n x_n^T as (out, in): g (n, out), x (n, in)."""
    out, width = g.shape[1], x.shape[1]
    if g.shape[0] * out * width < WORTHWHILE or not (_suited(g) and _suited(x)):
        return g.t() @ x
    if out <= width:
        return _onednn(g.t(), x.t(), None)
    return _onednn(x.t(), g.t(), None).t().contiguous()  # the narrow side is cheap to turn


def step(pre: Tensor, state: Tensor, weight: Tensor) -> Tensor:
    """pre + state W^T: pre (n, out), state (n, in), W (out, in)."""
    if _faster(state, weight):
        operator = torch.ops.mkldnn._linear_pointwise.binary
        result: Tensor = operator(state, pre, weight, None, "add")
        return result
    return torch.addmm(pre, state, weight.t())


def _faster(x: Tensor, weight: Tensor) -> bool:
    products = x.numel() * weight.shape[0] if x.shape[-1] == weight.shape[1] else (
        x.numel() * weight.shape[1])
    return products >= WORTHWHILE and _suited(x) and _suited(weight)


def _suited(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and onednn_is_faster()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this machine's processor is one that MKL serves badly, and oneDNN is there."""
    if not (torch._C._has_mkldnn and torch._C.has_mkl):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in facts and "avx512f" in facts


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in every group: x (K, n, in), W (K, out, in), b (K, out)."""
    found = compiled(x, weight.shape[1], weight, *([] if bias is None else [bias]))
    fits = weight.is_contiguous() and (len(weight), weight.shape[2]) == (len(x), x.shape[2])
    if found is not None and fits and (bias is None or bias.shape == weight.shape[:2]):
        return _compiled_linear(found, x, weight, bias)
    if len(x) == 1 or one_by_one(x, weight):
        biases = [None] * len(x) if bias is None else list(bias)
        return torch.stack([linear(*each) for each in zip(x, weight, biases, strict=True)])
    matrix = weight.transpose(1, 2)
    return torch.bmm(x, matrix) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, matrix)


def stacked_matmul(g: Tensor, weight: Tensor) -> Tensor:
    """g W in every group: g (K, n, out), W (K, out, in)."""
    found = compiled(g, weight.shape[2], weight)
    fits = weight.is_contiguous() and weight.shape[:2] == (len(g), g.shape[2])
    if found is not None and fits:
        return _compiled_matmul(found, g, weight)
    if len(g) == 1 or one_by_one(g, weight):
        return torch.stack([matmul(*each) for each in zip(g, weight, strict=True)])
    return torch.bmm(g, weight)


def stacked_outer_sum(g: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """sum_n s_n g_n x_n^T in every group: g (K, n, out), x (K, n, in) as (K, out, in).

    `scale`: (K, rows) factors s, each for n / rows positions; None for ones.
    """
    found = compiled(g, x.shape[2], x, *([] if scale is None else [scale]))
    if found is not None and _fit(g, x, scale):
        return _compiled_sum(found, g, x, scale)
    if scale is not None:
        each = scale.repeat_interleave(g.shape[1] // scale.shape[1], 1).unsqueeze(2)
        x, g = (x * each, g) if x.shape[2] < g.shape[2] else (x, g * each)
    if len(g) == 1 or g.shape[1] * g.shape[2] * x.shape[2] >= WORTHWHILE and _suited(g):
        return torch.stack([outer_sum(*each) for each in zip(g, x, strict=True)])
    return torch.bmm(g.transpose(1, 2), x)


def add_outer_sum(weights: Tensor, g: Tensor, x: Tensor, factor: float) -> None:
    """Add `factor` sum_n g_n x_n^T to `weights` (K, out, in), contiguous, in every group."""
    found = compiled(g, x.shape[2], x, weights)
    fits = weights.is_contiguous() and weights.shape == (len(g), g.shape[2], x.shape[2])
    if found is not None and fits and _fit(g, x, None):
        _add_sum(found, weights, g, x, None, factor)
    elif is_small(len(g), g, x):
        weights.baddbmm_(g.transpose(1, 2), x, alpha=factor)
    else:
        weights.add_(stacked_outer_sum(g, x), alpha=factor)


def _fit(g: Tensor, x: Tensor, scale: Tensor | None) -> bool:
    """Whether both sides have the same positions, and `scale` as many for each of its factors.

    The kernels look at no shape: what does not fit goes to torch, which refuses it.
    """
    groups, positions = g.shape[:2]
    each = scale is None or len(scale) == groups and positions % scale.shape[1] == 0
    return x.shape[:2] == (groups, positions) and each


def _compiled_linear(found: Library, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (groups, rows, width), out = x.shape, weight.shape[1]
    y = x.new_empty(groups, rows, out)
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else (
        bias.contiguous())
    found.kernels_linear(
        groups, rows, width, out, address(x), address(weight),
        None if bias is None else address(bias), address(y),
    )
    return y


def _compiled_matmul(found: Library, g: Tensor, weight: Tensor) -> Tensor:
    (groups, rows, out), width = g.shape, weight.shape[2]
    x, g = g.new_empty(groups, rows, width), g.contiguous()
    found.kernels_matmul(groups, rows, width, out, address(g), address(weight), address(x))
    return x


def _compiled_sum(found: Library, g: Tensor, x: Tensor, scale: Tensor | None = None) -> Tensor:
    sums = g.new_empty(len(g), g.shape[2], x.shape[2])
    _add_sum(found, sums, g, x, scale, None)
    return sums


def _add_sum(
    found: Library, to: Tensor, g: Tensor, x: Tensor, scale: Tensor | None, factor: float | None
) -> None:
    """Sums added to `to` by some factor; without one they take its place."""
    (groups, positions, out), width = g.shape, x.shape[2]
    g, x, each = g.contiguous(), x.contiguous(), 1
    if scale is not None:
        scale, each = scale.contiguous(), positions // scale.shape[1]
    found.kernels_outer(
        groups, positions, width, out, address(g), address(x), address(to), factor is not None,
        1.0 if factor is None else factor, None if scale is None else address(scale), each,
    )


def is_small(groups: int, g: Tensor, x: Tensor) -> bool:
    """Whether `stacked_outer_sum` of (rows, T, ·) makes one program of all groups."""
    each = g.numel() // groups * x.shape[-1]
    return not (each >= WORTHWHILE and _suited(g) and _suited(x))


def one_by_one(states: Tensor, weights: Tensor) -> bool:
    """Whether a stack of products is faster one after another: (K, n, ·) and (K, out, in)."""
    each = states.shape[1] * weights.shape[1] * weights.shape[2]
    return each >= WORTHWHILE and _suited(states) and _suited(weights)
