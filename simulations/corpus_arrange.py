"""From chunks in file order to arrays in device order: an external merge sort.

Every chunk becomes a run, sorted by device in memory. Devices are then walked in pieces that fit,
each cut out of all runs, sorted and appended to the final arrays. Runs follow the files and sorting
is stable, so that a device's examples keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.examples import gather_ranges
from sottovoce.simulations.flat_arrays import Array, ArrayWriter, Bundle, write_bundle

MOST_BUCKETS = 512


@dataclass(frozen=True)
class Numbers:
    """How a chunk's own numbers read in the corpus: of its words, intents and tags.

    `device`: (rows,) number of each row's device, -1 for a row that is left out.
    """

    device: NDArray[np.int64]
    words: NDArray[np.int32]
    intents: NDArray[np.int32]
    tags: NDArray[np.int32]


@dataclass(frozen=True)
class Sizes:
    """(devices,) rows and tokens of each device."""

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]


def sort_chunk(chunk: Bundle, run: Path, numbers: Numbers) -> None:
    """Write a chunk as a run: rows by device, and per device where its rows and tokens end."""
    lengths = chunk.load("lengths")
    order = np.argsort(numbers.device, kind="stable")
    order = order[int((numbers.device < 0).sum()) :]
    positions, offsets = gather_ranges(np.append(0, np.cumsum(lengths, dtype=np.int64)), order)
    devices = numbers.device[order]
    ends = np.flatnonzero(np.append(devices[1:] != devices[:-1], len(devices) > 0)) + 1
    arrays = {
        "devices": devices[ends - 1],
        "row_ends": ends,
        "token_ends": offsets[ends],
        "lengths": lengths[order],
        "tokens": numbers.words[chunk.load("tokens")[positions]],
    }
    if "intent" in chunk:
        arrays["intent"] = numbers.intents[chunk.load("intent")[order]]
    if "slots" in chunk:
        arrays["slots"] = numbers.tags[chunk.load("slots")[positions]]
    write_bundle(run, arrays)


def device_sizes(runs: Sequence[Bundle], devices: int) -> Sizes:
    """Rows and tokens of every device, summed over the runs."""
    sizes = Sizes(np.zeros(devices, dtype=np.int64), np.zeros(devices, dtype=np.int64))
    for run in runs:
        here = run.load("devices")
        sizes.rows[here] += np.diff(run.load("row_ends"), prepend=0)
        sizes.tokens[here] += np.diff(run.load("token_ends"), prepend=0)
    return sizes


def merge_runs(
    runs: Sequence[Bundle],
    sizes: Sizes,
    folder: Path,
    prefix: str,
    bucket_bytes: int,
    report: Callable[[float], None],
) -> None:
    """Write `tokens`, `offsets`, `intent` and `slots` of all devices, names behind `prefix`."""
    labels = {name: "i4" for name in ("intent", "slots") if any(name in run for run in runs)}
    bounds = _bounds(sizes, bucket_bytes)
    cuts = [_cuts(run, bounds) for run in runs]
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ArrayWriter(folder, prefix + name, kind))
            for name, kind in {"tokens": "i4", "offsets": "i8", **labels}.items()
        }
        writers["offsets"].append(np.zeros(1, dtype=np.int64))
        for bucket in range(len(bounds) - 1):
            pieces = [
                _Piece(run, cut[:, bucket].tolist(), cut[:, bucket + 1].tolist())
                for run, cut in zip(runs, cuts, strict=True)
                if cut[0, bucket] < cut[0, bucket + 1]
            ]
            alone = bounds[bucket + 1] - bounds[bucket] == 1
            for together in [[piece] for piece in pieces] if alone else [pieces]:
                _append(together, writers)
            report((bucket + 1) / (len(bounds) - 1))


@dataclass(frozen=True)
class _Piece:
    """A part of a run: from and to which device of it, row and token."""

    run: Bundle
    start: list[int]
    stop: list[int]

    def devices(self) -> Array:
        """(rows,) device of each row."""
        rows = np.diff(self._load("row_ends", 0), prepend=self.start[1])
        return np.repeat(self._load("devices", 0), rows)

    def of_rows(self, name: str) -> Array:
        return self._load(name, 1)

    def of_tokens(self, name: str) -> Array:
        return self._load(name, 2)

    def _load(self, name: str, unit: int) -> Array:
        return self.run.load(name, self.start[unit], self.stop[unit])


def _append(pieces: Sequence[_Piece], writers: dict[str, ArrayWriter]) -> None:
    """Append the rows of some pieces, by device."""
    if not pieces:
        return
    lengths = np.concatenate([piece.of_rows("lengths") for piece in pieces])
    offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))
    order = np.argsort(np.concatenate([piece.devices() for piece in pieces]), kind="stable")
    positions, new = gather_ranges(offsets, order)
    writers["offsets"].append(writers["tokens"].count + new[1:])
    if "intent" in writers:
        writers["intent"].append(np.concatenate([p.of_rows("intent") for p in pieces])[order])
    for name in ("tokens", "slots"):
        if name in writers:
            values = np.concatenate([piece.of_tokens(name) for piece in pieces])
            writers[name].append(values[positions])


def _bounds(sizes: Sizes, bucket_bytes: int) -> NDArray[np.int64]:
    """Devices at which a new piece begins, and their number last: a device alone may be larger."""
    weight = np.cumsum(16 * sizes.rows + 8 * sizes.tokens)
    devices = len(weight)
    most = max(bucket_bytes, int(weight[-1]) // MOST_BUCKETS) if devices else bucket_bytes
    bounds, done = [0], 0
    while bounds[-1] < devices:
        stop = int(np.searchsorted(weight, done + most, side="right"))
        bounds.append(max(stop, bounds[-1] + 1))
        done = int(weight[bounds[-1] - 1])
    return np.array(bounds, dtype=np.int64)


def _cuts(run: Bundle, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """(3, bounds) where in a run each piece begins: the place of its device, row and token."""
    place = np.searchsorted(run.load("devices"), bounds)
    rows = np.append(0, run.load("row_ends"))[place]
    tokens = np.append(0, run.load("token_ends"))[place]
    return np.stack([place, rows, tokens])
