"""What runs in a worker process: blocks in, partial sums out, until the parent is gone.

The process was forked, so it has the fleet: population, task, model and randomness, none of it
copied. Parameters and sums pass through shared memory, everything else is a few hundred bytes in a
pipe. Nothing that other threads of the parent may have held when it forked is used here: no
console, no logging, no Flower.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.round_sum import Figures, Room
from sottovoce.simulations.blocks import Block
from sottovoce.simulations.group_size import Way

if TYPE_CHECKING:
    from sottovoce.simulations.fleet import SimulatedFleet

LOOK_EVERY_S = 0.5  # whether the parent is alive; a busy worker reads no pipe


@dataclass(frozen=True)
class Order:
    """Blocks to train in one go. `training`: as it is now, for a clip norm may have moved."""

    server_round: int
    training: LocalTraining
    blocks: list[Block]


@dataclass(frozen=True)
class Emptied:
    """The parent has read a room."""

    room: int


@dataclass(frozen=True)
class Partial:
    """A block's sum lies in a room. `chosen`: how groups train, once the worker knows."""

    number: int
    room: int
    figures: Figures
    chosen: Way | None


@dataclass(frozen=True)
class Failure:
    """A worker's error, and where it was raised, as text."""

    error: Exception
    trace: str


def serve(
    fleet: SimulatedFleet,
    connection: Connection,
    parameters: dict[str, Tensor],
    rooms: list[Room],
    parent: int,
) -> None:
    """Train what process `parent` orders over `connection`, from `parameters` into `rooms`."""
    _settle(parent)
    try:
        while True:
            order = connection.recv()
            assert isinstance(order, Order)
            _obey(fleet, connection, parameters, rooms, order)
    except (EOFError, OSError):
        return  # the parent has closed its end, or is gone


def _settle(parent: int) -> None:
    """Cut what ties a forked process to its parent's terminal, signals and pages."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # autograd would start threads for them
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the round
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    gc.freeze()  # a collection would write to, and so copy, the pages that are shared
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after `parent`, even in the middle of a block."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os._exit(1)


def _obey(
    fleet: SimulatedFleet,
    connection: Connection,
    parameters: dict[str, Tensor],
    rooms: list[Room],
    order: Order,
) -> None:
    free = list(range(len(rooms)))
    used: list[int] = []

    def next_room() -> Room:
        if not free:
            free.append(_emptied(connection))
        used.append(free.pop(0))
        return rooms[used[-1]]

    try:
        fleet.training = order.training
        given = {name: tensor.detach() for name, tensor in parameters.items()}
        sums = fleet.train_blocks(given, order.blocks, order.server_round, next_room)
        for block, total in zip(order.blocks, sums, strict=True):
            chosen = fleet.size.chosen
            connection.send(Partial(block.number, used[-1], total.figures, chosen))
        for _ in range(len(rooms) - len(free)):
            _emptied(connection)
    except (EOFError, BrokenPipeError):
        raise
    except Exception as error:
        connection.send(Failure(_portable(error), traceback.format_exc()))


def _emptied(connection: Connection) -> int:
    """Wait until the parent has read a room."""
    told = connection.recv()
    assert isinstance(told, Emptied)
    return told.room


def _portable(error: Exception) -> Exception:
    """The error if it survives a pipe, else its text as a RunError."""
    try:
        restored = pickle.loads(pickle.dumps(error))
        if type(restored) is type(error) and str(restored) == str(error):
            return error
    except Exception:  # whatever an error's own code may raise
        pass
    return RunError(f"{type(error).__name__}: {error}")
