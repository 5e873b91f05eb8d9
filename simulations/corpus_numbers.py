"""Numbers for names that stand in many chunks, in order of first appearance, without a dictionary.

A chunk knows its own names by 128-bit hashes. Records (hash, position) are dealt into buckets by
the hash's first bits; a bucket is sorted in memory, where equal hashes meet and point to the
earliest of them. So any number of names is numbered in the memory of one bucket (hash-partitioned
duplicate elimination, as in Grace joins: Kitsuregawa et al. 1983). Two different names get the same
number with a chance of n**2 / 2**129.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import DataError
from sottovoce.simulations.corpus_index import encoded
from sottovoce.simulations.flat_arrays import Array, ArrayWriter, Bundle, load

BLOCK = 1 << 20  # records handled at once


def name_hashes(names: Iterable[str]) -> NDArray[np.uint64]:
    """(names, 2) 128 bits of each name."""
    digest = hashlib.blake2b
    text = b"".join(digest(encoded(name), digest_size=16).digest() for name in names)
    return np.frombuffer(text, dtype="<u8").reshape(-1, 2)


def number_names(
    parts: Sequence[tuple[Bundle, int]], name: str, folder: Path, most: int
) -> int:
    """Write `{name}_numbers` (records,), the number of each record's name; returns how many names.

    `parts`: each chunk, in order, with its `{name}_hashes`, and how many names it has.
    `folder`: where results and scratch go. `most`: records sorted in memory at once.
    """
    records = sum(count for _, count in parts)
    scratch = folder / f"{name}_buckets"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    bits = max(0, (records // most).bit_length())
    _deal(parts, name, scratch, bits)
    first = _scratch_array(scratch / "first", "<i8", records)
    for bucket in range(1 << bits):
        found = load(scratch, str(bucket), "u8").reshape(-1, 3)
        first[found[:, 2].astype(np.int64)] = _earliest(found)
    names = _write_numbers(first, name, folder, scratch)
    shutil.rmtree(scratch)
    return names


def blocks(records: int) -> Iterator[slice]:
    """The pieces in which long arrays are walked."""
    for start in range(0, records, BLOCK):
        yield slice(start, min(start + BLOCK, records))


def _deal(parts: Sequence[tuple[Bundle, int]], name: str, scratch: Path, bits: int) -> None:
    """Records (hash, hash, position) into a file for each value of a hash's first bits."""
    base = 0
    with ExitStack() as stack:
        names = map(str, range(1 << bits))
        files = [ArrayWriter(scratch, bucket, "u8", scratch=True) for bucket in names]
        writers = [stack.enter_context(file) for file in files]
        for part, count in parts:
            hashes = part.load(f"{name}_hashes").reshape(-1, 2)
            positions = np.arange(base, base + count, dtype=np.uint64)
            records = np.column_stack([hashes, positions])
            bucket = (hashes[:, 0] >> np.uint64(64 - bits)) if bits else np.zeros(count, np.uint64)
            order = np.argsort(bucket, kind="stable")
            bounds = np.searchsorted(bucket[order], np.arange((1 << bits) + 1, dtype=np.uint64))
            for writer, start, stop in zip(writers, bounds, bounds[1:], strict=False):
                writer.append(records[order[start:stop]])
            base += count


def _earliest(records: Array) -> NDArray[np.int64]:
    """(records,) position of the first record with the same hash; positions ascend."""
    order = np.lexsort((records[:, 1], records[:, 0]))
    hashes = records[order, :2]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
    positions = records[:, 2].astype(np.int64)
    earliest = np.empty(len(order), dtype=np.int64)
    earliest[order] = positions[order[new]][np.cumsum(new) - 1]
    return earliest


def _write_numbers(first: Array, name: str, folder: Path, scratch: Path) -> int:
    """Number the records that are the first of their name, and all others like them."""
    number, names = _scratch_array(scratch / "number", "<i4", len(first)), 0
    with ArrayWriter(folder, f"{name}_numbers", "i4") as writer:
        for block in blocks(len(first)):
            new = np.flatnonzero(first[block] == np.arange(block.start, block.stop))
            if names + len(new) > np.iinfo(np.int32).max:
                raise DataError(f"more than 2**31 different {name}s: give fewer files at once")
            number[block.start + new] = np.arange(names, names + len(new))
            names += len(new)
            writer.append(number[first[block]])
    return names


def _scratch_array(path: Path, kind: str, size: int) -> Array:
    """A zeroed array in a file, so that the system may write it out where memory is short."""
    if not size:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="w+", shape=(size,)).view(np.ndarray)
