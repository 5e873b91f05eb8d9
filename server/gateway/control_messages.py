"""What passes over the control socket for a round: JSON first, then safetensors in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from sottovoce.server.gateway.orders import RoundOrder, RoundResult

PIECE = 2**20
SPEC, DEVICES, PARAMETER = "spec", "devices", "parameter."
ORDER_VALUES = (
    "run", "round", "numbers", "clip_norm", "deadline_s", "enough", "upload_encoding",
    "download_encoding", "counts_clipped",
)  # fmt: skip
RESULT_VALUES = ("declined", "late", "silent", "refused", "clipped", "bytes_down", "bytes_up")


def order_pieces(order: RoundOrder) -> Iterator[bytes]:
    """A `RoundOrder` as messages."""
    header = {name: getattr(order, name) for name in ORDER_VALUES}
    header["levels"] = np.asarray(order.levels).tolist()
    header["norm_bounds"] = [[level, bound] for level, bound in order.norm_bounds.items()]
    tensors = {PARAMETER + name: tensor for name, tensor in order.parameters.items()}
    tensors[SPEC] = torch.frombuffer(bytearray(order.spec), dtype=torch.uint8)
    tensors[DEVICES] = torch.from_numpy(np.asarray(order.devices, dtype=np.int64))
    return _pieces(header | {"order": list(order.parameters)}, tensors)


def read_order(pieces: Sequence[bytes]) -> RoundOrder:
    """What `order_pieces` wrote."""
    header, tensors = _whole(pieces)
    return RoundOrder(
        spec=tensors[SPEC].numpy().tobytes(),
        parameters={name: tensors[PARAMETER + name] for name in header["order"]},
        devices=tensors[DEVICES].numpy(),
        levels=np.array(header["levels"], dtype=np.uint8),
        norm_bounds={int(level): float(bound) for level, bound in header["norm_bounds"]},
        **{name: header[name] for name in ORDER_VALUES},
    )


def result_pieces(result: RoundResult) -> Iterator[bytes]:
    """A `RoundResult` as messages."""
    header = {name: getattr(result, name) for name in RESULT_VALUES}
    header["accepted"] = list(result.accepted_by_level.items())
    return _pieces(header | {"order": list(result.sums)}, result.sums)


def read_result(pieces: Sequence[bytes]) -> RoundResult:
    """What `result_pieces` wrote."""
    header, tensors = _whole(pieces)
    return RoundResult(
        sums={name: tensors[name] for name in header["order"]},
        accepted_by_level={int(level): int(count) for level, count in header["accepted"]},
        **{name: header[name] for name in RESULT_VALUES},
    )


def _pieces(header: dict[str, object], tensors: dict[str, Tensor]) -> Iterator[bytes]:
    yield json.dumps(header).encode()
    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})
    for at in range(0, len(data), PIECE):
        yield data[at : at + PIECE]


def _whole(pieces: Sequence[bytes]) -> tuple[dict, dict[str, Tensor]]:  # type: ignore[type-arg]
    return json.loads(pieces[0]), load(b"".join(pieces[1:]))
