"""How the protocol's calls reach the service: what is read, and what errors become.

A message that cannot be read is INVALID_ARGUMENT; whatever else goes wrong inside a call ends that
call alone, as INTERNAL, and is logged by the error's name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from sottovoce.client.protocol import device_pb2 as pb
from sottovoce.server.gateway.logs import event
from sottovoce.server.gateway.service import Code, Context, DeviceService

Request = TypeVar("Request", bound=Message)

NAME = "sottovoce.device.v1.Devices"


def reader(kind: type[Request]) -> Callable[[bytes], Request | None]:
    """A deserialiser that makes None of what is no such message."""

    def read(data: bytes) -> Request | None:
        try:
            message: Request = kind.FromString(data)
            return message
        except (DecodeError, ValueError, RecursionError):
            return None

    return read


def guarded(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`call`, whose unforeseen errors end it alone and do not reach the caller."""

    async def run(request: Any, context: Context) -> Any:
        if request is None:
            await context.abort(Code.INVALID_ARGUMENT, "no message of this protocol")
        try:
            return await call(request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            if context.done():  # ended by gRPC itself: a message too large, a lost connection
                raise asyncio.CancelledError from error
            event("call failed", logging.ERROR, call=call.__name__, error=type(error).__name__)
            await context.abort(Code.INTERNAL, "the gateway failed")

    return run


def handlers(service: DeviceService, only_enrolment: bool = False) -> grpc.GenericRpcHandler:
    """The calls of `Devices` for a server. `only_enrolment`: nothing but `Enrol`."""
    unary = grpc.unary_unary_rpc_method_handler
    calls = {
        "Enrol": unary(guarded(service.enrol), reader(pb.EnrolRequest), _bytes),
        "Challenge": unary(guarded(service.challenge), reader(pb.ChallengeRequest), _bytes),
        "OpenSession": unary(guarded(service.open_session), reader(pb.OpenSessionRequest), _bytes),
        "CheckIn": unary(guarded(service.check_in), reader(pb.CheckInRequest), _bytes),
        "Decline": unary(guarded(service.decline), reader(pb.DeclineRequest), _bytes),
        "Download": grpc.unary_stream_rpc_method_handler(
            guarded(service.download), reader(pb.DownloadRequest), None
        ),
        "Upload": grpc.stream_unary_rpc_method_handler(
            guarded(service.upload), reader(pb.UploadPart), _bytes
        ),
    }
    if only_enrolment:
        calls = {"Enrol": calls["Enrol"]}
    handler: grpc.GenericRpcHandler = grpc.method_handlers_generic_handler(NAME, calls)
    return handler


def _bytes(message: Message) -> bytes:
    data: bytes = message.SerializeToString()
    return data
