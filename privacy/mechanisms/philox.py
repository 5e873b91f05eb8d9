"""Philox as a function: random words of any number of counters at once.

    words(key, counter), four words of 64 bits each

is what `numpy.random.Philox` gives after its counter, but for arrays of counters: a coin of every
example of a thousand devices costs a handful of numpy calls, and no generator is made for a device.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x64, 10 rounds).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
WORDS = 4  # of a block
MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)

Words = NDArray[np.uint64]


def philox(
    key: tuple[int, int], counters: tuple[NDArray[np.integer[Any]] | int, ...]
) -> Words:
    """(..., 4) random words. `key`: two words; `counters`: four, arrays that broadcast."""
    keys = [np.uint64(part) for part in key]
    a, b, c, d = np.broadcast_arrays(*(np.asarray(part, dtype=np.uint64) for part in counters))
    with np.errstate(over="ignore"):
        for _ in range(ROUNDS):
            high_a, low_a = _product(a, MULTIPLIERS[0])
            high_c, low_c = _product(c, MULTIPLIERS[1])
            a, b, c, d = high_c ^ b ^ keys[0], low_c, high_a ^ d ^ keys[1], low_a
            keys = [part + step for part, step in zip(keys, WEYL, strict=True)]
    return np.stack([a, b, c, d], axis=-1)


def _product(x: Words, multiplier: np.uint64) -> tuple[Words, Words]:
    """High and low word of the 128 bits of x * multiplier."""
    top, bottom = multiplier >> HALF, multiplier & LOW
    x_top, x_bottom = x >> HALF, x & LOW
    middle = x_top * bottom + ((x_bottom * bottom) >> HALF)
    other = x_bottom * top + (middle & LOW)
    return x_top * top + (middle >> HALF) + (other >> HALF), x * multiplier
