"""The noise of many devices at once: each its own stream, drawn and shaped together.

A stream is the key stream of AES-256 in counter mode under its own key, 32 bits a word. A word w,
read as a number u = w / 2^31 from -1 to 1, becomes the standard normal sqrt(2) erfinv(u), the
inverse of its distribution function. Close to the ends u is too coarse for that: a word within
2^-12 of one of them, every 4096th, keeps its sign alone, and its size is drawn anew from 52 bits
that the stream gives next. A draw goes up to 8.9 standard deviations.

A kernel in C does the central part (`sottovoce.client.native`), torch where there is none: the same
numbers up to rounding.

Without its key a stream cannot be told from random bits; and thousands of devices' noise costs half
of what a generator for each of them would.

*Assumes*: Gaussian noise in float32 is treated as real-valued (as in `noise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.native import kernels

KEY_BYTES = 32
WORD = 4  # bytes
Words = NDArray[np.int32]
START = bytes(16)  # of the counter: every key is used for one stream only
TAIL_WORDS = 1 << 19  # at either end of the words: every 4096th of all
ENDS = (1 << 31) - TAIL_WORDS
AT_ONCE = 1 << 16  # words that pass from cipher to normals while they are in the processor's cache
ZEROS = memoryview(bytes(WORD * AT_ONCE))  # what the cipher turns into its key stream


class NoiseStreams:
    """Streams of float32 standard normals, one for each of `keys` (of `KEY_BYTES` each).

    A stream's draws depend on its key and on how much it was asked for before, not on the others.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._streams = [
            Cipher(algorithms.AES(key), modes.CTR(START)).encryptor() for key in keys
        ]

    def __len__(self) -> int:
        return len(self._streams)

    def draw(self, counts: Sequence[int], deviation: float | Tensor = 1.0) -> Tensor:
        """(n, max(counts)): the first `counts[k]` of k are normal, the others 0.

        n = len(counts): the first n streams are asked. `deviation`: of all, or of each (n,).
        """
        flat = self.flat(counts, 1.0 if isinstance(deviation, Tensor) else deviation)
        rows = _padded(flat, np.cumsum([0, *counts]))
        return rows.mul_(deviation.unsqueeze(1)) if isinstance(deviation, Tensor) else rows

    def flat(self, counts: Sequence[int], deviation: float = 1.0, first: int = 0) -> Tensor:
        """(sum(counts),): the draws of one stream after another, `counts[k]` of `first` + k."""
        normals = np.empty(sum(counts), dtype=np.float32)
        words, done = normals.view(np.int32), 0
        places = [np.zeros(0, dtype=np.int64)]
        for pieces in _portions(counts):
            size = sum(count for _, count in pieces)
            here = words[done : done + size]
            self._fill(here, pieces, first)
            places.append(_to_normals(here, deviation) + done)
            done += size
        where = np.concatenate(places)
        if len(where):
            self._redraw(normals, where, np.cumsum([0, *counts]), deviation, first)
        return torch.from_numpy(normals)

    def _fill(self, words: Words, pieces: list[tuple[int, int]], first: int) -> None:
        """The next words of some streams, one stream after another."""
        target, done = words.data.cast("B"), 0
        for stream, size in pieces:
            end = done + WORD * size
            self._streams[first + stream].update_into(ZEROS[: WORD * size], target[done:end])
            done = end

    def _redraw(
        self,
        normals: NDArray[np.float32],
        where: NDArray[np.int64],
        ends: NDArray[np.int64],
        deviation: float,
        first: int,
    ) -> None:
        """Draw the sizes of the normals at `where` (m,), stream after stream, with their signs."""
        owners = np.searchsorted(ends, where, side="right") - 1
        streams, found = np.unique(owners, return_counts=True)
        bits = [
            self._streams[first + k].update(bytes(8 * count))
            for k, count in zip(streams.tolist(), found.tolist(), strict=True)
        ]
        uniform = (np.frombuffer(b"".join(bits), dtype="<u8") >> np.uint64(12)) + 0.5
        below = torch.from_numpy(uniform * (2.0**-52 * TAIL_WORDS / 2.0**32))
        size = torch.special.ndtri(below).mul_(-deviation).numpy()
        normals[where] = np.copysign(size, normals[where])


def _to_normals(words: Words, deviation: float) -> NDArray[np.int64]:
    """Words become float32 normals times `deviation`, in place. Places of the words close to the
    ends, (m,) ascending: they become their signs.
    """
    library = kernels()
    if library is None:
        return _by_torch(words, deviation)
    tails = np.empty(len(words), dtype=np.int32)
    found = library.kernels_normals(
        words.ctypes.data, len(words), deviation, tails.ctypes.data
    )
    return tails[:found].astype(np.int64)


def _by_torch(words: Words, deviation: float) -> NDArray[np.int64]:
    near = words.view(np.uint32) - np.uint32(ENDS) < 2 * TAIL_WORDS  # modulo 2^32
    found, normals = np.flatnonzero(near), words.view(np.float32)
    drawn = torch.from_numpy(words).float().mul_(2.0**-31).erfinv_()
    drawn.mul_(deviation * math.sqrt(2))
    signs = np.where(words[found] < 0, np.float32(-1), np.float32(1))
    normals[:] = drawn.numpy()
    normals[found] = signs
    return found


def _portions(counts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Which streams give how many words, in order, at most `AT_ONCE` together."""
    pieces: list[tuple[int, int]] = []
    room = AT_ONCE
    for stream, count in enumerate(counts):
        while count:
            size = min(count, room)
            pieces.append((stream, size))
            count, room = count - size, room - size
            if not room:
                yield pieces
                pieces, room = [], AT_ONCE
    if pieces:
        yield pieces


def _padded(flat: Tensor, ends: NDArray[np.int64]) -> Tensor:
    """Pieces `ends[k]:ends[k + 1]` as rows, zeros behind the shorter ones."""
    counts = np.diff(ends)
    most = int(counts.max(initial=0))
    if np.all(counts == most):
        return flat.view(len(counts), most)
    rows = np.zeros((len(counts), most), dtype=np.float32)
    values = flat.numpy()
    for row, start, end in zip(rows, ends.tolist(), ends[1:].tolist(), strict=False):
        row[: end - start] = values[start:end]
    return torch.from_numpy(rows)
