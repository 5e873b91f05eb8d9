"""The gRPC servers of a gateway: their limits, their credentials, health and reflection."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from sottovoce.client.errors import RunError
from sottovoce.client.protocol import CHUNK_BYTES
from sottovoce.server.gateway.certificates import Pair
from sottovoce.server.gateway.settings import GatewaySettings

MESSAGE_BYTES = 4 * CHUNK_BYTES  # one part of a stream, or the head of an update
TASK_BYTES = 16 * 2**20  # a task that names thousands of tensors
HANDSHAKE_MS = 20_000
IDLE_MS = 600_000  # a connection without a call


class Health(HealthServicer):  # type: ignore[misc]
    """`Check` alone: a `Watch` could be left open by anyone, without limit."""

    async def Watch(self, request: Any, context: Any) -> None:
        """Not here."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask with Check")


def options(settings: GatewaySettings) -> list[tuple[str, int]]:
    """Of a server for devices: message limits, streams per connection, keep-alive.

    Dead connections are found within a minute; clients that ping more often than every ten seconds
    are disconnected. A taken port is an error, never shared.
    """
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", TASK_BYTES),
        ("grpc.max_metadata_size", 8 * 1024),
        ("grpc.max_concurrent_streams", settings.streams_per_connection),
        ("grpc.keepalive_time_ms", 40_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.so_reuseport", 0),
    ]


def server(
    settings: GatewaySettings, handlers: Sequence[grpc.GenericRpcHandler], service: str
) -> tuple[grpc.aio.Server, Health]:
    """A server that is not listening yet, with health and, where it may, reflection."""
    made = grpc.aio.server(
        handlers=handlers, options=options(settings), maximum_concurrent_rpcs=settings.max_calls
    )
    health = Health()
    health_pb2_grpc.add_HealthServicer_to_server(health, made)
    if settings.reflects:
        reflection.enable_server_reflection(
            (service, "grpc.health.v1.Health", reflection.SERVICE_NAME), made
        )
    return made, health


def credentials(
    pair: Callable[[], Pair], client_ca: bytes | None
) -> grpc.ServerCredentials:
    """TLS with what `pair` gives when a device connects.

    `client_ca`: PEM that signs the certificates which devices must have; None: they need none.
    """

    def configuration(pair: Pair) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(pair.private_key, pair.certificate)], client_ca
        )

    served = pair()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        before, served = served, pair()
        return None if served == before else configuration(served)

    return grpc.dynamic_ssl_server_credentials(
        configuration(served), fetch, require_client_authentication=client_ca is not None
    )


def listen(
    made: grpc.aio.Server, host: str, port: int, secure: grpc.ServerCredentials | None
) -> int:
    """Bind `made`; the port. RunError where the address cannot be had."""
    _probe(host, port)
    address = f"{_bracketed(host)}:{port}"
    try:
        bound = (
            made.add_insecure_port(address) if secure is None
            else made.add_secure_port(address, secure)
        )
    except RuntimeError as error:
        raise RunError(f"gateway host={host} port={port} cannot be used: choose others") from error
    return int(bound)


def join(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _probe(host: str, port: int) -> None:
    """Find out why a port cannot be bound: gRPC does not say."""
    name = host.strip("[]")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        remedy = "choose another port" if error.errno == errno.EADDRINUSE else "choose another host"
        raise RunError(
            f"gateway host={host} port={port} cannot be used ({error.strerror or error}): {remedy}"
        ) from error
