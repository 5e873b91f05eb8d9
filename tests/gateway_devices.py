"""A gateway on loopback with TLS, and devices that speak its protocol by hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from torch import Tensor

from sottovoce.client.protocol import CHUNK_BYTES, PROTOCOL, SESSION, session_proof
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.client.protocol.device_pb2_grpc import DevicesStub
from sottovoce.client.wire import apply_delta, decode, encode, encoded_bytes
from sottovoce.server.gateway.gateway import Gateway, GatewaySettings, RoundOrder, RoundResult

RUN = "spring"
TIMEOUT_S = 15
SHAPES = {"weight": (3, 4), "bias": (4,), "scale": ()}
SPEC = b'{"spec": 1}'
LIMITS = {"come_back_s": 0.05, "hold_s": 5.0, "upload_stall_s": 2.0, "device_burst": 10_000}

Tensors = dict[str, Tensor]


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Gateway]:
    """A gateway at a free port, stopped at the end."""
    gateway = Gateway(folder, GatewaySettings(**{"port": 0, **LIMITS, **settings}))
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop(0.5)


class Device:
    """An enrolled device: one connection, one session at a time."""

    def __init__(self, gateway: Gateway, name: str = "", token: str | None = None) -> None:
        self.gateway = gateway
        self.ca = None if gateway.ca_file is None else gateway.ca_file.read_bytes()
        with self._connect(gateway.enrol_address) as channel:
            reply = DevicesStub(channel).Enrol(
                pb.EnrolRequest(
                    protocol=PROTOCOL, token=token or gateway.tokens(1)[0], name=name
                ),
                timeout=TIMEOUT_S,
            )
        self.number, self.key = reply.device, reply.key
        self.pair = (reply.private_key, reply.certificate)
        self.connect()

    def connect(self) -> Device:
        """A new connection, and no session yet."""
        self.channel = self._connect(self.gateway.address, self.pair)
        self.stub = DevicesStub(self.channel)
        self.metadata: tuple[tuple[str, bytes], ...] = ()
        return self

    def _connect(
        self, address: str, pair: tuple[bytes, bytes] = (b"", b"")
    ) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if self.ca is None:
            return grpc.insecure_channel(address, options)
        key, certificate = pair
        credentials = grpc.ssl_channel_credentials(self.ca, key or None, certificate or None)
        return grpc.secure_channel(address, credentials, options)

    def nonce(self) -> bytes:
        """A challenge."""
        request = pb.ChallengeRequest(protocol=PROTOCOL, device=self.number)
        return bytes(self.stub.Challenge(request, timeout=TIMEOUT_S).nonce)

    def open(self) -> Device:
        """A session, by this device's key."""
        nonce = self.nonce()
        answer = session_proof(self.key, nonce, self.number)
        request = pb.OpenSessionRequest(device=self.number, nonce=nonce, proof=answer)
        session = self.stub.OpenSession(request, timeout=TIMEOUT_S).session
        self.metadata = ((SESSION, session),)
        return self

    def check_in(self, run: str = RUN, level: int = 3, wait_ms: int = 0) -> pb.CheckInReply:
        """One check-in."""
        request = pb.CheckInRequest(run=run, level=level, wait_ms=wait_ms)
        return self.stub.CheckIn(request, timeout=TIMEOUT_S, metadata=self.metadata)

    def task(self, level: int = 3) -> pb.Task:
        """The next task, waiting for it."""
        for _ in range(200):
            reply = self.check_in(level=level, wait_ms=2000)
            if reply.HasField("task"):
                return reply.task
        raise AssertionError("no task came")

    def blobs(self, task: str, names: Sequence[bytes]) -> dict[bytes, bytes]:
        """What a download brings."""
        found: dict[bytes, bytearray] = {}
        request = pb.DownloadRequest(task=task, blobs=names)
        for chunk in self.stub.Download(request, timeout=TIMEOUT_S, metadata=self.metadata):
            data = found.setdefault(chunk.blob, bytearray())
            assert chunk.offset == len(data)
            data += chunk.data
        return {name: bytes(data) for name, data in found.items()}

    def model(self, task: pb.Task, held: dict[bytes, Tensor] | None = None) -> Tensors:
        """The model of a task, from differences where `held` (by hash) has their base."""
        held = held or {}
        names = [r.delta if r.base and r.base in held else r.hash for r in task.tensors]
        blobs = self.blobs(task.id, names)
        model = {}
        for ref, name in zip(task.tensors, names, strict=True):
            shape = tuple(ref.shape)
            model[ref.name] = (
                decode(blobs[name], "fp32", shape) if name == ref.hash
                else apply_delta(held[ref.base], blobs[name], ref.delta_encoding, shape)
            )
        return model

    def upload(self, parts: Sequence[pb.UploadPart] | Iterator[pb.UploadPart]) -> pb.Receipt:
        """Send the parts of an upload."""
        return self.stub.Upload(iter(parts), timeout=TIMEOUT_S, metadata=self.metadata)

    def report(self, task: pb.Task, update: Tensors, clipped: bool = False) -> pb.Receipt:
        """Upload a whole update."""
        return self.upload(upload_parts(task.id, update, task.upload_encoding, clipped))

    def decline(self, task: str, reason: str = "policy") -> pb.Receipt:
        """Decline a task."""
        request = pb.DeclineRequest(task=task, reason=reason)
        return self.stub.Decline(request, timeout=TIMEOUT_S, metadata=self.metadata)


def upload_parts(
    task: str, update: Tensors, encoding: str = "fp32", clipped: bool = False
) -> list[pb.UploadPart]:
    """An upload as it should be."""
    tensors = [
        pb.EncodedTensor(
            name=name, shape=list(t.shape), encoding=encoding,
            bytes=encoded_bytes(encoding, t.numel()),
        )
        for name, t in update.items()
    ]  # fmt: skip
    head = pb.UploadHead(task=task, tensors=tensors, clipped=clipped)
    data = b"".join(_any_values(tensor, encoding) for tensor in update.values())
    pieces = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    return [pb.UploadPart(head=head), *[pb.UploadPart(data=piece) for piece in pieces]]


def _any_values(tensor: Tensor, encoding: str) -> bytes:
    """As `encode`, which refuses values that are not finite."""
    if encoding == "fp32":
        return tensor.numpy().astype("<f4").tobytes()
    return encode(tensor, encoding)


def random_tensors(seed: int, scale: float = 1.0) -> Tensors:
    """A model or an update of `SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
    }


def order_for(devices: Sequence[int], **changes: Any) -> RoundOrder:
    """A round that asks `devices`."""
    values: dict[str, Any] = {
        "run": RUN, "round": 1, "spec": SPEC, "parameters": random_tensors(0),
        "devices": np.array(devices, dtype=np.int64), "numbers": list(range(len(devices))),
        "levels": np.full(len(devices), 3, dtype=np.uint8), "deadline_s": 10.0,
    }  # fmt: skip
    return RoundOrder(**(values | changes))


class Training:
    """A round in progress, in a thread. `result()` waits for its end."""

    def __init__(self, gateway: Any, order: RoundOrder) -> None:
        self._result: RoundResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(gateway, order), daemon=True)
        self._thread.start()

    def _run(self, gateway: Any, order: RoundOrder) -> None:
        try:
            self._result = gateway.train(order)
        except BaseException as error:
            self._error = error

    def result(self) -> RoundResult:
        """How it ended."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "the round did not end"
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


def ready(gateway: Gateway, number: int) -> list[Device]:
    """`number` devices that have declared their level for `RUN`."""
    gateway.announce(RUN)
    devices = [Device(gateway).open() for _ in range(number)]
    for device in devices:
        device.check_in()
    return devices
