"""Tensors as they travel between a device and its gateway.

    fp32    float32, bit for bit
    fp16    half precision
    int8    one float32 scale, then one signed byte a value (Alistarh et al. 2017,
            arXiv:1610.02132, without their random rounding)

Both short forms round towards zero, so that no value grows: an update that was clipped to a norm is
still within it once it is decoded, to the last bit. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ENCODINGS = ("fp32", "fp16", "int8")

SCALE_BYTES = 4
STEPS = 127  # of int8, to either side of zero
LARGEST_HALF = 65504.0
ITEM_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}

Floats = NDArray[np.float32]


def content_hash(data: bytes) -> bytes:
    """SHA-256, by which blobs are named."""
    return hashlib.sha256(data).digest()


def raw(tensor: Tensor) -> bytes:
    """The values as little-endian float32, in the order of the tensor's elements."""
    return _values(tensor).astype("<f4", copy=False).tobytes()


def encoded_bytes(encoding: str, numel: int) -> int:
    """Exact size on the wire of `numel` values; ValueError for an unknown encoding."""
    _check(encoding)
    return numel * ITEM_BYTES[encoding] + (SCALE_BYTES if encoding == "int8" else 0)


def encode(tensor: Tensor, encoding: str) -> bytes:
    """The tensor's values; ValueError for an unknown encoding or values that are not finite.

    *Guarantee*: |decode(encode(x))| <= |x| in every element, with the same sign, so every norm of
    the decoded tensor is at most that of `tensor`. fp16 holds nothing above 65504: larger values
    become that.
    *Assumes*: nothing of the values; fp32 changes none.
    """
    _check(encoding)
    values = _values(tensor)
    if not np.isfinite(values).all():
        raise ValueError("an update with values that are not finite is not sent")
    if encoding == "fp32":
        return values.astype("<f4", copy=False).tobytes()
    if encoding == "fp16":
        return _halves(values).astype("<f2", copy=False).tobytes()
    scale, steps = _steps(values)
    return np.array(scale, dtype="<f4").tobytes() + steps.tobytes()


def decode(data: bytes, encoding: str, shape: Sequence[int]) -> Tensor:
    """What `encode` wrote of a tensor of `shape`, in float32.

    Raises ValueError for an unknown encoding, a wrong size, or a scale that no finite values have.
    fp32 and fp16 may hold values that are not finite: whoever reads them checks.
    """
    count = math.prod(shape)
    if len(data) != encoded_bytes(encoding, count):
        raise ValueError(
            f"{len(data)} bytes are no {encoding} tensor of shape {tuple(shape)}: it has "
            f"{encoded_bytes(encoding, count)}"
        )
    if encoding == "int8":
        values = _scaled(data)
    else:
        values = np.frombuffer(data, dtype="<f4" if encoding == "fp32" else "<f2")
    return torch.from_numpy(values.astype(np.float32)).view(tuple(shape))


def apply_delta(held: Tensor, data: bytes, encoding: str, shape: Sequence[int]) -> Tensor:
    """The held values plus an encoded difference, added in float32.

    Device and gateway both call it, so what they hold after it agrees bit for bit. ValueError as
    `decode`, and where `held` is of another shape.
    """
    if tuple(held.shape) != tuple(shape):
        raise ValueError(f"a difference of shape {tuple(shape)} to values of {tuple(held.shape)}")
    moved = _values(held) + decode(data, encoding, shape).numpy()
    return torch.from_numpy(np.asarray(moved, dtype=np.float32))


def _check(encoding: str) -> None:
    if encoding not in ITEM_BYTES:
        known = ", ".join(ENCODINGS)
        raise ValueError(f"encoding={encoding} does not exist: choose one of {known}")


def _values(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().to(torch.float32).cpu().contiguous().numpy()
    return found


def _halves(values: Floats) -> NDArray[np.float16]:
    """The largest half-precision values that are not beyond `values`."""
    halves = np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
    beyond = np.abs(halves.astype(np.float32)) > np.abs(values)
    bits = halves.view(np.uint16)  # sign and size: one less is one step towards zero
    return (bits - beyond.astype(np.uint16)).view(np.float16)


def _steps(values: Floats) -> tuple[np.float32, NDArray[np.int8]]:
    """A scale, and how many of it are in each value."""
    largest = float(np.abs(values).max(initial=0.0))
    scale = np.float32(largest / STEPS)
    if float(scale) * STEPS > largest:
        scale = np.nextafter(scale, np.float32(0))
    if scale == 0:
        return np.float32(0), np.zeros(values.shape, dtype=np.int8)
    counts = np.trunc(values.astype(np.float64) / float(scale)).clip(-STEPS, STEPS)
    found = counts.astype(np.int8)
    beyond = np.abs(found.astype(np.float32) * scale) > np.abs(values)
    return scale, found - (np.sign(found) * beyond).astype(np.int8)


def _scaled(data: bytes) -> Floats:
    scale = np.frombuffer(data[:SCALE_BYTES], dtype="<f4")[0]
    if not 0 <= scale <= np.finfo(np.float32).max / (STEPS + 1):
        raise ValueError(f"int8 scale={scale} is not that of finite values")
    found: Floats = np.frombuffer(data, dtype=np.int8, offset=SCALE_BYTES) * np.float32(scale)
    return found
