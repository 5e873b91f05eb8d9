"""Matrix products of tracked leaves, on the faster of torch's two libraries.

torch multiplies float32 matrices with MKL, whose kernels for processors that are not Intel's use
half of their vector width; the oneDNN library in the same build does not. On an AMD processor with
AVX-512 oneDNN is about twice as fast, in the same precision. Which library computes follows
from processor and sizes alone, never from a clock: a seeded run gives the same bytes each time.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WORTHWHILE = 1 << 21  # multiplications below which oneDNN's call costs more than it saves


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
    if len(x) == 1 or one_by_one(x, weight):
        biases = [None] * len(x) if bias is None else list(bias)
        return torch.stack([linear(*each) for each in zip(x, weight, biases, strict=True)])
    matrix = weight.transpose(1, 2)
    return torch.bmm(x, matrix) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, matrix)


def stacked_matmul(g: Tensor, weight: Tensor) -> Tensor:
    """g W in every group: g (K, n, out), W (K, out, in)."""
    if len(g) == 1 or one_by_one(g, weight):
        return torch.stack([matmul(*each) for each in zip(g, weight, strict=True)])
    return torch.bmm(g, weight)


def stacked_outer_sum(g: Tensor, x: Tensor) -> Tensor:
    """sum_n g_n x_n^T in every group: g (K, n, out), x (K, n, in) as (K, out, in)."""
    if len(g) == 1 or g.shape[1] * g.shape[2] * x.shape[2] >= WORTHWHILE and _suited(g):
        return torch.stack([outer_sum(*each) for each in zip(g, x, strict=True)])
    return torch.bmm(g.transpose(1, 2), x)


def is_small(groups: int, g: Tensor, x: Tensor) -> bool:
    """Whether `stacked_outer_sum` of (rows, T, ·) makes one program of all groups."""
    each = g.numel() // groups * x.shape[-1]
    return not (each >= WORTHWHILE and _suited(g) and _suited(x))


def one_by_one(states: Tensor, weights: Tensor) -> bool:
    """Whether a stack of products is faster one after another: (K, n, ·) and (K, out, in)."""
    each = states.shape[1] * weights.shape[1] * weights.shape[2]
    return each >= WORTHWHILE and _suited(states) and _suited(weights)
