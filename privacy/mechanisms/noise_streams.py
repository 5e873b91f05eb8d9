"""The noise of many devices at once: each its own stream, drawn and shaped together.

A stream is the key stream of ChaCha20 (Bernstein 2008; RFC 8439) under its own key, 32 bits a word.
A word w, read as a number u = (w + 1/2) / 2^31 from -1 to 1, becomes the standard normal
sqrt(2) erfinv(u), the inverse of its distribution function. Close to the ends u is too coarse for
that: a word within 2^-12 of one of them, every 4096th, keeps its sign alone, and its size is drawn
anew from 52 bits that the stream gives after a draw's words. A draw goes up to 8.9 standard
deviations, and each begins at a new superblock (`SUPERBLOCK` words, in the order of the kernel).

A kernel in C does all of it (`sottovoce.client.native`), at a third of what torch takes, which does
it where there is no kernel: the same numbers up to rounding. Without its key a stream cannot be
told from random bits.

*Assumes*: Gaussian noise in float32 is treated as real-valued (as in `noise`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.native import kernels

KEY_BYTES = 32
SUPERBLOCK = 256  # words: 16 blocks, word i of all of them before word i + 1 of any
MOST = SUPERBLOCK << 28  # words of a stream: the counter of its blocks has 32 bits
AT_ONCE = (1 << 31) - 1  # numbers of one draw: the kernel counts their places in 32 bits
START = bytes(16)  # counter and nonce: every key is used for one stream only
TAIL_WORDS = 1 << 19  # at either end of the words: every 4096th of all
ENDS = (1 << 31) - TAIL_WORDS


class NoiseStreams:
    """Streams of float32 standard normals, one for each of `keys` (of `KEY_BYTES` each).

    A stream's draws depend on its key and on how much it was asked for before, not on the others.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = np.frombuffer(b"".join(keys), dtype="<u4").reshape(len(keys), -1)
        self._places = np.zeros(len(keys), dtype=np.int64)  # superblocks used up
        self._kernels = kernels()
        self._ciphers: dict[int, Any] = {}  # in the place of kernels

    def __len__(self) -> int:
        return len(self._keys)

    def draw(self, counts: Sequence[int], deviation: float | Tensor = 1.0) -> Tensor:
        """(n, max(counts)): the first `counts[k]` of k are normal, the others 0.

        n = len(counts): the first n streams are asked. `deviation`: of all, or of each (n,).
        """
        flat = self.flat(counts, 1.0 if isinstance(deviation, Tensor) else deviation)
        rows = _padded(flat, np.cumsum([0, *counts]))
        return rows.mul_(deviation.unsqueeze(1)) if isinstance(deviation, Tensor) else rows

    def flat(self, counts: Sequence[int], deviation: float = 1.0, first: int = 0) -> Tensor:
        """(sum(counts),): the draws of one stream after another, `counts[k]` of `first` + k.

        Raises ValueError for streams that are not there, and for draws of more numbers than
        `AT_ONCE`, or than a stream's counter can count.
        """
        sizes = np.asarray(counts, dtype=np.int64)
        keys, places = self.handed_over(sizes, first)
        if self._kernels is None:
            return self._by_torch(sizes.tolist(), deviation, first)
        normals = np.empty(int(sizes.sum()), dtype=np.float32)
        failed = self._kernels.kernels_streams(
            keys.ctypes.data, places.ctypes.data, sizes.ctypes.data, len(sizes),
            deviation, normals.ctypes.data,
        )
        if failed:
            raise MemoryError(f"no memory for {len(normals)} numbers of noise")
        return torch.from_numpy(normals)

    def handed_over(
        self, sizes: NDArray[np.int64], first: int = 0
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Keys (n, 8) and places (n,), in superblocks, of the streams from `first` on.

        For a kernel that draws `sizes` (n,) of them by itself, and moves the places on. Raises
        ValueError as `flat` does.
        """
        here = slice(first, first + len(sizes))
        if not 0 <= first <= here.stop <= len(self._places):
            raise ValueError(f"streams {first} to {here.stop} are not all among {len(self)}")
        least, most = int(sizes.min(initial=0)), int(sizes.max(initial=0))
        if least < 0 or most > AT_ONCE:
            raise ValueError(f"a draw gives from 0 to {AT_ONCE} numbers, not {least or most}")
        # Whole superblocks, for words and then for tails, if all of the words were such.
        used = self._places[here] * SUPERBLOCK + 3 * sizes + 2 * SUPERBLOCK
        if int(used.max(initial=0)) > MOST:
            raise ValueError(f"a noise stream gives {MOST} words at most: use a key for each round")
        return self._keys[here], self._places[here]

    def _by_torch(self, counts: list[int], deviation: float, first: int) -> Tensor:
        drawn = [self._next(stream, count) for stream, count in enumerate(counts, first)]
        return torch.cat([torch.zeros(0), *drawn]).mul_(deviation)

    def _next(self, stream: int, count: int) -> Tensor:
        """(count,) the next normals of a stream."""
        words = self._words(stream, count)
        near = words.view(np.uint32) - np.uint32(ENDS) < 2 * TAIL_WORDS  # modulo 2^32
        normals = torch.from_numpy(words).float().add_(0.5).mul_(2.0**-31).erfinv_()
        normals.mul_(math.sqrt(2))
        tails = np.flatnonzero(near)
        bits = self._words(stream, 2 * len(tails)).view("<u8")
        uniform = (bits >> np.uint64(12)) + 0.5
        below = torch.from_numpy(uniform * (2.0**-52 * TAIL_WORDS / 2.0**32))
        size = -torch.special.ndtri(below).numpy()
        normals.numpy()[tails] = np.where(words[tails] < 0, -size, size)
        return normals

    def _words(self, stream: int, count: int) -> NDArray[np.int32]:
        """(count,) the next words of a stream; the rest of the last superblock is left out."""
        if stream not in self._ciphers:
            key = self._keys[stream].tobytes()
            self._ciphers[stream] = Cipher(algorithms.ChaCha20(key, START), mode=None).encryptor()
        used = -(-count // SUPERBLOCK)
        self._places[stream] += used
        drawn = self._ciphers[stream].update(bytes(4 * SUPERBLOCK * used))
        blocks = np.frombuffer(drawn, dtype="<i4").reshape(used, 16, 16)
        return np.ascontiguousarray(blocks.transpose(0, 2, 1)).reshape(-1)[:count]


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
