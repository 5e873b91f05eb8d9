"""Worker processes of a simulated fleet: one thread each, alive from its first round to its last.

They are forked. Threads share the interpreter's lock, which models that take 0.1 ms a device hold
most of the time; a spawned process would import for three seconds, open the population again and
hold a copy of it. A fork takes hundredths of a second and shares every page that neither side
writes: population, frozen weights, libraries. What is hazardous about it, locks that another thread
held, is left alone: see `worker_process`. It is also what torch's own data loaders do.

Which worker trains a block changes nothing. A worker that is killed is replaced and its blocks are
trained again: what a device contributes depends on (round, device) alone, and nobody has seen the
lost sum. An error in a worker is raised here as it was there, and ends them all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.client.round_sum import Figures, Room, room_shapes
from sottovoce.simulations.blocks import Block
from sottovoce.simulations.shared_memory import shared_tensors
from sottovoce.simulations.worker_process import Emptied, Failure, Order, Partial, serve

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

    from sottovoce.simulations.fleet import SimulatedFleet

ROOMS = 2  # of a worker: it fills one while the other is read
DEATHS = 2  # of workers on one block, after which it is not tried again
SHARE = 2  # a worker gets this part of its fair share of what is left, so that all end together
PATIENCE_S = 5.0

Sums = Iterator[tuple[Figures, Room]]


@dataclass
class Worker:
    """A process, its pipe, where its sums lie, and the blocks whose sums are still to come."""

    process: ForkProcess
    connection: Connection
    rooms: list[Room]
    blocks: deque[Block] = field(default_factory=deque)


class Workers:
    """Processes that train blocks for `fleet`, up to `count`, started when there is work for them.

    `parameters`: as they will be sent, for names, shapes and types. `at_once`: most devices whose
    examples are gathered in one go.
    """

    def __init__(
        self, fleet: SimulatedFleet, parameters: dict[str, Tensor], count: int, at_once: int
    ) -> None:
        self.fleet, self.count, self.at_once = fleet, count, at_once
        self.layout = layout_of(parameters)
        self._given = shared_tensors(self.layout)
        shapes = room_shapes(fleet.model, fleet.training)
        self._room = {name: (shape, torch.float64) for name, shape in shapes.items()}
        self._workers: list[Worker] = []
        self._end = weakref.finalize(self, _end, self._workers, os.getpid())

    def train(
        self, parameters: dict[str, Tensor], blocks: list[Block], server_round: int
    ) -> Sums:
        """Each block's sum, in the order of the blocks; it is valid until the next is asked for.

        Raises what a worker raised; RunError where workers die over the same block again. Whatever
        ends a round early ends the workers: those of the next round are new ones.
        """
        for name, tensor in self._given.items():
            tensor.copy_(parameters[name])
        try:
            yield from self._round(blocks, server_round)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes at once; the next round starts new ones."""
        _kill(self._workers)

    def close(self) -> None:
        """End all processes, for good."""
        self._end()

    @property
    def processes(self) -> list[int]:
        """Ids of the running processes."""
        return [worker.process.pid or 0 for worker in self._workers]

    def _round(self, blocks: list[Block], server_round: int) -> Sums:
        queue, deaths = deque(blocks), Counter[int]()
        early: dict[int, tuple[Figures, Room]] = {}
        due = 0
        while len(self._workers) < min(self.count, len(blocks)):
            self._start()
        while due < len(blocks):
            self._hand_out(queue, server_round)
            for worker, told in self._heard():
                if told is None:
                    queue.extendleft(reversed(self._bury(worker, deaths)))
                    self._start()
                    continue
                worker.blocks.popleft()
                if told.number == due:
                    yield told.figures, worker.rooms[told.room]
                    due += 1
                else:
                    copy = {n: t.clone() for n, t in worker.rooms[told.room].items()}
                    early[told.number] = told.figures, copy
                self._send(worker, Emptied(told.room))
                while due in early:
                    yield early.pop(due)
                    due += 1

    def _hand_out(self, queue: deque[Block], server_round: int) -> None:
        """Blocks for every worker without any: by turns, so that sums come about in order."""
        idle = [worker for worker in self._workers if not worker.blocks]
        if not queue or not idle:
            return
        each = max(1, len(queue) // (SHARE * len(self._workers)))
        each = min(each, max(1, self.at_once // len(queue[0])))
        hand = [queue.popleft() for _ in range(min(len(queue), each * len(idle)))]
        for place, worker in enumerate(idle):
            worker.blocks.extend(hand[place :: len(idle)])
            if worker.blocks:
                order = Order(server_round, self.fleet.training, list(worker.blocks))
                self._send(worker, order)

    def _heard(self) -> list[tuple[Worker, Partial | None]]:
        """What workers have to say, after waiting for one of them; None: it has died."""
        by_connection = {worker.connection: worker for worker in self._workers}
        found: list[tuple[Worker, Partial | None]] = []
        for ready in wait(list(by_connection)):
            assert isinstance(ready, Connection)
            worker = by_connection[ready]
            try:
                told = ready.recv()
            except (EOFError, OSError):
                found.append((worker, None))
                continue
            if isinstance(told, Failure):
                told.error.add_note(f"in a worker process:\n{told.trace}")
                raise told.error
            if self.fleet.size.chosen is None:
                self.fleet.size.chosen = told.chosen
            found.append((worker, told))
        return found

    def _bury(self, worker: Worker, deaths: Counter[int]) -> list[Block]:
        """Clear a dead worker away; the blocks that it owed."""
        self._workers.remove(worker)
        _kill([worker])
        lost = list(worker.blocks)
        if lost:
            deaths[lost[0].number] += 1
            if deaths[lost[0].number] >= DEATHS:
                raise RunError(
                    f"run.workers={self.count}: worker processes died twice over the same "
                    f"{len(lost[0])} devices ({cause(worker.process.exitcode)}); if memory ran "
                    "out, set run.workers lower; the run can be resumed"
                )
        return lost

    def _send(self, worker: Worker, message: Order | Emptied) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            pass  # it has died: its pipe says so when it is read

    def _start(self) -> None:
        """Fork one more worker."""
        ours, theirs = multiprocessing.Pipe()
        rooms = [shared_tensors(self._room) for _ in range(ROOMS)]
        process = multiprocessing.get_context("fork").Process(
            target=serve,
            args=(self.fleet, theirs, self._given, rooms, os.getpid()),
            daemon=True,
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:  # a Ctrl-C now is the parent's alone
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._workers.append(Worker(process, ours, rooms))


def layout_of(parameters: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each parameter."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in parameters.items()}


def cause(exit_code: int | None) -> str:
    """What an exit code says of a death."""
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return f"killed by {signal.Signals(-exit_code).name}"


def private_kb() -> int:
    """Memory that this process' workers share with nobody, in KB; 0 where /proc does not say."""
    found = 0
    for child in multiprocessing.active_children():
        try:
            lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        found += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return found


def _kill(workers: list[Worker]) -> None:
    """End `workers` and empty the list; they hold nothing that would be lost."""
    for worker in workers:
        worker.process.kill()
        worker.connection.close()
    for worker in workers:
        worker.process.join(PATIENCE_S)
    workers.clear()


def _end(workers: list[Worker], owner: int) -> None:
    if os.getpid() == owner:  # and not a process forked from it
        _kill(workers)
