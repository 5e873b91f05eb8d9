"""From sampled devices to the tensors that a group of them trains on.

One call draws the batches of a whole cohort and one gathers the examples of many devices; groups of
K are then cut from them, each with its own padding and its own cut-down embedding table. Nothing
here is done device by device but making its `Draw`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.batch_draws import Visits, draw_visits
from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples
from sottovoce.client.groups import GroupData
from sottovoce.client.tasks import Batch, Task
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.strategies.levels import activity_levels

MARKED = 1 << 20  # cells of a table of all words of a group up to which it beats sorting

Ints = NDArray[np.int64]


class Holders(Protocol):
    """Devices and their examples: a population, or a real device that holds its own.

    `activity`: (devices,) examples of each. `examples`: as `Population.examples`.
    """

    @property
    def activity(self) -> NDArray[np.unsignedinteger[Any]]: ...

    def examples(self, devices: Ints, indices: Sequence[Ints] | None = None) -> Examples: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """One device's local round: its level and the example numbers of each of its steps."""

    device: int
    level: int
    steps: list[Ints]

    @property
    def rows(self) -> int:
        return sum(len(step) for step in self.steps)


@dataclass(frozen=True)
class Chunk:
    """Collated examples of several devices; device k owns rows `starts[k]:starts[k + 1]`.

    `numbers`: of the examples of each device, sorted, in the order of its rows. `visits`: every
    draw of a row, by device, step and length; those of device k are `of[k]:of[k + 1]`.
    """

    draws: list[Draw]
    numbers: list[Ints]
    batch: Batch
    starts: Ints
    visits: Visits
    of: Ints


def draw_cohort(
    population: Holders,
    devices: Ints,
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
    return draw_at(devices, levels, activity.astype(np.int64), plan, server_round, source)


def draw_at(
    devices: Ints,
    levels: NDArray[np.uint8],
    counts: Ints,
    plan: BatchPlan,
    server_round: int,
    source: NoiseSource,
) -> list[Draw]:
    """As `draw_cohort`, of devices that have `counts` (devices,) examples and stand at `levels`.

    Rates and steps of Poisson batches follow the level, whatever the count is.
    """
    key = source.key("local batches", server_round)
    visits, steps = draw_visits(plan, devices, levels, counts, key)
    batches = _batches(visits, steps)
    starts = np.append(0, np.cumsum(steps))
    rows = np.bincount(visits.owner, minlength=len(devices))
    order = np.lexsort((devices, -rows, -steps))
    ids, reports, ends = devices.tolist(), levels.tolist(), starts.tolist()
    return [Draw(ids[k], reports[k], batches[ends[k] : ends[k + 1]]) for k in order.tolist()]


def _batches(visits: Visits, steps: Ints) -> list[Ints]:
    """The example numbers of every step of every device, end to end."""
    first = np.append(0, np.cumsum(steps))[:-1]
    sizes = np.bincount(first[visits.owner] + visits.step, minlength=int(steps.sum()))
    ends = np.cumsum(sizes).tolist()
    return [visits.row[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def chunks(population: Holders, task: Task, draws: list[Draw], size: int) -> Iterator[Chunk]:
    """The draws in chunks of `size` devices, with their examples gathered and collated."""
    for start in range(0, len(draws), size):
        part = draws[start : start + size]
        owner, step, number = _flat(part)
        span = int(number.max(initial=0)) + 1
        keys, row = _different(owner * span + number)
        starts = np.searchsorted(keys, np.arange(len(part) + 1) * span)
        numbers = np.split(keys % span, starts[1:-1])
        ids = np.array([draw.device for draw in part], dtype=np.int64)
        batch = with_null_row(task.collate(population.examples(ids, numbers)))
        order = _sorted_by(owner, step, batch["lengths"].numpy()[row], row)
        visits = Visits(owner[order], step[order], row[order])
        of = np.searchsorted(visits.owner, np.arange(len(part) + 1))
        yield Chunk(part, numbers, batch, starts, visits, of)


def _sorted_by(*columns: Ints) -> Ints:
    """Order of the rows of `columns`, the first one counting most: all are 0 or more."""
    key, size = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        span = int(column.max(initial=0)) + 1
        key, size = key * span + column, size * span
    return np.argsort(key) if size < 1 << 62 else np.lexsort(columns[::-1])


def _different(keys: Ints) -> tuple[Ints, Ints]:
    """The different keys, sorted, and the place of each key among them."""
    order = np.argsort(keys)
    ordered = keys[order]
    first = np.ones(len(keys), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    row = np.empty(len(keys), dtype=np.int64)
    row[order] = np.cumsum(first) - 1
    return ordered[first], row


def _flat(draws: list[Draw]) -> tuple[Ints, Ints, Ints]:
    """Owner (place in `draws`), step and example number of every visit."""
    empty = np.zeros(0, dtype=np.int64)
    number = np.concatenate([empty, *chain.from_iterable(draw.steps for draw in draws)])
    sizes = np.array([len(step) for draw in draws for step in draw.steps], dtype=np.int64)
    counts = np.array([len(draw.steps) for draw in draws], dtype=np.int64)
    step = np.arange(len(sizes)) - np.repeat(np.cumsum(counts) - counts, counts)
    owner = np.repeat(np.arange(len(draws)), counts)
    return np.repeat(owner, sizes), np.repeat(step, sizes), number


def with_null_row(batch: Batch) -> Batch:
    """The batch with one more row of zeros: nobody's, always given weight 0."""
    return {
        name: torch.cat([tensor, tensor.new_zeros((1, *tensor.shape[1:]))])
        for name, tensor in batch.items()
    }


def cut_group(
    chunk: Chunk, first: int, devices: int, table_input: str | None, vocabulary: int
) -> GroupData:
    """The data of devices `first:first + devices` of a chunk, as many as there are."""
    draws = chunk.draws[first : first + devices]
    last, devices = first + len(draws), len(draws)
    low, high = int(chunk.starts[first]), int(chunk.starts[last])
    batch = {name: torch.cat([t[low:high], t[-1:]]) for name, t in chunk.batch.items()}
    steps = np.array([len(draw.steps) for draw in draws], dtype=np.int64)
    mine = slice(chunk.of[first], chunk.of[last])
    visits = Visits(
        chunk.visits.owner[mine] - first, chunk.visits.step[mine], chunk.visits.row[mine] - low
    )
    rows = _step_rows(visits, devices, int(steps.max(initial=0)), high - low)
    touched, counts = np.zeros((devices, 1), dtype=np.int64), np.ones(devices, dtype=np.int64)
    if table_input is not None:
        owners = np.repeat(np.arange(len(draws)), np.diff(chunk.starts[first : last + 1]))
        batch[table_input], touched, counts = _cut_table(
            batch[table_input], owners, devices, vocabulary
        )
    return GroupData(batch, rows, touched, counts, steps)


def _step_rows(visits: Visits, devices: int, steps: int, null: int) -> list[Ints]:
    """For each step (K, B) rows, shortest first; B is the largest batch among the devices."""
    cell = visits.owner * steps + visits.step  # ascending: visits come by device and step
    sizes = np.bincount(cell, minlength=devices * steps)
    widths = sizes.reshape(devices, steps).max(axis=0)
    widest = int(widths.max(initial=0))
    rows = np.full((steps, devices, widest), null, dtype=np.int64)
    ends = np.cumsum(sizes)
    column = widest - (ends[cell] - np.arange(len(cell)))
    rows[visits.step, visits.owner, column] = visits.row
    return [rows[s, :, widest - width :] for s, width in enumerate(widths.tolist())]


def _cut_table(
    tokens: Tensor, owners: Ints, devices: int, vocabulary: int
) -> tuple[Tensor, Ints, Ints]:
    """Tokens renumbered within each device's touched rows, those rows (K, U), and their counts."""
    keys = tokens[:-1].numpy() + (owners * vocabulary).reshape(-1, *[1] * (tokens.dim() - 1))
    unique, rank = _ranked(keys, np.arange(devices) * vocabulary, devices * vocabulary)
    starts = np.searchsorted(unique, np.arange(devices) * vocabulary)
    counts = np.diff(np.append(starts, len(unique)))
    touched = np.zeros((devices, int(counts.max())), dtype=np.int64)
    owner = np.repeat(np.arange(devices), counts)
    touched[owner, np.arange(len(unique)) - starts[owner]] = unique - owner * vocabulary
    renumbered = np.zeros(tuple(tokens.shape), dtype=np.int64)
    renumbered[:-1] = rank - starts[owners].reshape(-1, *[1] * (tokens.dim() - 1))
    return torch.from_numpy(renumbered), touched, counts


def _ranked(keys: Ints, always: Ints, cells: int) -> tuple[Ints, Ints]:
    """The different numbers among `keys` and `always`, all below `cells`, and each key's rank."""
    if cells > MARKED:
        unique = np.unique(np.concatenate([keys.ravel(), always]))
        return unique, np.searchsorted(unique, keys)
    marks = np.zeros(cells, dtype=bool)
    marks[keys] = marks[always] = True
    unique = np.flatnonzero(marks)
    ranks = np.empty(cells, dtype=np.int64)
    ranks[unique] = np.arange(len(unique))
    return unique, ranks[keys]
