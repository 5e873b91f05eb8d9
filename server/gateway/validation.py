"""Whether an update may enter the sum. Nothing is allocated for one that says it is too large.

The head of an update must name every tensor once, with its shape, the encoding that was asked for
and the very number of bytes that follows from them; the data must be finite and within the bound on
an update's norm. One reason by name is all that leaves this module: nothing of the update does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sottovoce.client.protocol.device_pb2 import UploadHead
from sottovoce.client.wire import decode, encoded_bytes

KEYS, SHAPE, ENCODING, BYTES = "keys", "shape", "encoding", "bytes"
NOT_FINITE, NORM, MALFORMED = "not_finite", "norm", "malformed"
REFUSALS = (KEYS, SHAPE, ENCODING, BYTES, NOT_FINITE, NORM, MALFORMED)
"""Why updates are refused."""

SLACK = 1e-4
"""By how much, relatively, a norm may be above its bound: a device computes it in float32."""


class Refused(Exception):
    """An update that may not enter the sum. `reason`: one of `REFUSALS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Expected:
    """What an update of a round looks like. `shapes`: by name. `encoding`: of every tensor."""

    shapes: Mapping[str, tuple[int, ...]]
    encoding: str

    @property
    def total_bytes(self) -> int:
        """Of an update's data."""
        return sum(self.size(name) for name in self.shapes)

    def size(self, name: str) -> int:
        """Bytes of one tensor."""
        return encoded_bytes(self.encoding, math.prod(self.shapes[name]))

    def check(self, head: UploadHead) -> None:
        """Raise Refused unless `head` is that of such an update."""
        if len(head.tensors) != len(self.shapes):
            raise Refused(KEYS)
        if {tensor.name for tensor in head.tensors} != set(self.shapes):
            raise Refused(KEYS)
        for tensor in head.tensors:
            if tuple(tensor.shape) != self.shapes[tensor.name]:
                raise Refused(SHAPE)
            if tensor.encoding != self.encoding:
                raise Refused(ENCODING)
            if tensor.bytes != self.size(tensor.name):
                raise Refused(BYTES)

    def read(self, names: Sequence[str], data: bytes | bytearray, bound: float | None) -> Update:
        """The update whose tensors follow each other in `data` as `names` says.

        `bound`: on its norm over all tensors, computed in float64; None: there is none. An update
        that is above it by no more than `SLACK` is scaled down to it. Raises Refused.
        """
        if len(data) != self.total_bytes:
            raise Refused(BYTES)
        tensors, at, view = {}, 0, memoryview(data)
        for name in names:
            end = at + self.size(name)
            tensors[name] = self._tensor(name, bytes(view[at:end]))
            at = end
        square = sum(float(tensor.double().pow(2).sum()) for tensor in tensors.values())
        return Update(tensors, _scale(math.sqrt(square), bound))

    def _tensor(self, name: str, data: bytes) -> Tensor:
        try:
            tensor = decode(data, self.encoding, self.shapes[name])
        except ValueError:
            raise Refused(NOT_FINITE) from None
        if not bool(torch.isfinite(tensor).all()):
            raise Refused(NOT_FINITE)
        return tensor


@dataclass(frozen=True)
class Update:
    """A valid update. `scale`: that brings it within its bound, 1 for nearly all."""

    tensors: Mapping[str, Tensor]
    scale: float

    def add_to(self, sums: Mapping[str, Tensor]) -> None:
        """Add it to `sums`, float64.

        *Guarantee*: with a bound S the update moves `sums` by at most S in the L2 norm over all
        tensors (up to float64 rounding), whatever its device sent.
        *Assumes*: `sums` has the tensors of `Expected.shapes`.
        """
        for name, tensor in self.tensors.items():
            sums[name].add_(tensor.double(), alpha=self.scale)


def _scale(norm: float, bound: float | None) -> float:
    if bound is None or norm <= bound:
        return 1.0
    if norm > bound * (1 + SLACK):
        raise Refused(NORM)
    return bound / norm
