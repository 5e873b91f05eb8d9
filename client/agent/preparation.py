"""From a task to everything its training needs: checks first, then downloads, then tensors.

Nothing is allocated for a task before its size is known and allowed: the specification has a bound
of its own, tensors must be those that it names, every blob has the size that follows from its
shape, and what was downloaded must have the hash that the task named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sottovoce.client.agent.blob_cache import BlobCache
from sottovoce.client.agent.connection import Connection, Malformed
from sottovoce.client.agent.journal import Journal, StepCost
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.work import needed_mb, step_cost
from sottovoce.client.errors import DataError
from sottovoce.client.protocol.device_pb2 import Task as Order
from sottovoce.client.protocol.device_pb2 import TensorRef
from sottovoce.client.task_spec import SPEC_BYTES, TaskSpec
from sottovoce.client.wire import ENCODINGS, apply_delta, content_hash, encoded_bytes, raw

HASH_BYTES = 32


class Declined(Exception):
    """The device does not do a task. `reason`: one of `REASONS`; `sentence`: for its log."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason, self.sentence = reason, sentence


@dataclass(frozen=True)
class Prepared:
    """A task whose specification was checked and whose tensors are here."""

    order: Order
    spec: TaskSpec
    cost: StepCost
    parameters: dict[str, Tensor]

    @property
    def clip_norm(self) -> float | None:
        """Bound on the update in this round."""
        if self.order.clips:
            return self.order.clip_norm
        return self.spec.training["update_clip_norm"]  # type: ignore[no-any-return]


class Preparation:
    """Prepares a device's tasks. `memory_mb()`: that training may take, 0 if that is unknown."""

    def __init__(
        self, connection: Connection, cache: BlobCache, journal: Journal, policy: Policy,
        memory_mb: Callable[[], float],
    ) -> None:  # fmt: skip
        self.connection, self.cache, self.journal = connection, cache, journal
        self.policy, self.memory_mb = policy, memory_mb
        self._spec: tuple[bytes, TaskSpec] | None = None

    async def prepare(self, order: Order, timeout_s: float) -> Prepared:
        """Raises Declined; DataError or Malformed for a task that is malformed or is not what its
        hashes say; what `Connection` raises.
        """
        spec = await self.specification(order, timeout_s)
        cost = self.check(order, spec)
        parameters = await self.tensors(order, timeout_s)
        return Prepared(order, spec, cost, parameters)

    async def specification(self, order: Order, timeout_s: float) -> TaskSpec:
        """The specification of a task: the last one, from the cache, or downloaded."""
        if self._spec is not None and self._spec[0] == order.spec:
            return self._spec[1]
        if len(order.spec) != HASH_BYTES or not 0 < order.spec_bytes <= SPEC_BYTES:
            raise DataError(f"the task's specification is to have {order.spec_bytes} bytes")
        data = self.cache.get(order.spec)
        if data is None:
            sizes = {order.spec: order.spec_bytes}
            data = (await self._fetched(order, sizes, timeout_s))[order.spec]
            self.cache.put(order.spec, data)
        self._spec = order.spec, TaskSpec.from_bytes(data)
        return self._spec[1]

    def check(self, order: Order, spec: TaskSpec) -> StepCost:
        """What the task costs. Raises Declined unless declaration, policy and memory allow it."""
        declared = self.journal.declared(order.run)
        if spec.run != order.run or declared is None or declared.level != order.level:
            raise Declined("policy", "the task is not of a run and level that this device declared")
        if not 1 <= order.round <= spec.rounds:
            raise Declined("policy", f"round={order.round} is not one of the run's {spec.rounds}")
        if order.upload_encoding not in ENCODINGS:
            raise Declined("policy", "the task wants an encoding that this device does not know")
        noised = spec.training["example"] is not None
        if noised and spec.clips and order.upload_encoding != "fp32":
            raise Declined("policy", "noised updates under a device-level claim travel as fp32")
        if order.clips and (noised or not spec.clips or not 0 < order.clip_norm < math.inf):
            raise Declined("policy", "the task moves a bound that it may not move")
        check_tensors(order, spec)
        cost = step_cost(spec, order.round, order.level)
        bound = order.clip_norm if order.clips else None
        complaint = self.policy.complaint(spec, cost, self.journal.costs(), bound)
        if complaint is not None:
            raise Declined(*complaint)
        free_mb, wanted_mb = self.memory_mb(), needed_mb(spec, order.level)
        if free_mb and wanted_mb > free_mb:
            raise Declined(
                "memory", f"it takes about {wanted_mb:.0f} MB, and {free_mb:.0f} are free"
            )
        return cost

    async def tensors(self, order: Order, timeout_s: float) -> dict[str, Tensor]:
        """The global parameters by name: held ones, held ones moved by a difference, or new."""
        held = {ref.name: self._held(ref) for ref in order.tensors}
        sizes: dict[bytes, int] = {}
        for ref in order.tensors:
            if held[ref.name] is None or ref.hash != _base_of(held[ref.name]):
                name, size = _wanted(ref, held[ref.name])
                sizes[name] = size
        blobs = await self._fetched(order, sizes, timeout_s)
        found = {ref.name: _value(ref, held[ref.name], blobs) for ref in order.tensors}
        again = {ref.hash: 4 * _numel(ref) for ref in order.tensors if found[ref.name] is None}
        whole = await self._fetched(order, again, timeout_s)
        tensors = {}
        for ref in order.tensors:
            value = found[ref.name]
            value = _value(ref, None, whole) if value is None else value
            if value is None or not bool(value.isfinite().all()):
                raise DataError(f"{ref.name} of the task is not finite")
            tensors[ref.name] = value
            self.cache.put(ref.hash, raw(value))
        self.cache.keep([order.spec, *(ref.hash for ref in order.tensors)])
        return tensors

    def _held(self, ref: TensorRef) -> tuple[bytes, bytes] | None:
        """Name and content of what is here of a tensor: its values, or the difference's base."""
        for name in (ref.hash, ref.base if ref.delta else b""):
            data = self.cache.get(name) if len(name) == HASH_BYTES else None
            if data is not None and len(data) == 4 * _numel(ref):
                return name, data
        return None

    async def _fetched(
        self, order: Order, sizes: dict[bytes, int], timeout_s: float
    ) -> dict[bytes, bytes]:
        """Blobs as named; Malformed where one has another hash."""
        if not sizes:
            return {}
        blobs = await self.connection.download(order.id, sizes, timeout_s)
        for name, data in blobs.items():
            if content_hash(data) != name:
                raise Malformed("a downloaded blob does not have its hash")
        return blobs


def check_tensors(order: Order, spec: TaskSpec) -> None:
    """Raise DataError unless the task's tensors are the specification's, with sizes that fit."""
    named = [(ref.name, tuple(ref.shape)) for ref in order.tensors]
    if named != list(spec.parameters):
        raise DataError("the task's tensors are not those of its specification")
    for ref in order.tensors:
        if len(ref.hash) != HASH_BYTES:
            raise DataError(f"{ref.name} of the task has no hash")
        if ref.delta and (
            len(ref.delta) != HASH_BYTES
            or ref.delta_encoding not in ENCODINGS
            or ref.delta_bytes != encoded_bytes(ref.delta_encoding, _numel(ref))
        ):
            raise DataError(f"{ref.name} of the task comes with a malformed difference")


def _base_of(held: tuple[bytes, bytes] | None) -> bytes:
    return b"" if held is None else held[0]


def _wanted(ref: TensorRef, held: tuple[bytes, bytes] | None) -> tuple[bytes, int]:
    """Hash and size of the blob to download: the difference where its base is here."""
    return (ref.hash, 4 * _numel(ref)) if held is None else (ref.delta, ref.delta_bytes)


def _value(
    ref: TensorRef, held: tuple[bytes, bytes] | None, blobs: dict[bytes, bytes]
) -> Tensor | None:
    """A tensor's values; None where held values and difference do not make them."""
    shape = tuple(ref.shape)
    if held is None:
        return _tensor(blobs[ref.hash], shape) if ref.hash in blobs else None
    own = _tensor(held[1], shape)
    if held[0] == ref.hash:
        return own
    moved = apply_delta(own, blobs[ref.delta], ref.delta_encoding, shape)
    return moved if content_hash(raw(moved)) == ref.hash else None


def _tensor(data: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32)).view(shape)


def _numel(ref: TensorRef) -> int:
    return math.prod(ref.shape)
