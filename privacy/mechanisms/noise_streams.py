"""The noise of many devices at once: each its own stream, drawn and shaped together.

A stream is the key stream of AES-256 in counter mode under its own key, 32 bits a word. A word w,
read as a number u = w / 2^31 from -1 to 1, becomes the standard normal sqrt(2) erfinv(u), the
inverse of its distribution function. Close to the ends u is too coarse for that: a word within
2^-12 of one of them, every 4096th, keeps its sign alone, and its size is drawn anew from 52 bits
that the stream gives next. A draw goes up to 8.9 standard deviations.

Without its key a stream cannot be told from random bits; and thousands of devices' noise costs half
of what a generator for each of them would.

*Assumes*: Gaussian noise in float32 is treated as real-valued (as in `noise`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

KEY_BYTES = 32
WORD = 4  # bytes
START = bytes(16)  # of the counter: every key is used for one stream only
TAIL_WORDS = 1 << 19  # at either end of the words: every 4096th of all
ENDS = (1 << 31) - TAIL_WORDS


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
        words = np.empty(sum(counts), dtype=np.int32)
        source = memoryview(bytes(WORD * max(counts, default=0)))
        ends = np.cumsum([0, *counts])
        for stream, count, end in zip(self._streams, counts, ends[1:].tolist(), strict=False):
            if count:
                target = words[end - count : end].data.cast("B")
                stream.update_into(source[: WORD * count], target)
        normals = torch.from_numpy(words).to(torch.float32).mul_(2.0**-31).erfinv_()
        near = words.view(np.uint32) - np.uint32(ENDS) < 2 * TAIL_WORDS  # modulo 2^32
        where = np.flatnonzero(near)
        if len(where):
            self._redraw(normals.numpy(), words, where, ends)
        scale = deviation.unsqueeze(1) if isinstance(deviation, Tensor) else deviation
        return _padded(normals, ends).mul_(scale * math.sqrt(2))

    def _redraw(
        self,
        normals: NDArray[np.float32],
        words: NDArray[np.int32],
        where: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        """Draw the sizes of the normals (times sqrt(1/2)) at `where` (m,), stream after stream."""
        owners = np.searchsorted(ends, where, side="right") - 1
        streams, found = np.unique(owners, return_counts=True)
        bits = [
            self._streams[k].update(bytes(8 * count))
            for k, count in zip(streams.tolist(), found.tolist(), strict=True)
        ]
        uniform = (np.frombuffer(b"".join(bits), dtype="<u8") >> np.uint64(12)) + 0.5
        size = -ndtri(uniform * (2.0**-52 * TAIL_WORDS / 2.0**32)) * math.sqrt(0.5)
        normals[where] = np.copysign(size, words[where])


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
