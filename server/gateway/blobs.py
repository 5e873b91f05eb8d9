"""What devices download: blobs by content hash, and the version of the model that they hold.

With a short encoding the gateway sends differences to what devices hold and keeps the error:

    delta = encode(new - held)        held <- held + decode(delta)        in float32

so the next difference makes up for what this one rounded off (error feedback, Seide et al. 2014;
Karimireddy et al. 2019, arXiv:1901.09847). Devices that hold no base fetch `held` in full, and all
train from the same bits. Either way what they get follows from released models alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.client.protocol import CHUNK_BYTES
from sottovoce.client.protocol.device_pb2 import Chunk, TensorRef
from sottovoce.client.wire import apply_delta, content_hash, encode, raw


@dataclass(frozen=True)
class Blob:
    """Bytes under their SHA-256, cut into `Chunk` messages that are ready to send.

    The messages are made once and shared by every download.
    """

    hash: bytes
    size: int
    messages: tuple[bytes, ...]

    @classmethod
    def of(cls, data: bytes) -> Blob:
        """`data` as a blob; empty data are one empty chunk."""
        name, view = content_hash(data), memoryview(data)
        messages = tuple(
            Chunk(
                blob=name, offset=at, size=len(data), data=bytes(view[at : at + CHUNK_BYTES])
            ).SerializeToString()
            for at in range(0, max(len(data), 1), CHUNK_BYTES)
        )
        return cls(name, len(data), messages)


@dataclass(frozen=True)
class Download:
    """A round's model: what tasks say of it, and the blobs that they name.

    `spec`: hash of the specification's blob.
    """

    spec: bytes
    tensors: tuple[TensorRef, ...]
    blobs: dict[bytes, Blob]

    @property
    def total_bytes(self) -> int:
        """Of all blobs together."""
        return sum(blob.size for blob in self.blobs.values())


@dataclass(frozen=True)
class Held:
    """A tensor as devices hold it, and the hash of its values."""

    values: Tensor
    hash: bytes


class Versions:
    """The model of one run as its devices hold it. Keeps the last version only."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}

    def next(self, spec: bytes, parameters: Mapping[str, Tensor], encoding: str) -> Download:
        """The download that brings devices from the held version to `parameters`.

        `spec`: goes along as a blob. `encoding`: of differences; fp32: whole tensors are sent, and
        only those that changed have another hash. RunError where a difference cannot be encoded.
        """
        refs, blobs, held = [], [Blob.of(spec)], {}
        for name, new in parameters.items():
            ref, parts, held[name] = self._step(name, new.detach(), encoding)
            refs.append(ref)
            blobs += parts
        self.held = held
        return Download(blobs[0].hash, tuple(refs), {blob.hash: blob for blob in blobs})

    def _step(
        self, name: str, new: Tensor, encoding: str
    ) -> tuple[TensorRef, list[Blob], Held]:
        before = self.held.get(name)
        ref = TensorRef(name=name, shape=list(new.shape))
        if encoding == "fp32" or before is None or before.values.shape != new.shape:
            values, parts = new.clone(), []
        else:
            values, delta = _moved(name, before.values, new, encoding)
            parts = [Blob.of(delta)]
            ref.base, ref.delta = before.hash, parts[0].hash
            ref.delta_encoding, ref.delta_bytes = encoding, len(delta)
        whole = Blob.of(raw(values))
        ref.hash = whole.hash
        return ref, [whole, *parts], Held(values, whole.hash)


def _moved(name: str, held: Tensor, new: Tensor, encoding: str) -> tuple[Tensor, bytes]:
    """What devices hold after the difference, and the difference as it is sent."""
    try:
        delta = encode(new - held, encoding)
    except ValueError as error:
        raise RunError(f"the difference of {name!r} to the last round: {error}") from error
    return apply_delta(held, delta, encoding, tuple(new.shape)), delta
