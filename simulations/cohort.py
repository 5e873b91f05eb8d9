"""From sampled devices to the tensors that a group of them trains on.

One call gathers the drawn examples of many devices at once; groups of K are then cut from it, each
with its own padding and its own cut-down embedding table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.batches import BatchPlan, draw_batches
from sottovoce.client.errors import ConfigError
from sottovoce.client.groups import GroupData
from sottovoce.client.tasks import Batch, Task
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.simulations.population import Population
from sottovoce.strategies.levels import activity_levels


@dataclass(frozen=True)
class Draw:
    """One device's local round: its level and the example numbers of each of its steps."""

    device: int
    level: int
    steps: list[NDArray[np.int64]]

    @property
    def rows(self) -> int:
        return sum(len(step) for step in self.steps)


@dataclass(frozen=True)
class Chunk:
    """Collated examples of several devices; device k owns rows `starts[k]:starts[k + 1]`."""

    draws: list[Draw]
    numbers: list[NDArray[np.int64]]
    batch: Batch
    starts: NDArray[np.int64]


def draw_cohort(
    population: Population,
    devices: NDArray[np.int64],
    plan: BatchPlan,
    server_round: int,
    source: NoiseSource,
    reported: NDArray[np.uint8] | None = None,
) -> list[Draw]:
    """Every device's batches of a round, most work first, so that groups are even.

    A device's batches depend on (source, round, device) only, not on its company. `reported`:
    (devices,) levels that draws are to bear in place of the true ones. ConfigError for Poisson
    batches, whose rate and steps are accounted by level: a report may be below the truth.
    """
    if reported is not None and plan.poisson:
        raise ConfigError(
            "reported levels cannot stand for true ones in Poisson batches: set "
            "strategy.level_epsilon=null"
        )
    activity = population.activity[devices]
    levels = activity_levels(activity) if reported is None else reported
    draws = []
    for device, level, count in zip(
        devices.tolist(), levels.tolist(), activity.tolist(), strict=True
    ):
        generator = source.generator("local batches", server_round, device)
        draws.append(Draw(device, level, draw_batches(plan, level, count, generator)))
    draws.sort(key=lambda draw: (-len(draw.steps), -draw.rows, draw.device))
    return draws


def chunks(population: Population, task: Task, draws: list[Draw], size: int) -> Iterator[Chunk]:
    """The draws in chunks of `size` devices, with their examples gathered and collated."""
    for start in range(0, len(draws), size):
        part = draws[start : start + size]
        numbers = [np.unique(np.concatenate(draw.steps)) for draw in part]
        ids = np.array([draw.device for draw in part], dtype=np.int64)
        examples = population.examples(ids, numbers)
        yield Chunk(part, numbers, with_null_row(task.collate(examples)), examples.device_offsets)


def with_null_row(batch: Batch) -> Batch:
    """The batch with one more row of zeros: nobody's, always given weight 0."""
    return {
        name: torch.cat([tensor, tensor.new_zeros((1, *tensor.shape[1:]))])
        for name, tensor in batch.items()
    }


def cut_group(
    chunk: Chunk, first: int, devices: int, table_input: str | None, vocabulary: int
) -> GroupData:
    """The data of devices `first:first + devices` of a chunk; short groups are padded."""
    draws = chunk.draws[first : first + devices]
    low, high = int(chunk.starts[first]), int(chunk.starts[first + len(draws)])
    batch = {name: torch.cat([t[low:high], t[-1:]]) for name, t in chunk.batch.items()}
    lengths = batch["lengths"].numpy()
    steps = np.zeros(devices, dtype=np.int64)
    steps[: len(draws)] = [len(draw.steps) for draw in draws]
    most = int(steps.max(initial=0))
    rows = [_step_rows(chunk, first, step, devices, lengths) for step in range(most)]
    touched, counts = np.zeros((devices, 1), dtype=np.int64), np.ones(devices, dtype=np.int64)
    if table_input is not None:
        owners = np.repeat(
            np.arange(len(draws)), np.diff(chunk.starts[first : first + len(draws) + 1])
        )
        batch[table_input], touched, counts = _cut_table(
            batch[table_input], owners, devices, vocabulary
        )
    return GroupData(batch, rows, touched, counts, steps)


def _step_rows(
    chunk: Chunk, first: int, step: int, devices: int, lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(K, B) rows of one step, shortest first; B is the largest batch among the devices."""
    found = []
    for k in range(first, min(first + devices, len(chunk.draws))):
        draw = chunk.draws[k]
        if step < len(draw.steps):
            at = np.searchsorted(chunk.numbers[k], draw.steps[step])
            row = at + (chunk.starts[k] - chunk.starts[first])
            found.append(row[np.argsort(lengths[row], kind="stable")])
        else:
            found.append(np.zeros(0, dtype=np.int64))
    width = max(len(row) for row in found)
    rows = np.full((devices, width), len(lengths) - 1, dtype=np.int64)
    for k, row in enumerate(found):
        rows[k, width - len(row) :] = row
    return rows


def _cut_table(
    tokens: Tensor, owners: NDArray[np.int64], devices: int, vocabulary: int
) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Tokens renumbered within each device's touched rows, those rows (K, U), and their counts."""
    keys = tokens[:-1].numpy() + owners[:, None] * vocabulary
    always = np.arange(devices) * vocabulary
    unique = np.unique(np.concatenate([keys.ravel(), always]))
    starts = np.searchsorted(unique, always)
    counts = np.diff(np.append(starts, len(unique)))
    touched = np.zeros((devices, int(counts.max())), dtype=np.int64)
    owner = np.repeat(np.arange(devices), counts)
    touched[owner, np.arange(len(unique)) - starts[owner]] = unique - owner * vocabulary
    renumbered = np.zeros(tuple(tokens.shape), dtype=np.int64)
    renumbered[:-1] = np.searchsorted(unique, keys) - starts[owners][:, None]
    return torch.from_numpy(renumbered), touched, counts
