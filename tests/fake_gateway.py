"""A gateway of a few lines for tests of the device agent: it does what its fields say, in a thread.

It keeps what devices sent byte for byte, so that a test can say what was never sent.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import lru_cache
from typing import Any, TypeVar

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from torch import Tensor

from sottovoce.client.protocol import CHUNK_BYTES, SESSION, session_proof
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.client.protocol.device_pb2_grpc import DevicesServicer, add_DevicesServicer_to_server
from sottovoce.client.task_spec import TaskSpec
from sottovoce.client.wire import content_hash, raw

Result = TypeVar("Result")
Upload = tuple[pb.UploadHead, bytes]
Code = grpc.StatusCode


@lru_cache
def the_loop() -> asyncio.AbstractEventLoop:
    """One event loop for all gateways and agents of a process: gRPC's poller knows loops for good,
    also those that are closed."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="gateways").start()
    return loop


def do(work: Coroutine[Any, Any, Result], timeout_s: float = 20.0) -> Result:
    """What `work` returns, done in `the_loop`."""
    future = asyncio.run_coroutine_threadsafe(work, the_loop())
    try:
        return future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise


class FakeGateway(DevicesServicer):  # type: ignore[misc]
    """`tasks`: handed out in order, each until it was reported or declined. `uploads`: complete
    ones, by task. `begun`: everything that ever arrived of an upload, complete or not.
    `outcome`: of an upload. `breaks`: called with the name of a call as it begins; may raise
    or wait.
    """

    def __init__(self, *, tls: bool = False, hold_s: float = 0.2) -> None:
        self.tokens, self.keys = {"one-time"}, dict[int, bytes]()
        self.sessions, self.nonces = dict[bytes, int](), set[bytes]()
        self.lifetime_s = 3600
        self.run, self.levels = "r", dict[int, int]()
        self.tasks: list[pb.Task] = []
        self.over = set[str]()
        self.blobs = dict[bytes, bytes]()
        self.uploads: dict[str, list[Upload]] = {}
        self.begun: dict[str, list[bytes]] = {}
        self.declined: dict[str, str] = {}
        self.downloaded: list[bytes] = []
        self.opened = self.checked_in = 0
        self.outcome: Callable[[str], int] | None = None
        self.breaks: Callable[[str], Any] = lambda call: None
        self.hold_s, self.pem = hold_s, b""
        self.port = 0
        self._tls = certificates() if tls else None
        if self._tls is not None:
            self.pem = self._tls[0]
        self.start()

    # -- life --------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        do(self._start())

    def stop(self) -> None:
        """Cut every connection, as kill -9 would."""
        do(self._server.stop(0))

    def __enter__(self) -> FakeGateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_DevicesServicer_to_server(self, self._server)
        address = f"127.0.0.1:{self.port}"
        if self._tls is None:
            self.port = self._server.add_insecure_port(address)
        else:
            _, key, chain = self._tls
            credentials = grpc.ssl_server_credentials([(key, chain)])
            self.port = self._server.add_secure_port(address, credentials)
        await self._server.start()

    # -- what tests put in -------------------------------------------------------------------------

    def add_task(
        self, spec: TaskSpec | bytes, parameters: dict[str, Tensor], number: int = 1, **changes: Any
    ) -> pb.Task:
        """A task of its own id; `changes` are put into it as they are."""
        data = spec if isinstance(spec, bytes) else spec.to_bytes()
        tensors = []
        for name, tensor in parameters.items():
            blob = raw(tensor)
            self.blobs[content_hash(blob)] = blob
            tensors.append(
                pb.TensorRef(name=name, shape=tuple(tensor.shape), hash=content_hash(blob))
            )
        self.blobs[content_hash(data)] = data
        task = pb.Task(
            id=secrets.token_hex(16), run=self.run, round=1, number=number,
            level=next(iter(self.levels.values()), 0), spec=content_hash(data),
            spec_bytes=len(data), tensors=tensors, deadline_ms=60_000, upload_encoding="fp32",
        )  # fmt: skip
        for name, value in changes.items():
            if name == "tensors":
                del task.tensors[:]
                task.tensors.extend(value)
            else:
                setattr(task, name, value)
        self.tasks.append(task)
        return task

    # -- the protocol ------------------------------------------------------------------------------

    async def _break(self, call: str) -> None:
        found = self.breaks(call)
        if asyncio.iscoroutine(found):
            await found

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        await self._break("Enrol")
        if request.protocol != 1:
            await context.abort(Code.FAILED_PRECONDITION, "protocol")
        if request.token not in self.tokens:
            await context.abort(Code.PERMISSION_DENIED, "token")
        self.tokens.discard(request.token)
        device, key = secrets.randbits(62) + 1, secrets.token_bytes(32)
        self.keys[device] = key
        return pb.EnrolReply(device=device, key=key, gateway="fake")

    async def Challenge(self, request: pb.ChallengeRequest, context: Any) -> pb.ChallengeReply:
        await self._break("Challenge")
        nonce = secrets.token_bytes(32)
        self.nonces.add(nonce)
        return pb.ChallengeReply(nonce=nonce)

    async def OpenSession(self, request: pb.OpenSessionRequest, context: Any) -> Any:
        key = self.keys.get(request.device)
        fresh = request.nonce in self.nonces
        self.nonces.discard(request.nonce)
        if key is None or not fresh or (
            session_proof(key, request.nonce, request.device) != request.proof
        ):
            await context.abort(Code.UNAUTHENTICATED, "proof")
        session = secrets.token_bytes(32)
        self.sessions[session] = request.device
        self.opened += 1
        return pb.OpenSessionReply(session=session, lifetime_s=self.lifetime_s)

    async def _device(self, context: Any) -> int:
        session = dict(context.invocation_metadata()).get(SESSION, b"")
        if session not in self.sessions:
            await context.abort(Code.UNAUTHENTICATED, "session")
        return self.sessions[session]

    async def CheckIn(self, request: pb.CheckInRequest, context: Any) -> pb.CheckInReply:
        device = await self._device(context)
        await self._break("CheckIn")
        self.checked_in += 1
        if request.run == self.run:
            self.levels[device] = request.level
        elif self.run:
            return pb.CheckInReply(run=self.run, declare=True)
        for _ in range(max(1, int(self.hold_s / 0.01))):
            for task in self.tasks:
                if task.id not in self.over:
                    return pb.CheckInReply(run=self.run, task=task)
            await asyncio.sleep(0.01)
        return pb.CheckInReply(run=self.run, come_back_ms=10)

    async def Download(
        self, request: pb.DownloadRequest, context: Any
    ) -> AsyncIterator[pb.Chunk]:
        await self._device(context)
        await self._break("Download")
        for name in request.blobs:
            if name not in self.blobs:
                await context.abort(Code.PERMISSION_DENIED, "blob")
            data = self.blobs[name]
            self.downloaded.append(name)
            for start in range(0, max(len(data), 1), CHUNK_BYTES):
                await self._break("Chunk")
                yield pb.Chunk(
                    blob=name, offset=start, size=len(data), data=data[start : start + CHUNK_BYTES]
                )

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], context: Any) -> pb.Receipt:
        await self._device(context)
        await self._break("Upload")
        head, data, place = pb.UploadHead(), bytearray(), -1
        async for part in parts:
            if part.HasField("head"):
                head = part.head
                arrived = self.begun.setdefault(head.task, [])
                arrived.append(b"")
                place = len(arrived) - 1
            else:
                data += part.data
                self.begun[head.task][place] = bytes(data)
            await self._break("Part")
        first = head.task not in self.uploads
        self.uploads.setdefault(head.task, []).append((head, bytes(data)))
        self.over.add(head.task)
        await self._break("Receipt")
        if self.outcome is not None:
            return pb.Receipt(outcome=self.outcome(head.task), reason="told so")
        return pb.Receipt(outcome=pb.ACCEPTED if first else pb.DUPLICATE)

    async def Decline(self, request: pb.DeclineRequest, context: Any) -> pb.Receipt:
        await self._device(context)
        await self._break("Decline")
        self.declined[request.task] = request.reason
        self.over.add(request.task)
        return pb.Receipt(outcome=pb.ACCEPTED)


def certificates(host: str = "127.0.0.1") -> tuple[bytes, bytes, bytes]:
    """PEM of a new CA, and key and certificate of a server at `host` that it signed."""
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)

    def signed(name: str, key: Any, issuer: str, by: Any, *extensions: Any) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - day).not_valid_after(now + day)
        )  # fmt: skip
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(by, hashes.SHA256())

    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = signed("ca", authority, "ca", authority, x509.BasicConstraints(True, None))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    leaf = signed("gateway", own, "ca", authority, names)
    pem = serialization.Encoding.PEM
    key = own.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return root.public_bytes(pem), key, leaf.public_bytes(pem)
