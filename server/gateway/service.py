"""The protocol's calls: who calls is checked first, then how often, then what is said.

No call trusts what it reads. How calls reach these methods is in calls.py.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn, TypeAlias

import grpc

from sottovoce.client.protocol import PROTOCOL, REASONS, SESSION, session_proof
from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.server.gateway.certificates import Authority, device_of
from sottovoce.server.gateway.desk import Decided, Desk
from sottovoce.server.gateway.limits import Buckets, caller_address
from sottovoce.server.gateway.logs import event
from sottovoce.server.gateway.metrics import Metrics
from sottovoce.server.gateway.registry import Registry
from sottovoce.server.gateway.rounds import ACCEPTED, REFUSED
from sottovoce.server.gateway.sessions import NONCE_BYTES, Challenges, Sessions
from sottovoce.server.gateway.settings import GatewaySettings
from sottovoce.server.gateway.uploads import Broken, InFlight, receive
from sottovoce.strategies.levels import MAX_LEVEL

Context: TypeAlias = Any  # grpc.aio.ServicerContext: grpcio has no types
Code = grpc.StatusCode

MAX_TOKEN = 200
FAILURE_COST = 20  # calls that one failed proof or token counts as
OUTCOMES = {ACCEPTED: pb.DUPLICATE, REFUSED: pb.REFUSED}


class DeviceService:
    """The servicer of `Devices`. `certifies`: signs the devices' own certificates, or None."""

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        desk: Desk,
        metrics: Metrics,
        certifies: Authority | None,
    ) -> None:
        self.settings, self.registry, self.desk = settings, registry, desk
        self.metrics, self.certifies = metrics, certifies
        self.challenges = Challenges(settings.challenge_lifetime_s)
        self.sessions = Sessions(settings.session_lifetime_s, settings.sessions_per_device)
        self.in_flight = InFlight(settings.upload_mb_in_flight * 2**20)
        self._peers = Buckets(settings.peer_calls_per_s, settings.peer_burst)
        self._enrolments = Buckets(settings.enrolments_per_minute / 60, settings.enrolment_burst)
        self._calls = Buckets(settings.device_calls_per_s, settings.device_burst)

    async def enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolReply:
        """A token for a key."""
        await self._protocol(request.protocol, context)
        peer = caller_address(context.peer())
        if not self._enrolments.take(peer):
            await self._deny(context, Code.RESOURCE_EXHAUSTED, "too many enrolments")
        good = 0 < len(request.token) <= MAX_TOKEN
        enrolled = None
        if good:
            enrolled = await asyncio.to_thread(self.registry.enrol, request.token, request.name)
        if enrolled is None:
            self._enrolments.take(peer, FAILURE_COST)
            await self._deny(context, Code.PERMISSION_DENIED, "no good token")
        event("device enrolled", device=enrolled.device)
        reply = pb.EnrolReply(
            device=enrolled.device, key=enrolled.key, gateway=self.settings.name
        )
        if self.certifies is not None:
            pair = await asyncio.to_thread(self.certifies.device, enrolled.device)
            reply.certificate, reply.private_key = pair.certificate, pair.private_key
        return reply

    async def challenge(self, request: pb.ChallengeRequest, context: Context) -> pb.ChallengeReply:
        """A nonce; strangers get one too, which opens nothing."""
        await self._protocol(request.protocol, context)
        await self._limit_peer(context)
        if self.registry.key(request.device) is None:
            return pb.ChallengeReply(nonce=secrets.token_bytes(NONCE_BYTES))
        return pb.ChallengeReply(nonce=self.challenges.new(request.device))

    async def open_session(
        self, request: pb.OpenSessionRequest, context: Context
    ) -> pb.OpenSessionReply:
        """A session for a proof."""
        await self._limit_peer(context)
        device = request.device
        fresh = self.challenges.use(device, request.nonce)
        key = self.registry.key(device)
        expected = session_proof(key or bytes(32), request.nonce[:NONCE_BYTES], device)
        right = hmac.compare_digest(expected, request.proof)
        if not (fresh and right and key is not None):
            self._peers.take(caller_address(context.peer()), FAILURE_COST)
            await self._deny(context, Code.UNAUTHENTICATED, "no good proof")
        await self._certified(device, context)
        return pb.OpenSessionReply(
            session=self.sessions.open(device),
            lifetime_s=max(1, int(self.settings.session_lifetime_s)),
            server_time_ms=int(time.time() * 1000),
        )

    async def check_in(self, request: pb.CheckInRequest, context: Context) -> pb.CheckInReply:
        """A task, the run to declare a level for, or when to come back."""
        device = await self._device(context)
        loop, desk = asyncio.get_running_loop(), self.desk
        if request.level > MAX_LEVEL or len(request.run) > 200:
            await self._deny(context, Code.INVALID_ARGUMENT, f"levels go up to {MAX_LEVEL}")
        until = loop.time() + min(request.wait_ms / 1000, self.settings.hold_s)
        while not desk.draining:
            if desk.run and request.run != desk.run:
                return pb.CheckInReply(run=desk.run, declare=True)
            if desk.run:
                await desk.declare(device, request.level)
            if (task := desk.offer(device)) is not None:
                return pb.CheckInReply(run=desk.run, task=task)
            left = until - loop.time()
            if left <= 0 or not await desk.changed(device, left):
                break
            await self._device(context, counts=False)
        return pb.CheckInReply(run=desk.run, come_back_ms=desk.come_back_ms())

    async def download(self, request: pb.DownloadRequest, context: Context) -> None:
        """Blobs of the caller's open task, from messages that all downloads share."""
        device = await self._device(context)
        found = self.desk.find(request.task, device)
        if isinstance(found, Decided):
            await self._deny(context, Code.PERMISSION_DENIED, "no open task of this device")
        current, task = found
        blobs = current.blobs(task, list(request.blobs))
        if blobs is None:
            await self._deny(context, Code.PERMISSION_DENIED, "no blob of this task")
        task.bytes_left -= sum(blob.size for blob in blobs)
        if task.bytes_left < 0:
            await self._deny(context, Code.RESOURCE_EXHAUSTED, "downloaded too often")
        sent, stall_s = 0, self.settings.upload_stall_s
        try:
            with current.streaming(task, stall_s) as limit:
                async with limit:
                    for blob in blobs:
                        for message in blob.messages:
                            limit.reschedule(current.next_limit(stall_s))
                            await context.write(message)
                            sent += len(message)
        except TimeoutError:
            await self._deny(context, Code.DEADLINE_EXCEEDED, "download stalled or round over")
        finally:
            current.result.bytes_down += sent
            self.metrics.sent_bytes.labels("down").inc(sent)

    async def upload(
        self, parts: AsyncIterator[pb.UploadPart | None], context: Context
    ) -> pb.Receipt:
        """An update of the caller's open task, into the sum or not at all."""
        device = await self._device(context)
        try:
            async with asyncio.timeout(self.settings.upload_stall_s):
                first = await anext(parts, None)
        except TimeoutError:
            await self._deny(context, Code.DEADLINE_EXCEEDED, "upload stalled")
        if first is None or first.WhichOneof("part") != "head":
            await self._deny(context, Code.INVALID_ARGUMENT, "an upload begins with its head")
        found = self.desk.find(first.head.task, device)
        if isinstance(found, Decided):
            return self._receipt(found)
        current, task = found
        try:
            mine = await receive(
                current, task, first.head, parts, self.in_flight,
                stall_s=self.settings.upload_stall_s,
                allowed=lambda: self.sessions.device(self._secret(context)) == device,
                count=self.metrics.sent_bytes.labels("up").inc,
            )  # fmt: skip
        except Broken as broken:
            await self._deny(context, Code.ABORTED, str(broken))
        answer = self.desk.find(task.id, device)
        if not isinstance(answer, Decided):
            await self._deny(context, Code.ABORTED, "the update was not decided on")
        if mine and answer.state == ACCEPTED:
            self.metrics.receipts.labels("ACCEPTED").inc()
            return pb.Receipt(outcome=pb.ACCEPTED)
        if mine and answer.state == REFUSED:
            event("update refused", logging.WARNING, device=device, reason=answer.reason)
        return self._receipt(answer)

    async def decline(self, request: pb.DeclineRequest, context: Context) -> pb.Receipt:
        """The caller will not do its task."""
        device = await self._device(context)
        if request.reason not in REASONS:
            await self._deny(context, Code.INVALID_ARGUMENT, f"reasons are {', '.join(REASONS)}")
        found = self.desk.find(request.task, device)
        if isinstance(found, Decided):
            return self._receipt(found)
        if not found[0].decline(found[1]):
            return pb.Receipt(outcome=pb.LATE)
        self.metrics.declined.labels(request.reason).inc()
        return pb.Receipt(outcome=pb.ACCEPTED)

    def _receipt(self, decided: Decided) -> pb.Receipt:
        outcome = OUTCOMES.get(decided.state, pb.LATE)
        self.metrics.receipts.labels(pb.Outcome.Name(outcome)).inc()
        return pb.Receipt(outcome=outcome, reason=decided.reason)

    async def _device(self, context: Context, counts: bool = True) -> int:
        """The device that calls, by its session. `counts`: against its rate."""
        device = self.sessions.device(self._secret(context))
        if device is None:
            await self._deny(context, Code.UNAUTHENTICATED, "no open session")
        await self._certified(device, context)
        if counts and not self._calls.take(device):
            await self._deny(context, Code.RESOURCE_EXHAUSTED, "too many calls")
        self.desk.seen[device] = time.time()
        return device

    @staticmethod
    def _secret(context: Context) -> bytes:
        for name, value in context.invocation_metadata() or ():
            if name == SESSION and isinstance(value, bytes):
                return value
        return b""

    async def _certified(self, device: int, context: Context) -> None:
        """With mutual TLS: the connection's certificate must be the device's own."""
        if self.settings.mutual_tls:
            names = context.auth_context().get("x509_common_name", [])
            if [device_of(name.decode("utf-8", "replace")) for name in names] != [device]:
                await self._deny(context, Code.UNAUTHENTICATED, "another device's certificate")

    async def _limit_peer(self, context: Context) -> None:
        if not self._peers.take(caller_address(context.peer())):
            await self._deny(context, Code.RESOURCE_EXHAUSTED, "too many calls from this address")

    async def _protocol(self, protocol: int, context: Context) -> None:
        if protocol != PROTOCOL:
            await self._deny(
                context, Code.FAILED_PRECONDITION,
                f"protocol {protocol} is not spoken here: this gateway speaks {PROTOCOL}",
            )  # fmt: skip

    async def _deny(self, context: Context, code: Any, why: str) -> NoReturn:
        self.metrics.denied.labels(code.name.lower()).inc()
        await context.abort(code, why)
        raise AssertionError("abort raises")
