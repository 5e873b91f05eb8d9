"""Where devices and the coordinator meet: the run, its round, and check-ins that are being held.

Everything here happens in the gateway's event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sottovoce.client.errors import RunError
from sottovoce.client.protocol.device_pb2 import Task
from sottovoce.server.gateway.blobs import Versions
from sottovoce.server.gateway.logs import event
from sottovoce.server.gateway.metrics import Metrics
from sottovoce.server.gateway.orders import RoundOrder, RoundResult
from sottovoce.server.gateway.registry import Registry
from sottovoce.server.gateway.rounds import OPEN, DeviceTask, Outcomes, Round
from sottovoce.server.gateway.settings import GatewaySettings


@dataclass(frozen=True)
class Decided:
    """A task that needs no update any more. `state`: see rounds.py; "late" where it was none."""

    state: str
    reason: str = ""


LATE = Decided("late")


class Desk:
    """One gateway's run and round."""

    def __init__(self, settings: GatewaySettings, registry: Registry, metrics: Metrics) -> None:
        self.settings, self.registry, self.metrics = settings, registry, metrics
        self.run = ""
        self.round: Round | None = None
        self.draining = False
        self.seen: dict[int, float] = {}
        self._busy = False
        self._outcomes = Outcomes()
        self._versions = Versions()
        self._levels: dict[int, int] = {}
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._jitter = random.SystemRandom()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="gateway-sum")

    def announce(self, run: str) -> None:
        """Serve `run` from now on; RunError while a round of another one is open."""
        if run == self.run:
            return
        if self._busy:
            raise RunError(f"run {self.run!r} has an open round: {run!r} has to wait for its end")
        self.run, self._versions, self._levels = run, Versions(), {}
        event("run announced", run=run)
        self._wake_all()

    def finish(self, run: str) -> None:
        """Serve no run any more; nothing where another one is served."""
        if run == self.run and not self._busy:
            event("run finished", run=run)
            self.run, self._versions, self._levels = "", Versions(), {}
            self._wake_all()

    async def train(self, order: RoundOrder) -> RoundResult:
        """One round, from its tasks to its sums. RunError where it cannot be or was broken off."""
        if self.draining:
            raise RunError("the gateway is stopping")
        if order.run != self.run:
            raise RunError(f"run {order.run!r} is not announced: the gateway serves {self.run!r}")
        if self._busy:
            raise RunError(f"run {order.run!r} has an open round: one at a time")
        self._busy, started = True, time.monotonic()
        try:
            result = await self._train(order)
        except BaseException:
            self.metrics.rounds.labels("broken off").inc()
            raise
        finally:
            self._busy = False
        seconds = time.monotonic() - started
        self.metrics.ended(result, len(order.devices), seconds)
        event(
            "round ended", run=order.run, round=order.round, asked=len(order.devices),
            accepted=result.accepted, declined=result.declined, late=result.late,
            silent=result.silent, refused=sum(result.refused.values()), seconds=round(seconds, 3),
        )  # fmt: skip
        return result

    async def _train(self, order: RoundOrder) -> RoundResult:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.worker, order.check)
        download = await loop.run_in_executor(
            self.worker, self._versions.next, order.spec, order.parameters, order.download_encoding
        )
        if self.draining:
            raise RunError("the gateway is stopping")
        current = Round(order, download, self.worker, self.settings.max_downloads)
        self.round = current
        event("round started", run=order.run, round=order.round, asked=len(current.tasks))
        try:
            for device in current.of_device:
                self._wake(device)
            return await current.ended()
        finally:
            self.round = None
            self._outcomes.keep(current)

    def offer(self, device: int) -> Task | None:
        """The open task of `device`, if it has one."""
        return None if self.round is None or self.draining else self.round.message(device)

    def find(self, task_id: str, device: int) -> tuple[Round, DeviceTask] | Decided:
        """The open task of `device` by its id, or why there is none."""
        if self.round is not None and (task := self.round.tasks.get(task_id)) is not None:
            if task.device != device:
                return LATE
            if task.state != OPEN:
                return Decided(task.state, task.reason)
            return LATE if self.round.closed else (self.round, task)
        found = self._outcomes.find(task_id, device)
        return LATE if found is None else Decided(*found)

    async def declare(self, device: int, level: int) -> None:
        """Note the level of `device` for the run that is served; the first one holds."""
        if device not in self._levels:
            run = self.run
            held = await asyncio.to_thread(self.registry.declare, run, device, level)
            if run == self.run:
                self._levels[device] = held

    async def changed(self, device: int, seconds: float) -> bool:
        """Hold a check-in until there may be news for `device`, `seconds` at most.

        False where the device checked in again meanwhile: this call is then of no use to it.
        """
        self.release(device, stays=False)
        waiting: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[device] = waiting
        try:
            async with asyncio.timeout(seconds):
                return await waiting
        except TimeoutError:
            return True
        finally:
            if self._waiting.get(device) is waiting:
                del self._waiting[device]

    def release(self, device: int, stays: bool = True) -> None:
        """Let go of a held check-in. `stays`: whether it is still the device's last one."""
        waiting = self._waiting.pop(device, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(stays)

    def shut_out(self, device: int) -> None:
        """End what a revoked device has open."""
        self.release(device, stays=False)
        if self.round is not None:
            self.round.drop(device)

    def drain(self) -> None:
        """Held check-ins are told to come back; there are no new tasks."""
        self.draining = True
        self._wake_all()

    async def idle(self, seconds: float) -> None:
        """Wait until no round is open, `seconds` at most."""
        end = time.monotonic() + seconds
        while self._busy and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def come_back_ms(self) -> int:
        """When a device without a task is to check in again: 0.5 to 1.5 times the setting."""
        return int(1000 * self.settings.come_back_s * self._jitter.uniform(0.5, 1.5))

    def connected(self) -> int:
        """Devices that were heard of within two long waits."""
        since = time.time() - 2 * (self.settings.hold_s + self.settings.come_back_s)
        return sum(when >= since for when in list(self.seen.values()))

    def status(self) -> dict[str, Any]:
        """The run and its round, for the operator."""
        current = self.round
        counts = None if current is None else {"round": current.order.round} | current.counts()
        return {
            "run": self.run, "round": counts, "connected": self.connected(),
            "waiting": len(self._waiting), "declared": len(self.registry.roster(self.run)),
        }  # fmt: skip

    def _wake(self, device: int) -> None:
        self.release(device)

    def _wake_all(self) -> None:
        for device in list(self._waiting):
            self.release(device)
