"""Flat arrays in files: raw little-endian numbers, one array a file, written once.

The name says what a file holds, the ending of what kind: `tokens.i4`, `offsets.i8`. Writers wait
until the disk has the data, readers take a piece or map the whole. A bundle is several arrays that
come and go together in one file.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def array_file(folder: Path, name: str, kind: str) -> Path:
    """Where the array `name` of numpy kind `kind` (`i4`, `u8`, …) lies."""
    return folder / f"{name}.{kind}"


class ArrayWriter:
    """Appends to an array file; use as a context manager, which ends with the data on disk.

    `scratch`: does not wait for the disk, for a file that nobody reads after a crash.
    """

    def __init__(self, folder: Path, name: str, kind: str, scratch: bool = False) -> None:
        self.count, self._type, self._scratch = 0, np.dtype(f"<{kind}"), scratch
        self._file = array_file(folder, name, kind).open("wb")

    def append(self, values: Array) -> None:
        np.ascontiguousarray(values, dtype=self._type).tofile(self._file)
        self.count += values.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file as file:
            file.flush()
            if not self._scratch:
                os.fsync(file.fileno())


def save(folder: Path, name: str, kind: str, values: Array) -> None:
    """Write a whole array."""
    with ArrayWriter(folder, name, kind) as writer:
        writer.append(values)


def load(folder: Path, name: str, kind: str, start: int = 0, stop: int | None = None) -> Array:
    """Elements `start` to `stop` (or the end) of an array file, in memory."""
    size = np.dtype(kind).itemsize
    count = -1 if stop is None else stop - start
    path = array_file(folder, name, kind)
    return np.fromfile(path, dtype=f"<{kind}", count=count, offset=start * size)


class Mapped:
    """A whole array file as `array`, read from disk as it is touched; `release` forgets pages."""

    def __init__(self, folder: Path, name: str, kind: str) -> None:
        self._map: mmap.mmap | None = None
        with array_file(folder, name, kind).open("rb") as file:
            if os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array: Array = np.frombuffer(self._map or b"", dtype=f"<{kind}")

    def expect(self, starts: Array, stops: Array) -> None:
        """Ask the system to read elements `starts[k]:stops[k]` (m,) meanwhile, without waiting."""
        if self._map is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        size, page = self.array.itemsize, mmap.PAGESIZE
        pages = np.stack([starts * size // page, -(-stops * size // page)])[:, starts < stops]
        with suppress(OSError):  # it is a hint, whose failure costs time alone
            for first, end in _merged(pages):
                self._map.madvise(mmap.MADV_WILLNEED, first * page, (end - first) * page)

    def release(self) -> None:
        """Give the pages that were read back to the system's cache, out of this process' memory."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _merged(ranges: Array) -> Iterator[tuple[int, int]]:
    """Ranges (2, m) from and up to a number, those that meet as one, in ascending order."""
    firsts, ends = ranges[:, np.argsort(ranges[0])]
    ends = np.maximum.accumulate(ends)
    cuts = np.flatnonzero(firsts[1:] > ends[:-1]) + 1
    for part in np.split(np.arange(len(firsts)), cuts):
        if len(part):
            yield int(firsts[part[0]]), int(ends[part[-1]])


def write_bundle(path: Path, arrays: dict[str, Array]) -> None:
    """Several arrays as one file that is there whole or not at all."""
    parts = {name: values.astype(values.dtype.newbyteorder("<")) for name, values in arrays.items()}
    table, end = {}, 0
    for name, values in parts.items():
        table[name] = [values.dtype.str, end, values.size]
        end += values.nbytes
    header = json.dumps(table).encode()
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for values in parts.values():
            file.write(np.ascontiguousarray(values).data)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    sync_folder(path.parent)


class Bundle:
    """Reads arrays of `write_bundle`, whole or in part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._table: dict[str, tuple[str, int, int]] = json.loads(file.read(size))
        self._start = 8 + size

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def load(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Elements `start` to `stop` (or the end) of an array."""
        kind, offset, count = self._table[name]
        stop = count if stop is None else stop
        offset += self._start + start * np.dtype(kind).itemsize
        return np.fromfile(self._path, dtype=kind, count=stop - start, offset=offset)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
