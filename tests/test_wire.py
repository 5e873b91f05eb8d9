"""Laws of tensors on the wire."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from sottovoce.client.wire import (
    ENCODINGS,
    apply_delta,
    content_hash,
    decode,
    encode,
    encoded_bytes,
    raw,
)

tensors = arrays(
    np.float32,
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
).map(torch.from_numpy)
encodings = st.sampled_from(ENCODINGS)


@settings(max_examples=300, deadline=None)
@given(tensors, encodings)
def test_no_value_grows_or_changes_its_sign_on_the_wire(tensor: Tensor, encoding: str) -> None:
    found = decode(encode(tensor, encoding), encoding, tensor.shape)
    assert found.dtype == torch.float32 and found.shape == tensor.shape
    assert bool((found.abs() <= tensor.abs()).all())
    assert bool((found * tensor.sign() >= 0).all())


@settings(max_examples=100, deadline=None)
@given(tensors, encodings)
def test_sizes_on_the_wire_are_exact(tensor: Tensor, encoding: str) -> None:
    assert len(encode(tensor, encoding)) == encoded_bytes(encoding, tensor.numel())


@settings(max_examples=100, deadline=None)
@given(tensors)
def test_fp32_is_bit_exact(tensor: Tensor) -> None:
    data = encode(tensor, "fp32")
    assert data == raw(tensor) == tensor.numpy().astype("<f4").tobytes()
    assert raw(decode(data, "fp32", tensor.shape)) == data


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), encodings, st.lists(st.integers(0, 4), max_size=3))
def test_malformed_data_is_a_value_error_or_a_tensor_of_the_right_shape(
    data: bytes, encoding: str, shape: list[int]
) -> None:
    try:
        found = decode(data, encoding, shape)
    except ValueError:
        return
    assert list(found.shape) == shape and found.dtype == torch.float32
    assert encoding != "int8" or bool(found.isfinite().all())


@settings(max_examples=50, deadline=None)
@given(tensors, encodings)
def test_data_cut_short_or_drawn_out_are_refused(tensor: Tensor, encoding: str) -> None:
    data = encode(tensor, encoding)
    for wrong in (data + b"\0", data[:-1]):
        if len(wrong) != len(data):
            with pytest.raises(ValueError, match="bytes are no"):
                decode(wrong, encoding, tensor.shape)


def test_what_short_forms_lose_is_bounded() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    half = decode(encode(values, "fp16"), "fp16", values.shape)
    assert bool(((values - half).abs() <= values.abs() * 2.0**-10 + 2.0**-24).all())
    bytes_ = decode(encode(values, "int8"), "int8", values.shape)
    assert float((values - bytes_).abs().max()) <= 1.01 * float(values.abs().max()) / 127


def test_the_largest_value_keeps_its_whole_size_in_int8() -> None:
    values = torch.tensor([0.5, -3.7, 1.0])
    found = decode(encode(values, "int8"), "int8", values.shape)
    assert math.isclose(float(found[1]), -3.7, rel_tol=1e-6)


def test_values_beyond_half_precision_become_its_largest() -> None:
    values = torch.tensor([1e6, -7e4, 65504.0])
    assert decode(encode(values, "fp16"), "fp16", (3,)).tolist() == [65504.0, -65504.0, 65504.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_that_are_not_finite_are_not_sent(bad: float, encoding: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode(torch.tensor([1.0, bad]), encoding)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 3e38])
def test_a_scale_that_no_finite_values_have_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        decode(np.array(scale, dtype="<f4").tobytes() + b"\x01", "int8", (1,))


def test_an_unknown_encoding_is_refused_by_name() -> None:
    for call in (lambda: encode(torch.zeros(1), "zip"), lambda: decode(b"", "zip", (0,))):
        with pytest.raises(ValueError, match="encoding=zip"):
            call()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), encodings)
def test_differences_with_error_feedback_lead_to_the_new_values(seed: int, encoding: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    held, new = torch.randn(7, 3, generator=draw), torch.randn(7, 3, generator=draw)
    gaps = []
    for _ in range(6):
        delta = new - held
        gaps.append(float(delta.abs().max()))
        held = apply_delta(held, encode(delta, encoding), encoding, (7, 3))
    assert gaps[-1] <= max(1e-6, gaps[0] / 1000)


def test_a_difference_to_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        apply_delta(torch.zeros(3), encode(torch.zeros(2), "fp32"), "fp32", (2,))


def test_blobs_are_named_by_sha256() -> None:
    assert content_hash(b"a") == hashlib.sha256(b"a").digest()
