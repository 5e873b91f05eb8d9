"""A cohort in blocks: what is trained in one go and summed by itself.

Additions of floats depend on their order, so the order must not depend on who computes. Blocks are
cut from the cohort alone, whatever the number of workers; each gives a partial sum, and partial
sums are added in the order of the blocks. Busy devices come first: the work that is left at the end
of a round, which some worker does while others wait, is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sottovoce.client.batches import BatchPlan
from sottovoce.client.cohort import Draw
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.training import sparse_table
from sottovoce.strategies.levels import activity_levels

WANTED = 16  # blocks of a cohort, where they are not too small or too large
LEAST = 64  # devices of a block: below, its own costs (a gathering, a sum) would show
LEAST_HEAVY = 8  # where one device's arithmetic dwarfs those
LARGEST = 4  # times the least
HEAVY = 20  # weights met in a step (each at every position), for one weight that is summed


@dataclass(frozen=True)
class Block:
    """Devices that are summed together. `levels`: (devices,) reported ones, or None."""

    number: int
    devices: NDArray[np.int64]
    levels: NDArray[np.uint8] | None

    def __len__(self) -> int:
        return len(self.devices)


def expected_work(
    activity: NDArray[np.integer[Any]], plan: BatchPlan
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and expected rows of a round for devices with `activity` (devices,) examples."""
    counts, place = np.unique(activity.astype(np.int64), return_inverse=True)
    levels = activity_levels(counts)
    pairs = list(zip(levels.tolist(), counts.tolist(), strict=True))
    steps = np.array([plan.steps(level, count) for level, count in pairs], dtype=np.int64)
    if plan.poisson:
        rates = np.array([plan.rate(level) for level, _ in pairs])
        return steps[place], (steps * rates * counts)[place]
    rows = plan.local_epochs * np.minimum(counts, plan.max_examples)
    return steps[place], rows.astype(np.float64)[place]


def block_devices(cohort: int, group: int, *, heavy: bool) -> int:
    """Devices of a block: whole groups of `group`, or all of them but the last would be uneven."""
    least = LEAST_HEAVY if heavy else LEAST
    wanted = min(max(cohort // WANTED, least), LARGEST * least)
    return -(-wanted // group) * group


def cut_blocks(
    devices: NDArray[np.int64],
    levels: NDArray[np.uint8] | None,
    work: tuple[NDArray[np.int64], NDArray[np.float64]],
    size: int,
) -> list[Block]:
    """Blocks of `size` devices, most work first, so that groups within them are even.

    `work`: see `expected_work`. A device that was drawn twice stays in one block.
    """
    order = np.lexsort((devices, -work[1], -work[0]))
    ids = devices[order]
    edges = [0]
    while edges[-1] < len(ids):
        end = min(edges[-1] + size, len(ids))
        while end < len(ids) and ids[end] == ids[end - 1]:
            end += 1
        edges.append(end)
    reports: Callable[[int, int], NDArray[np.uint8] | None]
    reports = (lambda a, b: None) if levels is None else (lambda a, b: levels[order[a:b]])
    return [
        Block(number, ids[a:b], reports(a, b))
        for number, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    ]


def join(blocks: list[Block]) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None]:
    """Devices and reported levels of several blocks, end to end."""
    devices = np.concatenate([block.devices for block in blocks])
    reported = [block.levels for block in blocks if block.levels is not None]
    return devices, np.concatenate(reported) if reported else None


def by_block(draws: list[Draw], blocks: list[Block]) -> list[list[Draw]]:
    """The draws of each block's devices, in the order that they have among all."""
    place = {device: k for k, block in enumerate(blocks) for device in block.devices.tolist()}
    parts: list[list[Draw]] = [[] for _ in blocks]
    for draw in draws:
        parts[place[draw.device]].append(draw)
    return parts


def spans(blocks: list[Block], devices: int) -> Iterator[list[Block]]:
    """Blocks in turn, as many at once as have about `devices` in all."""
    each = max(1, devices // len(blocks[0])) if blocks else 1
    for start in range(0, len(blocks), each):
        yield blocks[start : start + each]


def heavy(model: nn.Module, training: LocalTraining, max_length: int) -> bool:
    """Whether a device's arithmetic dwarfs a sum of the model's size."""
    table = sparse_table(model, training)[0]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dense = sum(sizes.values()) - sizes.get(table or "", 0)
    return dense * training.plan.batch_size * max_length > HEAVY * trained


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in one thread: on small models, two that wait for each other are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
