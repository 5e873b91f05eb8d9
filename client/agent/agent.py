"""The device agent: waits for its conditions, checks in, works, hands over, and starts again.

    eligible? -> check in (held by the gateway) -> declare a level, once for a run
              -> task -> policy and budget -> download -> train
              -> journal -> spool -> upload -> receipt

It may be killed at any instruction (`TaskWork`). Times are the monotonic clock's, so a clock that
jumps moves nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sottovoce.client.agent.backoff import Backoff
from sottovoce.client.agent.blob_cache import BlobCache
from sottovoce.client.agent.connection import (
    Connection,
    NoLongerKnown,
    NotKnown,
    OtherProtocol,
    Refused,
    Unreachable,
)
from sottovoce.client.agent.eligibility import Conditions, Probes, machine
from sottovoce.client.agent.identity import Identity
from sottovoce.client.agent.journal import Journal
from sottovoce.client.agent.logs import say
from sottovoce.client.agent.machine import free_memory_mb
from sottovoce.client.agent.policy import Policy
from sottovoce.client.agent.preparation import Preparation
from sottovoce.client.agent.store import DeviceStore
from sottovoce.client.agent.task_work import TaskWork, TrainFunction
from sottovoce.client.agent.threads import in_thread
from sottovoce.client.agent.work import train_task
from sottovoce.client.errors import RunError
from sottovoce.client.protocol import device_pb2 as messages
from sottovoce.client.wire import ENCODINGS
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.strategies.levels import MAX_LEVEL

LONGEST_RUN = 200  # characters of a run's name


@dataclass(frozen=True)
class Pace:
    """How often an agent does what, in seconds. None of it changes what it does.

    `wait_s`: that a gateway may hold a check-in. `again_s`: until the next look at conditions, or
    for examples. `most_s`: longest wait, whatever a gateway says. `purge_s`: between deletions of
    old examples. `transfer_s`: for a download or an upload without a deadline. `backoff_s`,
    `most_backoff_s`: after the first failure, and at most. `grace_s`: for an upload at the end.
    `pause_s`: after a task that was not done.
    """

    wait_s: float = 60.0
    again_s: float = 60.0
    most_s: float = 3600.0
    purge_s: float = 3600.0
    transfer_s: float = 3600.0
    backoff_s: float = 1.0
    most_backoff_s: float = 300.0
    grace_s: float = 10.0
    pause_s: float = 1.0


class Agent:
    """One device; thousands can live in one process.

    `credentials`: of the enrolled device. `train`: does the work of a task, in a thread of its own.
    `source`: coins and noise; None takes fresh ones from the operating system for every training,
    and anything else is for tests. `models`: folder of pretrained models. `memory_mb`: that
    training may take; None: what is free when a task comes. `clock`: monotonic seconds. `counts`:
    what became of tasks (`task_work.DONE`).
    """

    def __init__(
        self,
        address: str,
        store: DeviceStore,
        *,
        credentials: Identity,
        policy: Policy | None = None,
        journal: Journal | None = None,
        train: TrainFunction = train_task,
        source: NoiseSource | None = None,
        models: Path | None = None,
        memory_mb: float | None = None,
        threads: int = 1,
        probes: Probes | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.policy = Policy.load(store.folder) if policy is None else policy
        self.journal = Journal(store.folder) if journal is None else journal
        self.connection = Connection(credentials, address, clock)
        self.probes = machine() if probes is None else probes
        self.pace = pace or Pace()
        preparation = Preparation(
            self.connection, BlobCache(store.folder / "cache"), self.journal, self.policy,
            free_memory_mb if memory_mb is None else lambda: memory_mb,
        )  # fmt: skip
        self.tasks = TaskWork(
            store, self.journal, self.connection, preparation, self._unfit, train, source, models,
            transfer_s=self.pace.transfer_s, clock=clock,
        )  # fmt: skip
        self._clock, self._run, self._purged = clock, "", -math.inf
        self._backoff = Backoff(self.pace.backoff_s, self.pace.most_backoff_s)
        self._strangers = 0
        self._stopped = asyncio.Event()
        self._capabilities = messages.Capabilities(
            version=_version(), memory_mb=_roughly(preparation.memory_mb()), threads=threads,
            encodings=ENCODINGS,
        )  # fmt: skip

    @property
    def counts(self) -> Counter[str]:
        """What became of tasks."""
        return self.tasks.counts

    @property
    def training(self) -> bool:
        """Whether a thread is training."""
        return self.tasks.training

    def stop(self) -> None:
        """End `run` at its next step; call it in the loop's thread."""
        self._stopped.set()

    async def run(self, until: Callable[[Agent], bool] | None = None) -> None:
        """Take part until `until(self)`, which is asked after every step, or `stop`.

        Raises RunError where only a person can help: another protocol, a device that is no longer
        known, a journal that is damaged.
        """
        try:
            self.tasks.recover()
            while not self._stopped.is_set() and not (until and until(self)):
                wait_s = await self._unless_stopped(self._step())
                await self._wait(wait_s or 0.0)
        finally:
            await self.connection.close()

    async def _unless_stopped(self, step: Coroutine[Any, Any, float]) -> float | None:
        """What a step returns; None where `stop` came first. An upload may end within a while."""
        doing, stopping = asyncio.ensure_future(step), asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done() and self.tasks.delivering:
                await asyncio.wait({doing}, timeout=self.pace.grace_s)
            return doing.result() if doing.done() else None
        finally:
            stopping.cancel()
            doing.cancel()
            await asyncio.gather(doing, stopping, return_exceptions=True)

    async def _wait(self, seconds: float) -> None:
        """Wait, or until `stop`; always let others have a turn."""
        try:
            await asyncio.wait_for(self._stopped.wait(), max(seconds, 0.0) or 1e-4)
        except TimeoutError:
            return

    # -- one step ----------------------------------------------------------------------------------

    async def _step(self) -> float:
        """Do the next thing; how long to wait then, in seconds."""
        try:
            wait_s = await self._next()
        except NotKnown as error:
            self._strangers += 1
            if self._strangers >= 5:
                raise NoLongerKnown(
                    f"{self.connection.address} does not know this device any more ({error}): if "
                    "it was not revoked on purpose, join with a new token"
                ) from None
            return self._later("not known", error)
        except (Unreachable, Refused) as error:
            return self._later("unreachable", error)
        except (OtherProtocol, NoLongerKnown):
            raise
        except (RunError, OSError) as error:  # a full disk, a database in use: it may pass
            return self._later("trouble", error)
        self._backoff.reset()
        self._strangers = 0
        return wait_s

    def _later(self, event: str, error: Exception) -> float:
        wait_s = self._backoff.next_s()
        say(event, why=str(error)[:200], again_s=round(wait_s, 1))
        return wait_s

    async def _next(self) -> float:
        for spooled in self.tasks.spool.pending():
            await self.tasks.deliver(spooled, self.pace.transfer_s)
            return 0.0
        self._purge()
        reason = await self._unfit()
        if reason is not None:
            say("waiting", why=reason)
            return self._backoff.jittered_s(self.pace.again_s)
        reply = await self.connection.check_in(self._check_in_request())
        if reply.HasField("task"):
            handed_over = await self.tasks.take(reply.task)
            return 0.0 if handed_over else self._backoff.jittered_s(self.pace.pause_s)
        if reply.declare and self._declare(reply.run):
            return 0.0
        asked_s = reply.come_back_ms / 1000 if reply.come_back_ms else self.pace.again_s
        return self._backoff.jittered_s(min(asked_s, self.pace.most_s))

    async def _unfit(self) -> str | None:
        """Why the device may not work now, or None. A probe may be a program that takes a while."""
        conditions = self.policy.eligibility
        if conditions == Conditions():
            return None
        return await in_thread(lambda: conditions.eligible(time.time(), self.probes))

    def _check_in_request(self) -> messages.CheckInRequest:
        declared = self.journal.declared(self._run) if self._run else None
        return messages.CheckInRequest(
            run=self._run if declared else "",
            level=declared.level if declared else 0,
            capabilities=self._capabilities,
            wait_ms=int(self.pace.wait_s * 1000),
        )

    def _declare(self, run: str) -> bool:
        """Fix level and snapshot for a run, once; False where there is nothing to declare."""
        if not run or len(run) > LONGEST_RUN:
            return False
        if self.journal.declared(run) is None:
            snapshot = self.store.last_id()
            usable = self.store.count(snapshot)
            if usable == 0:
                return False
            level = min(usable.bit_length() - 1, MAX_LEVEL)
            self.journal.declare(run, level, snapshot)
            say("declared", run=run, level=level)
        again = self._run != run
        self._run = run
        return again

    def _purge(self) -> None:
        """Delete old examples, from time to time."""
        if self._clock() - self._purged < self.pace.purge_s:
            return
        self._purged = self._clock()
        try:
            self.store.purge(time.time(), self.policy.retention_days)
        except RunError as error:
            say("not purged", why=str(error))


def _roughly(size: float) -> int:
    """The power of two below: how much memory a machine has left would tell it from others."""
    whole = int(size)
    return 1 << (whole.bit_length() - 1) if whole > 0 else 0


def _version() -> str:
    try:
        return version("sottovoce")
    except PackageNotFoundError:
        return "unknown"
