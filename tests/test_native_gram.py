"""The kernel of positions' products, at every level, beside numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sottovoce.client import native
from sottovoce.privacy.gradients import norms

SHAPES = [(1, 1, 1), (3, 2, 5), (2, 7, 64), (2, 12, 130), (1, 33, 257), (4, 20, 16), (0, 3, 4)]


def products(library: native.Library, x: Tensor) -> Tensor:
    rows, length, width = x.shape
    found = torch.full((rows, length, length), torch.nan, dtype=torch.float64)
    places = x.data_ptr(), rows, length, width, x.stride(0), x.stride(1)
    assert library.kernels_gram(*places, found.data_ptr()) == 0
    return found


def known(x: Tensor) -> Tensor:
    return torch.einsum("rtd,rsd->rts", x.double(), x.double())


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_doubles(
    kernel_level: native.Library, shape: tuple[int, int, int]
) -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    found = products(kernel_level, x)
    torch.testing.assert_close(found, known(x), rtol=1e-13, atol=1e-13)
    assert torch.equal(found, found.transpose(1, 2))


def test_rows_and_positions_may_lie_anywhere(kernel_level: native.Library) -> None:
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(2))
    turned, part = x.transpose(0, 1), x[1:4, :, 8:31]
    for view in (turned, part):
        torch.testing.assert_close(products(kernel_level, view), known(view))


def test_a_row_that_is_not_finite_leaves_the_others_alone(kernel_level: native.Library) -> None:
    x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(3))
    x[1, 2, 7], x[1, 4, 1] = torch.nan, torch.inf
    found = products(kernel_level, x)
    torch.testing.assert_close(found[::2], known(x)[::2])
    assert bool(found[1, 2].isnan().all()) and not bool(found[1, 4].isfinite().any())


def test_norms_hang_on_the_kernel_by_no_more_than_rounding(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(6, 9, 70, generator=torch.Generator().manual_seed(4))
    fast = norms.Gram(x).products
    monkeypatch.setattr(norms, "kernels", lambda: None)
    torch.testing.assert_close(fast, norms.Gram(x).products, rtol=1e-13, atol=1e-13)
