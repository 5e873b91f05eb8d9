"""The gateway: real devices behind one object, for a coordinator's threads to call.

    gateway = Gateway(folder, GatewaySettings(host="0.0.0.0"))
    gateway.start()
    gateway.announce("2026-03-01")        devices declare their level for this run
    members = gateway.roster("2026-03-01")
    result = gateway.train(order)         blocks until the round is over
    gateway.stop()

The folder holds the registry, the certificates and the control socket; nothing of a round is in it.
A gateway that was killed starts again with every device and no session: devices open new ones, and
what they send for the lost round is late.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import fcntl
import os
import resource
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.server.gateway import logs
from sottovoce.server.gateway.certificates import Authority
from sottovoce.server.gateway.metrics import Metrics
from sottovoce.server.gateway.orders import Member as Member
from sottovoce.server.gateway.orders import RoundOrder as RoundOrder
from sottovoce.server.gateway.orders import RoundResult as RoundResult
from sottovoce.server.gateway.registry import DeviceRow, Registry
from sottovoce.server.gateway.running import Running, ServerCertificate
from sottovoce.server.gateway.settings import GatewaySettings as GatewaySettings

Answer = TypeVar("Answer")


class Gateway:
    """Serves devices from a thread of its own. Every method may be called from any thread.

    After `start`: `address` (HOST:PORT for devices), `enrol_address` (where they enrol: another
    one with mutual TLS), `metrics_address` (or None), `ca_file` (what devices are given to trust;
    None without TLS or with the operator's own certificate).
    """

    def __init__(self, folder: Path, settings: GatewaySettings) -> None:
        self.folder, self.settings = Path(folder), settings
        self.address = self.enrol_address = ""
        self.metrics_address: str | None = None
        self.ca_file: Path | None = None
        self.metrics = Metrics()
        self._privacy: dict[str, dict[str, float | None]] = {}
        self._lock_file: IO[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: Running | None = None
        self._stopping = threading.Lock()

    def start(self) -> None:
        """Open the folder and serve. ConfigError or RunError in one line where that fails."""
        if self._thread is not None:
            raise RunError(f"the gateway of {self.folder} has been started before")
        logs.set_up(self.settings.log_format)
        self._open_folder()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            _raise_file_limit(self.settings.max_calls)
            certificate = self._certificate()
            registry = Registry(self.folder / "registry.sqlite")
            self._running = Running(self, registry, certificate)
            self._thread = threading.Thread(
                target=self._serve, args=(self._running, ready), name="gateway", daemon=True
            )
            self._thread.start()
            ready.result()
        except BaseException:
            self._release()
            raise

    def stop(self, grace_s: float | None = None) -> None:
        """Stop serving: held check-ins come back later, uploads get `grace_s` to finish.

        An open round is broken off. Stopping a gateway that does not serve does nothing.
        """
        with self._stopping:
            if self._loop is None or self._running is None:
                return
            grace = self.settings.grace_s if grace_s is None else grace_s
            with suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._running.stop, grace)
            if self._thread is not None:
                self._thread.join()
            self._release()

    def announce(self, run: str) -> None:
        """Serve `run` from now on: devices that check in declare their level for it, once."""
        self._in_loop(lambda: self._open.desk.announce(run))

    def roster(self, run: str) -> list[Member]:
        """The devices that have declared a level for `run` so far, by number."""
        return self._open.registry.roster(run)

    def train(self, order: RoundOrder) -> RoundResult:
        """Offer a round's tasks to exactly its devices; what came of it, at its end.

        Blocks for `order.deadline_s` at most, and as long as updates in hand take to be added.
        RunError where the round cannot be, or the gateway stops.
        """
        return self._wait(self._open.desk.train(order))

    def finish(self, run: str) -> None:
        """Serve `run` no longer; devices check in now and then."""
        self._in_loop(lambda: self._open.desk.finish(run))

    def status(self) -> dict[str, Any]:
        """How things stand, as values that JSON can hold."""
        running = self._open
        here = {
            "name": self.settings.name,
            "address": self.address,
            "enrol_address": self.enrol_address,
            "metrics_address": self.metrics_address,
            "ca": None if self.ca_file is None else str(self.ca_file),
            "certificate_days_left": running.certificate.days_left,
            "uptime_s": round(time.time() - running.started, 1),
            "privacy": {unit: dict(noted) for unit, noted in self._privacy.items()},
        }
        return here | running.registry.counts() | self._in_loop(running.status)

    def devices(self) -> list[DeviceRow]:
        """Every device that ever enrolled, by time."""
        return list(self._open.registry.devices())

    def tokens(self, number: int = 1, lifetime_s: float = 86400.0) -> list[str]:
        """New one-time tokens for enrolment, each good for `lifetime_s`."""
        if not 0 < number <= 100_000 or not 0 < lifetime_s <= 366 * 86400:
            raise ConfigError(
                f"tokens={number} lifetime_s={lifetime_s:g}: ask for 1 to 100000 tokens that last "
                "up to a year"
            )
        return self._open.registry.make_tokens(number, lifetime_s)

    def revoke(self, device: int) -> bool:
        """Shut a device out for good, at once; whether it was in."""
        running = self._open
        revoked = running.registry.revoke(device)
        self._in_loop(lambda: running.shut_out(device))
        return revoked

    def note_privacy(self, unit: str, spent: float, budget: float | None) -> None:
        """What the coordinator has spent of its budget (None: it has none), for operators."""
        self._privacy[unit] = {"spent": spent, "budget": budget}
        self.metrics.note_privacy(unit, spent, budget)

    @property
    def _open(self) -> Running:
        if self._loop is None or self._running is None:
            raise RunError(f"the gateway of {self.folder} does not serve: start it first")
        return self._running

    def _in_loop(self, call: Callable[[], Answer]) -> Answer:
        async def run() -> Answer:
            return call()

        return self._wait(run())

    def _wait(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The result of `work` in the gateway's loop; an interrupt here ends it there."""
        try:
            assert self._loop is not None
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:
            work.close()
            raise RunError("the gateway was stopped") from error
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise RunError("the gateway was stopped") from error
        except BaseException:
            future.cancel()
            raise

    def _serve(self, running: Running, ready: concurrent.futures.Future[None]) -> None:
        async def main() -> None:
            try:
                await running.open()
            except BaseException as error:
                ready.set_exception(error)
                await running.close(0)
                return
            self._loop = asyncio.get_running_loop()
            ready.set_result(None)
            await running.until_stopped()

        asyncio.run(main())
        self._loop = None

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = open(self.folder / "gateway.lock", "ab")
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise RunError(f"another gateway serves {self.folder}: stop it first") from error
        except OSError as error:
            raise RunError(
                f"gateway folder={self.folder} cannot be written ({error.strerror}): choose another"
            ) from error

    def _certificate(self) -> ServerCertificate:
        """The server's certificate, and the CA for devices' own where mutual TLS asks for one."""
        settings, authority = self.settings, None
        if settings.tls and (settings.certificate is None or settings.mutual_tls):
            folder = self.folder / "certificates"
            folder.mkdir(mode=0o700, exist_ok=True)
            authority = Authority(folder, settings.name)
            self.ca_file = authority.file if settings.certificate is None else None
        return ServerCertificate(settings, authority)

    def _release(self) -> None:
        if self._running is not None:
            self._running.registry.close()
            self._running = None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        self.metrics.close()


def _raise_file_limit(connections: int) -> None:
    """Allow as many open files as the connections may need, as far as this system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 1024
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if os.sysconf("SC_OPEN_MAX") < 1024:
        logs.event("few open files are allowed", limit=os.sysconf("SC_OPEN_MAX"))
