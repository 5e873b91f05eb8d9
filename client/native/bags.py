"""What `bags.h` is told of a group, and where it lies."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.native import address, kernels

PLAIN, CLIPPED, AUTOMATIC = 0, 1, 2  # of `clips`

_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Bags(ctypes.Structure):
    """`struct bags`: see there."""

    _fields_ = [
        *((name, _INT) for name in ("layers", "vocabulary", "padding", "mean")),
        *((name, _POINTER) for name in ("widths", "table", "weights", "biases")),
        ("devices", _INT), ("columns", _INT),
        *((name, _POINTER) for name in (
            "tokens", "lengths", "labels", "starts", "step", "row", "steps")),
        ("clips", _INT),
        *((name, _DOUBLE) for name in ("rate", "clip", "units", "bound", "variance")),
        *((name, _POINTER) for name in ("keys", "places", "counts")), ("deviation", _DOUBLE),
        *((name, _POINTER) for name in (
            "noise", "tails", "table_sum", "weight_sums", "bias_sums", "drawn",
            "losses", "visits", "readings", "norms", "finite", "clipped")),
        *((name, _INT) for name in ("clipped_examples", "most_rows", "most_touched", "most_steps")),
        ("scratch", _POINTER), ("room", _POINTER),
    ]


class BagGroup:
    """A `Bags` being filled, and everything that its addresses point to, kept alive."""

    def __init__(self) -> None:
        library = kernels()
        assert library is not None
        self._library, self.fields, self._kept = library, Bags(), dict[str, object]()
        self._room = np.zeros(0, dtype=np.uint8)

    def set(self, **fields: float | Tensor | NDArray[np.generic] | list[Tensor | None]) -> None:
        """Numbers as they are; of arrays and tensors, which must be contiguous, the address."""
        for name, value in fields.items():
            setattr(self.fields, name, self._told(name, value))

    def _told(
        self, name: str, value: float | Tensor | NDArray[np.generic] | list[Tensor | None]
    ) -> float | int | None:
        if isinstance(value, (int, float)):
            return value
        self._kept[name] = value
        if isinstance(value, list):
            places = (_POINTER * len(value))(*(None if t is None else address(t) for t in value))
            self._kept[name] = value, places
            return ctypes.addressof(places)
        if isinstance(value, Tensor):
            return address(value)
        assert value.flags.c_contiguous
        return value.ctypes.data

    def plan(self) -> None:
        """Find out what training needs; ValueError for a word or a label that does not exist."""
        fields = self.fields
        scratch = self._library.kernels_bags_scratch(fields.vocabulary)
        if self._kept.get("sized") != scratch:
            self.set(scratch=np.zeros(scratch, dtype=np.uint8))
            self._kept["sized"] = scratch
        self._grow(fields.vocabulary // 8 + 64)
        size = self._library.kernels_bags_plan(ctypes.byref(fields))
        if size < 0:
            raise ValueError("a word or an intent is not among those that the model knows")
        self._grow(size)

    def train(self) -> None:
        """Train all devices, after `plan`."""
        self._library.kernels_bags_train(ctypes.byref(self.fields))

    def _grow(self, size: int) -> None:
        """`size` bytes of room, from a multiple of 64 on."""
        if len(self._room) < size + 64:
            self._room = np.zeros(size + size // 4 + 64, dtype=np.uint8)
            self.fields.room = -(-self._room.ctypes.data // 64) * 64
