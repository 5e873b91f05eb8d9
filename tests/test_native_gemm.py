"""Matrix products by the kernels, at every level, beside products in double."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sottovoce.client import native
from sottovoce.privacy.gradients import gemm
from sottovoce.privacy.gradients.factors import Dense, clipped_sum, descend

# groups, n, in, out
SHAPES = [
    (1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 64, 20), (1, 13, 33, 65), (2, 25, 128, 96), (2, 4, 16, 32),
    (2, 300, 31, 17), (1, 6, 300, 40), (4, 12, 256, 64), (2, 11, 513, 20),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def sides(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b and g of a stack."""
    groups, n, width, out = shape
    return (
        numbers(groups, n, width), numbers(groups, out, width, seed=2),
        numbers(groups, out, seed=3), numbers(groups, n, out, seed=4),
    )


def close(found: Tensor, known: Tensor, terms: int) -> None:
    torch.testing.assert_close(found, known.float(), rtol=1e-6, atol=4e-7 * terms**0.5 * 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_doubles(
    kernel_level: native.Library, shape: tuple[int, int, int, int]
) -> None:
    x, weight, bias, g = sides(shape)
    _, n, width, out = shape
    known = torch.baddbmm(bias.double().unsqueeze(1), x.double(), weight.double().mT)
    close(gemm._compiled_linear(kernel_level, x, weight, bias), known, width)
    known = torch.bmm(x.double(), weight.double().mT)
    close(gemm._compiled_linear(kernel_level, x, weight, None), known, width)
    known = torch.bmm(g.double(), weight.double())
    close(gemm._compiled_matmul(kernel_level, g, weight), known, out)
    known = torch.bmm(g.double().mT, x.double())
    close(gemm._compiled_sum(kernel_level, g, x), known, n)
    to = weight.clone()
    gemm._add_sum(kernel_level, to, g, x, None, -0.5)
    close(to, weight - 0.5 * known, n)


@pytest.mark.parametrize("each", [1, 4])
def test_rows_may_be_scaled_on_the_way(kernel_level: native.Library, each: int) -> None:
    x, _, _, g = sides((3, 600, 20, 35))
    scale = numbers(3, 600 // each, seed=5)
    spread = scale.repeat_interleave(each, 1).unsqueeze(2)
    known = torch.bmm((g * spread).double().mT, x.double())
    close(gemm._compiled_sum(kernel_level, g, x, scale), known, 600)


def test_zeros_in_front_are_passed_over_with_what_stands_beside_them(
    kernel_level: native.Library,
) -> None:
    x, _, _, g = sides((3, 40, 20, 35))
    g[0, :8], g[2] = 0, 0
    g[1, 9] = 0
    scale = numbers(3, 10, seed=5)
    spread = scale.repeat_interleave(4, 1).unsqueeze(2)
    known = torch.bmm((g * spread).double().mT, x.double())
    x[0, :8], x[2] = torch.nan, torch.inf
    found = gemm._compiled_sum(kernel_level, g, x, scale)
    close(found, known, 40)
    assert bool((found[2] == 0).all())


def test_a_row_that_is_not_finite_leaves_the_others_alone(kernel_level: native.Library) -> None:
    x, weight, bias, g = sides((2, 9, 40, 33))
    clean = gemm._compiled_linear(kernel_level, x, weight, bias)
    back = gemm._compiled_matmul(kernel_level, g, weight)
    x[0, 3, 5], x[1, 0, 0], g[0, 3, 1] = torch.nan, torch.inf, torch.nan
    broken = gemm._compiled_linear(kernel_level, x, weight, bias)
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert torch.equal(broken[0, others], clean[0, others]) and bool(broken[0, 3].isnan().all())
    assert torch.equal(broken[1, 1:], clean[1, 1:])
    behind = gemm._compiled_matmul(kernel_level, g, weight)
    assert torch.equal(behind[0, others], back[0, others]) and bool(behind[0, 3].isnan().all())


@pytest.mark.parametrize("scaled", [False, True])
def test_sums_and_steps_are_the_same_without_the_library(
    kernel_level: native.Library, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = Dense(numbers(24, 12, 64), numbers(24, 12, 96, seed=2))
    weights = numbers(3, 96, 64, seed=3)
    scale = numbers(24, seed=4).abs() if scaled else None
    found = clipped_sum([factor], scale, torch.Size((96, 64)), 3)
    moved = weights.clone()
    descend([factor], moved, 0.1)
    monkeypatch.setattr(gemm, "kernels", lambda: None)
    torch.testing.assert_close(
        found, clipped_sum([factor], scale, torch.Size((96, 64)), 3), rtol=1e-5, atol=1e-4
    )
    slow = weights.clone()
    descend([factor], slow, 0.1)
    torch.testing.assert_close(moved, slow, rtol=1e-5, atol=1e-5)


def test_they_are_for_large_stacks_of_float32_on_one_thread(kernel_level: native.Library) -> None:
    x = torch.zeros(4, 64, 64)
    if native.level() == "generic":
        assert gemm.compiled(x, 128) is None
        return
    assert gemm.compiled(x, 128, x) is kernel_level
    assert gemm.compiled(x, 2) is None, "a small product is over before a call of ours begins"
    assert gemm.compiled(torch.zeros(1, 256, 64), 128) is None, "no stack"
    assert gemm.compiled(x.double(), 128) is None and gemm.compiled(x, 128, x.half()) is None
    torch.set_num_threads(2)
    assert gemm.compiled(x, 128) is None, "torch's own libraries use all threads"


def test_sides_that_do_not_fit_are_refused_as_torch_refuses_them(
    kernel_level: native.Library,
) -> None:
    x, weight, bias, g = sides((3, 64, 96, 64))
    for other in (weight[:2], weight[:, :, :95].contiguous()):
        with pytest.raises((RuntimeError, ValueError)):
            gemm.stacked_linear(x, other)
    with pytest.raises((RuntimeError, ValueError)):
        gemm.stacked_linear(x, weight, bias[:, :63])
    for other in (weight[:2], weight[:, :63].contiguous()):
        with pytest.raises((RuntimeError, ValueError)):
            gemm.stacked_matmul(g, other)
    for short in (x[:2], x[:, :63]):
        with pytest.raises((RuntimeError, ValueError)):
            gemm.stacked_outer_sum(g, short)
    with pytest.raises(RuntimeError):
        gemm.stacked_outer_sum(g, x, torch.ones(3, 63))
    with pytest.raises((RuntimeError, ValueError)):
        gemm.add_outer_sum(weight[:, :, :95].contiguous(), g, x, 1.0)


def test_weights_of_any_layout_are_added_to_in_place(kernel_level: native.Library) -> None:
    x, weight, _, g = sides((3, 64, 96, 64))
    turned = weight.mT.contiguous().mT
    gemm.add_outer_sum(weight, g, x, -0.5)
    gemm.add_outer_sum(turned, g, x, -0.5)
    torch.testing.assert_close(turned, weight, rtol=1e-5, atol=1e-4)
