"""A gateway while it serves: its servers, its certificate, and what is done now and then."""

from __future__ import annotations

import asyncio
import logging
import socket
import sqlite3
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2

from sottovoce.client.errors import RunError, SottovoceError
from sottovoce.server.gateway.calls import NAME, handlers
from sottovoce.server.gateway.certificates import Authority, Pair, expiry_line, operators_pair
from sottovoce.server.gateway.control import ControlServer
from sottovoce.server.gateway.desk import Desk
from sottovoce.server.gateway.listening import Health, credentials, join, listen, server
from sottovoce.server.gateway.logs import event
from sottovoce.server.gateway.registry import Registry
from sottovoce.server.gateway.service import DeviceService
from sottovoce.server.gateway.settings import GatewaySettings, is_loopback

if TYPE_CHECKING:
    from sottovoce.server.gateway.gateway import Gateway

SERVING = health_pb2.HealthCheckResponse.SERVING
UPKEEP_S = 20.0
RENEWAL_S = 3600.0
LAST_S = 5.0  # for a round to be broken off


class ServerCertificate:
    """The certificate that devices see, which may change while the gateway serves."""

    def __init__(self, settings: GatewaySettings, authority: Authority | None) -> None:
        self.settings, self.authority = settings, authority
        self.pair = self._read() if settings.tls else None

    @property
    def days_left(self) -> float | None:
        """Until it is out of date; None without TLS."""
        return None if self.pair is None else round(self.pair.days_left, 1)

    @property
    def issues(self) -> Authority | None:
        """The CA that gives devices certificates of their own, where they need them."""
        return self.authority if self.settings.mutual_tls else None

    def renew(self) -> None:
        """Take a new certificate where the old one is about to end or the file has changed."""
        if self.pair is None:
            return
        try:
            found = self._read()
        except SottovoceError as error:
            event("certificate kept", logging.WARNING, error=error)
            return
        if found != self.pair:
            self.pair = found
            event("certificate renewed", days_left=self.days_left)

    def served(self) -> Pair:
        """The certificate as it is now; asked for whenever a device connects."""
        assert self.pair is not None
        return self.pair

    def warn(self) -> None:
        """Say so where it, or the CA, is about to end."""
        pairs = {"the gateway": self.pair}
        if self.authority is not None:
            pairs["its CA"] = self.authority.pair
        for what, pair in pairs.items():
            line = None if pair is None else expiry_line(what, pair)
            if line is not None:
                event(line, logging.WARNING)

    def _read(self) -> Pair:
        given = self.settings
        if given.certificate is not None and given.private_key is not None:
            return operators_pair(given.certificate, given.private_key)
        assert self.authority is not None
        return self.authority.server(_hosts(given))


class Running:
    """Everything that lives in the gateway's event loop."""

    def __init__(
        self, gateway: Gateway, registry: Registry, certificate: ServerCertificate
    ) -> None:
        self.gateway, self.settings = gateway, gateway.settings
        self.registry, self.certificate = registry, certificate
        self.started = time.time()
        self.desk = Desk(self.settings, registry, gateway.metrics)
        self.service = DeviceService(
            self.settings, registry, self.desk, gateway.metrics, certificate.issues
        )
        self._servers: list[tuple[grpc.aio.Server, Health]] = []
        self._control: ControlServer | None = None
        self._stop: asyncio.Future[float] | None = None

    async def open(self) -> None:
        """Listen everywhere. RunError where an address is taken."""
        self._stop = asyncio.get_running_loop().create_future()
        self._follow()
        gateway, settings = self.gateway, self.settings
        if settings.metrics_port is not None:
            port = gateway.metrics.serve(settings.metrics_host, settings.metrics_port)
            gateway.metrics_address = join(settings.metrics_host, port)
        client_ca = None
        if (authority := self.certificate.issues) is not None:
            client_ca = authority.pair.certificate
        gateway.address = gateway.enrol_address = await self._listen(
            settings.port, handlers(self.service), client_ca
        )
        if settings.enrol_port is not None:
            only = handlers(self.service, only_enrolment=True)
            gateway.enrol_address = await self._listen(settings.enrol_port, only, None)
        self._control = ControlServer(gateway)
        await self._control.open()
        self.certificate.warn()
        event("gateway serves", address=gateway.address, tls=settings.tls)

    async def until_stopped(self) -> None:
        """Serve until `stop` is called, then close."""
        assert self._stop is not None
        upkeep = asyncio.create_task(self._upkeep())
        grace_s = await self._stop
        upkeep.cancel()
        await self.close(grace_s)

    def stop(self, grace_s: float) -> None:
        """Begin to stop. From the loop only."""
        if self._stop is not None and not self._stop.done():
            self._stop.set_result(grace_s)

    async def close(self, grace_s: float) -> None:
        """Let go of check-ins, let uploads finish within `grace_s`, break off the round."""
        self.desk.drain()
        for _, health in self._servers:
            await health.enter_graceful_shutdown()
        await asyncio.gather(*[made.stop(grace_s) for made, _ in self._servers])
        if self.desk.round is not None:
            self.desk.round.fail(RunError("the gateway was stopped"))
        await self.desk.idle(LAST_S)
        if self._control is not None:
            await self._control.close()
        self.desk.worker.shutdown(wait=True)
        self._write_seen()
        event("gateway stopped")

    def shut_out(self, device: int) -> None:
        """End the sessions of a revoked device and whatever it has open."""
        self.service.sessions.close(device)
        self.desk.shut_out(device)
        event("device revoked", device=device)

    async def shut_out_revoked(self) -> None:
        """End what devices have open that were revoked in the registry itself, past this gateway:
        by an operator who may not use its socket."""
        with suppress(sqlite3.Error):  # a busy or full disk: at the next time
            revoked = await asyncio.to_thread(self.registry.revoked)
            for device in revoked & self.service.sessions.devices():
                self.shut_out(device)

    def status(self) -> dict[str, Any]:
        """What only the loop knows."""
        return self.desk.status() | {"sessions": len(self.service.sessions)}

    async def _listen(
        self, port: int, handler: grpc.GenericRpcHandler, client_ca: bytes | None
    ) -> str:
        made, health = server(self.settings, [handler], NAME)
        await health.set(NAME, SERVING)
        secure, certificate = None, self.certificate
        if certificate.pair is not None:
            secure = credentials(certificate.served, client_ca)
        bound = listen(made, self.settings.host, port, secure)
        await made.start()
        self._servers.append((made, health))
        return join(self.settings.host, bound)

    async def _upkeep(self) -> None:
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(UPKEEP_S)
            self.service.sessions.prune()
            await asyncio.to_thread(self._write_seen)
            await self.shut_out_revoked()
            if time.monotonic() - renewed > RENEWAL_S:
                renewed = time.monotonic()
                await asyncio.to_thread(self.certificate.renew)
                self.certificate.warn()

    def _write_seen(self) -> None:
        with suppress(Exception):  # a full disk does not stop a gateway that only notes times
            self.registry.seen(dict(self.desk.seen))

    def _follow(self) -> None:
        metrics = self.gateway.metrics
        metrics.follow(metrics.connected, self.desk.connected)
        metrics.follow(metrics.enrolled, lambda: self.registry.counts()["enrolled"])
        metrics.follow(metrics.sessions, lambda: len(self.service.sessions))


def _hosts(settings: GatewaySettings) -> list[str]:
    """Names under which devices may reach the gateway, for its certificate."""
    names = [*settings.host_names]
    if settings.host.strip("[]") not in ("0.0.0.0", "::"):
        names.insert(0, settings.host)
    else:
        names.append(socket.gethostname())
    if is_loopback(settings.host) or not settings.host_names:
        names += ["localhost", "127.0.0.1", "::1"]
    return list(dict.fromkeys(names))
