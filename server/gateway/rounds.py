"""A round: tasks for exactly the devices that were asked, each counted once or not at all.

A task goes open -> (accepted | declined | refused | gone), by one step of the event loop, and never
back; gone is that of a device which was revoked.
Updates are read and added by one worker thread, so the sum has one writer; a single update is freed
as soon as it is in. The round ends at its deadline, whoever is still connected: what is being added
then is waited for, everything later is late.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from sottovoce.client.errors import RunError
from sottovoce.client.protocol.device_pb2 import Task, UploadHead
from sottovoce.server.gateway.blobs import Blob, Download
from sottovoce.server.gateway.orders import RoundOrder, RoundResult
from sottovoce.server.gateway.validation import Expected, Refused

MAX_STREAMS = 4
"""Of a task at once. One more ends the oldest: its device has lost that connection."""

OPEN, ACCEPTED, DECLINED, REFUSED = "open", "accepted", "declined", "refused"
GONE = "gone"


@dataclass
class DeviceTask:
    """One device's task. `taken`: whether it was handed over. `reason`: of a refusal.

    `adding`: set while an update of it is being read into the sum.
    """

    id: str
    device: int
    number: int
    level: int
    state: str = OPEN
    taken: bool = False
    reason: str = ""
    bytes_left: int = 0
    adding: asyncio.Future[None] | None = None
    streams: list[asyncio.Timeout] = field(default_factory=list)


class Round:
    """A round in progress. Lives in the gateway's event loop; `executor` has one thread."""

    def __init__(
        self, order: RoundOrder, download: Download, executor: Executor, max_downloads: int
    ) -> None:
        self.order, self.download, self.executor = order, download, executor
        shapes = {name: tuple(tensor.shape) for name, tensor in order.parameters.items()}
        self.expected = Expected(shapes, order.upload_encoding)
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()
        }
        asked = zip(order.devices.tolist(), order.numbers, order.levels.tolist(), strict=True)
        self.tasks: dict[str, DeviceTask] = {}
        self.of_device: dict[int, DeviceTask] = {}
        for device, number, level in asked:
            task = DeviceTask(secrets.token_hex(16), device, number, level)
            task.bytes_left = max_downloads * download.total_bytes
            self.tasks[task.id] = self.of_device[device] = task
        self.result = RoundResult(self.sums)
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self.deadline = self._loop.time() + order.deadline_s
        self._left = len(self.tasks)
        self._over = asyncio.Event()
        self._failure: BaseException | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._end_if_complete()

    def message(self, device: int) -> Task | None:
        """The task to hand to `device` now: its own, if that is still open."""
        task = self.of_device.get(device)
        if task is None or task.state != OPEN or self.closed:
            return None
        task.taken = True
        left = max(0.0, self.deadline - self._loop.time())
        return Task(
            id=task.id,
            run=self.order.run,
            round=self.order.round,
            number=task.number,
            level=task.level,
            spec=self.download.spec,
            spec_bytes=len(self.order.spec),
            tensors=self.download.tensors,
            deadline_ms=min(int(left * 1000), 2**32 - 1),
            clips=self.order.clip_norm is not None,
            clip_norm=self.order.clip_norm or 0.0,
            upload_encoding=self.order.upload_encoding,
        )

    def blobs(self, task: DeviceTask, names: list[bytes]) -> list[Blob] | None:
        """The blobs that `task` names under `names`; None where it names another."""
        if any(name not in self.download.blobs for name in names):
            return None
        return [self.download.blobs[name] for name in dict.fromkeys(names)]

    @contextmanager
    def streaming(self, task: DeviceTask, stall_s: float) -> Iterator[asyncio.Timeout]:
        """A time limit for a stream of `task`, that ends with the round at the latest."""
        timeout = asyncio.timeout_at(self.next_limit(stall_s))
        task.streams.append(timeout)
        if len(task.streams) > MAX_STREAMS:  # the oldest is of a connection that was lost
            _expire(task.streams[0])
        try:
            yield timeout
        finally:
            task.streams.remove(timeout)

    def next_limit(self, stall_s: float) -> float:
        """Until when a stream may send its next part."""
        now = self._loop.time()
        return now if self.closed else min(now + stall_s, self.deadline)

    async def take_in(self, task: DeviceTask, head: UploadHead, data: bytearray) -> bool:
        """Add an update of `task` to the sum, unless another stream of it was first.

        Whether it was this one that decided on the task; `task.state` says how. An update that
        comes when the round has ended decides nothing.
        """
        if task.adding is not None:
            await asyncio.shield(task.adding)
            return False
        if task.state != OPEN or self.closed:
            return False
        task.adding = self._loop.create_future()
        names = [tensor.name for tensor in head.tensors]
        work = self._loop.run_in_executor(self.executor, self._add, names, data, task.level)
        settled = self._loop.create_task(self._settled(task, work, head.clipped))
        self._settling.add(settled)
        settled.add_done_callback(self._settling.discard)
        await asyncio.shield(settled)  # a device that hangs up now does not stop its update
        return True

    async def _settled(
        self, task: DeviceTask, work: asyncio.Future[str], clipped: bool
    ) -> None:
        assert task.adding is not None
        try:
            reason = await work
        except BaseException as error:  # the sum may hold a part of an update: it is lost
            self.fail(error)
            reason = "failed"
        if reason:
            self._refuse(task, reason)
        else:
            levels = self.result.accepted_by_level
            levels[task.level] = levels.get(task.level, 0) + 1
            self.result.clipped += int(clipped and self.order.counts_clipped)
            self._finish(task, ACCEPTED)
        task.adding.set_result(None)

    def _add(self, names: list[str], data: bytearray, level: int) -> str:
        """In the worker thread. The reason of a refusal, or nothing."""
        try:
            update = self.expected.read(names, data, self.order.norm_bounds.get(level))
        except Refused as refused:
            return refused.reason
        update.add_to(self.sums)
        return ""

    def refuse(self, task: DeviceTask, reason: str) -> bool:
        """The update of `task` is not valid, and there will be no other; whether that is news.

        Not while another one of it is being added, and not after the round.
        """
        if task.state != OPEN or task.adding is not None or self.closed:
            return False
        self._refuse(task, reason)
        return True

    def _refuse(self, task: DeviceTask, reason: str) -> None:
        task.reason = reason
        self.result.refused[reason] = self.result.refused.get(reason, 0) + 1
        self._finish(task, REFUSED)

    def decline(self, task: DeviceTask) -> bool:
        """The device will not do it; whether that is news. Not while its update is being added."""
        if task.state != OPEN or task.adding is not None or self.closed:
            return False
        self.result.declined += 1
        self._finish(task, DECLINED)
        return True

    def drop(self, device: int) -> None:
        """Expect nothing more of `device`, whose streams end, but what is being added."""
        task = self.of_device.get(device)
        if task is None or task.state != OPEN or task.adding is not None or self.closed:
            return
        self._break_off(task)
        self._finish(task, GONE)

    def fail(self, error: BaseException) -> None:
        """End the round without a result."""
        self._failure = self._failure or error
        self._over.set()

    async def ended(self) -> RoundResult:
        """Wait for the round's end and close it. RunError where it failed."""
        try:
            async with asyncio.timeout_at(self.deadline):
                await self._over.wait()
        except TimeoutError:
            pass
        finally:
            self.close()
        await asyncio.gather(*self._settling)
        if self._failure is not None:
            raise RunError(
                f"round {self.order.round} of run {self.order.run!r} was broken off: "
                f"{self._failure}"
            ) from self._failure
        without = [task for task in self.tasks.values() if task.state in (OPEN, GONE)]
        left = Counter(task.taken for task in without)
        self.result.late, self.result.silent = left[True], left[False]
        return replace(self.result)  # what streams still count is no part of it

    def close(self) -> None:
        """From now on everything is late; streams of the round end."""
        self.closed = True
        for task in self.tasks.values():
            self._break_off(task)

    @staticmethod
    def _break_off(task: DeviceTask) -> None:
        """End the streams of a task."""
        for timeout in task.streams:
            _expire(timeout)

    def outcomes(self) -> Iterator[DeviceTask]:
        """Tasks that were decided."""
        return (task for task in self.tasks.values() if task.state != OPEN)

    def counts(self) -> dict[str, int]:
        """How the round stands, for the operator."""
        states = Counter(task.state for task in self.tasks.values())
        taken = sum(task.taken for task in self.tasks.values())
        return {"asked": len(self.tasks), "taken": taken, **states}

    def _finish(self, task: DeviceTask, state: str) -> None:
        task.state = state
        self._left -= 1
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        enough = self.order.enough
        if self._left == 0 or (enough is not None and self.result.accepted >= enough):
            self._over.set()


def _expire(timeout: asyncio.Timeout) -> None:
    """Let a stream's limit pass now, unless it is past or was lifted."""
    if timeout.when() is not None and not timeout.expired():
        timeout.reschedule(0.0)


class Outcomes:
    """How tasks of earlier rounds ended, so that an update sent again gets the same answer.

    The last `limit` decided tasks. A task that is not here was late or never was one.
    """

    def __init__(self, limit: int = 50_000) -> None:
        self.limit = limit
        self._of: dict[str, tuple[int, str, str]] = {}

    def keep(self, ended: Round) -> None:
        """Remember the decided tasks of a round."""
        for task in ended.outcomes():
            self._of[task.id] = (task.device, task.state, task.reason)
        while len(self._of) > self.limit:
            del self._of[next(iter(self._of))]

    def find(self, task_id: str, device: int) -> tuple[str, str] | None:
        """(state, reason) of a task of `device`."""
        found = self._of.get(task_id)
        return found[1:] if found is not None and found[0] == device else None
