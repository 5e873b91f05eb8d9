"""The device's side of the wire: one channel, a session on it, every call with a deadline.

A session is opened by answering the gateway's nonce with an HMAC under the device's key, which
itself never travels after enrolment, and opened anew whenever the gateway knows it no longer. What
goes wrong becomes one of four errors, by what a device can do about it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import grpc

from sottovoce.client.agent.identity import KEY_BYTES, Identity
from sottovoce.client.errors import ConfigError, RunError
from sottovoce.client.protocol import PROTOCOL, SESSION, session_proof
from sottovoce.client.protocol import device_pb2 as messages
from sottovoce.client.protocol.device_pb2_grpc import DevicesStub

Reply = TypeVar("Reply")

CALL_S = 30.0  # for a short answer
LARGEST_MESSAGE = 4 << 20
CHANNEL = [
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
]
Code = grpc.StatusCode


class Unreachable(Exception):
    """Try again later: no connection, no answer in time, or a gateway that is busy."""


class Refused(Exception):
    """This call will not succeed; others may."""


class Malformed(Exception):
    """What the gateway sends is not what it says."""


class NotKnown(Exception):
    """The gateway does not know this device, or no longer."""


class NoLongerKnown(RunError):
    """The gateway refuses this device's key for good."""


class OtherProtocol(RunError):
    """Gateway and device do not understand each other."""


def _stub(channel: grpc.aio.Channel) -> Any:
    return DevicesStub(channel)  # type: ignore[no-untyped-call]


def loopback(address: str) -> bool:
    """Whether HOST of HOST:PORT is this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_channel(
    address: str, *, ca: bytes, certificate: bytes = b"", private_key: bytes = b"", insecure: bool
) -> grpc.aio.Channel:
    """A channel to HOST:PORT, by TLS unless `insecure`, for loopback alone.

    Raises ConfigError for an insecure channel to elsewhere.
    """
    if insecure:
        if not loopback(address):
            raise ConfigError(f"--insecure is for loopback alone, not for {address}: leave it out")
        return grpc.aio.insecure_channel(address, CHANNEL)
    credentials = grpc.ssl_channel_credentials(
        ca or None, private_key or None, certificate or None
    )
    return grpc.aio.secure_channel(address, credentials, CHANNEL)


async def enrol(
    address: str, token: str, *, ca: bytes = b"", insecure: bool = False, name: str = ""
) -> Identity:
    """This device's new identity, for a one-time token. Raises RunError, one line."""
    channel = open_channel(address, ca=ca, insecure=insecure)
    request = messages.EnrolRequest(protocol=PROTOCOL, token=token, name=name)
    try:
        reply = await _stub(channel).Enrol(request, timeout=CALL_S)
    except grpc.aio.AioRpcError as error:
        raise _enrolment_error(address, error) from None
    finally:
        await channel.close()
    if len(reply.key) != KEY_BYTES or not 0 < reply.device < 1 << 63:
        raise RunError(f"{address} gave no usable key: is it a sottovoce gateway?")
    return Identity(
        address, reply.device, reply.key, gateway=reply.gateway[:200], ca=ca,
        certificate=reply.certificate, private_key=reply.private_key, insecure=insecure,
    )  # fmt: skip


def _enrolment_error(address: str, error: grpc.aio.AioRpcError) -> RunError:
    code, details = error.code(), (error.details() or "")[:200]
    if code == Code.FAILED_PRECONDITION:
        return _other_protocol(address)
    if code == Code.PERMISSION_DENIED:
        return RunError(
            f"{address} does not take this token: it is used, out of date or not its own; ask the "
            "operator for a new one"
        )
    return RunError(f"{address} cannot be joined ({code.name}: {details}): check address and --ca")


def _other_protocol(address: str) -> OtherProtocol:
    return OtherProtocol(
        f"{address} speaks another version of the device protocol than this device's {PROTOCOL}: "
        "update sottovoce on the older side"
    )


class Connection:
    """A device's calls. `sent_bytes`, `received_bytes`: data of tensors so far."""

    def __init__(
        self, identity: Identity, address: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.identity, self.address = identity, address or identity.address
        self.sent_bytes = self.received_bytes = 0
        self._clock, self._session, self._until = clock, b"", 0.0
        self._opening = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        """Let go of the channel; the next call opens another one."""
        channel, self._channel = self._channel, None
        self._session = b""
        if channel is not None:
            await channel.close()

    async def check_in(self, request: messages.CheckInRequest) -> messages.CheckInReply:
        """Held by the gateway for up to the request's `wait_ms`."""
        timeout_s = request.wait_ms / 1000 + CALL_S
        return await self._call(lambda stub, session: stub.CheckIn(
            request, timeout=timeout_s, metadata=session
        ))

    async def decline(self, task: str, reason: str) -> messages.Receipt:
        request = messages.DeclineRequest(task=task, reason=reason)
        return await self._call(lambda stub, session: stub.Decline(
            request, timeout=CALL_S, metadata=session
        ))

    async def upload(
        self, parts: Callable[[], Iterable[messages.UploadPart]], timeout_s: float
    ) -> messages.Receipt:
        """Send `parts`, from the first one whenever the session has to be opened anew.

        Raises OSError where they cannot be read.
        """
        failures: list[OSError] = []
        try:
            return await self._call(lambda stub, session: stub.Upload(
                self._counted(parts(), failures), timeout=timeout_s, metadata=session
            ))
        except asyncio.CancelledError:
            if failures:  # gRPC cancels a call whose parts fail, and us with it
                raise failures[0] from None
            raise

    async def download(
        self, task: str, sizes: dict[bytes, int], timeout_s: float
    ) -> dict[bytes, bytes]:
        """Blobs by hash, each of the size given; Malformed where the gateway sends others.

        No more than the sizes is ever held.
        """
        request = messages.DownloadRequest(task=task, blobs=list(sizes))

        async def receive(stub: Any, session: Any) -> dict[bytes, bytes]:
            call = stub.Download(request, timeout=timeout_s, metadata=session)
            try:
                return await self._received(call, sizes)
            finally:
                call.cancel()

        return await self._call(receive)

    async def _received(
        self, chunks: AsyncIterator[messages.Chunk], sizes: dict[bytes, int]
    ) -> dict[bytes, bytes]:
        found = {name: bytearray() for name in sizes}
        async for chunk in chunks:
            data = found.get(chunk.blob)
            if data is None or chunk.offset != len(data) or chunk.size != sizes[chunk.blob]:
                raise Malformed("the gateway sends another blob than it was asked for")
            data += chunk.data
            self.received_bytes += len(chunk.data)
            if len(data) > chunk.size:
                raise Malformed("the gateway sends more of a blob than it said")
        if any(len(data) != sizes[name] for name, data in found.items()):
            raise Malformed("the gateway sends less of a blob than it said")
        return {name: bytes(data) for name, data in found.items()}

    async def _counted(
        self, parts: Iterable[messages.UploadPart], failures: list[OSError]
    ) -> AsyncIterator[messages.UploadPart]:
        try:
            for part in parts:
                yield part
                self.sent_bytes += len(part.data)
        except OSError as error:
            failures.append(error)
            raise

    async def _call(self, do: Callable[[Any, Any], Awaitable[Reply]]) -> Reply:
        """What `do(stub, metadata)` answers, with a session; opened anew once if need be."""
        for last in (False, True):
            session = await self._opened()
            try:
                return await do(_stub(self._open_channel()), ((SESSION, session),))
            except grpc.aio.AioRpcError as error:
                if error.code() == Code.UNAUTHENTICATED and not last:
                    if self._session == session:
                        self._session = b""
                    continue
                raise self._explained(error) from None
        raise AssertionError

    async def _opened(self) -> bytes:
        async with self._opening:
            if not self._session or self._clock() >= self._until:
                await self._open_session()
            return self._session

    async def _open_session(self) -> None:
        stub, device = _stub(self._open_channel()), self.identity.device
        try:
            challenge = await stub.Challenge(
                messages.ChallengeRequest(protocol=PROTOCOL, device=device), timeout=CALL_S
            )
            proof = session_proof(self.identity.key, challenge.nonce, device)
            reply = await stub.OpenSession(
                messages.OpenSessionRequest(device=device, nonce=challenge.nonce, proof=proof),
                timeout=CALL_S,
            )
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from None
        self._session = reply.session
        self._until = self._clock() + 0.9 * reply.lifetime_s

    def _open_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            own = self.identity
            self._channel = open_channel(
                self.address, ca=own.ca, certificate=own.certificate,
                private_key=own.private_key, insecure=own.insecure,
            )  # fmt: skip
        return self._channel

    def _explained(self, error: grpc.aio.AioRpcError) -> Exception:
        code, details = error.code(), f"{error.code().name}: {(error.details() or '')[:200]}"
        if code == Code.UNAUTHENTICATED:
            return NotKnown(details)
        if code == Code.FAILED_PRECONDITION:
            return _other_protocol(self.address)
        if code in (Code.PERMISSION_DENIED, Code.NOT_FOUND, Code.INVALID_ARGUMENT,
                    Code.OUT_OF_RANGE, Code.ALREADY_EXISTS, Code.UNIMPLEMENTED):  # fmt: skip
            return Refused(details)
        return Unreachable(details)
