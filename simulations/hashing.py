"""Counter-based hashing: every random choice of a population as a pure function of its name.

A draw is `hash(seed, purpose, device, counter)`, so any device can be regenerated alone, in any
order, on any machine, and nothing is stored. The mixer is the finaliser of SplitMix64 (Steele, Lea,
Flood 2014, "Fast splittable pseudorandom number generators"), vectorised over uint64 arrays. It is
statistically sound and not cryptographic: privacy noise must never come from here.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)

Bits = NDArray[np.uint64]


def stream(seed: int, purpose: str) -> np.uint64:
    """Key of the stream of draws that `purpose` owns under `seed`."""
    name = f"{seed}:{purpose}".encode("utf-8", "surrogatepass")
    return np.uint64(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))


def draws(key: np.uint64 | Bits, counters: NDArray[np.integer[Any]] | int) -> Bits:
    """64 uniform bits for each (key, counter), broadcast; a result can be the key of more draws."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        bits = np.asarray((np.asarray(counters).astype(np.uint64) + np.uint64(1)) * GAMMA + key)
        bits ^= bits >> np.uint64(30)
        bits *= _FIRST
        bits ^= bits >> np.uint64(27)
        bits *= _SECOND
        bits ^= bits >> np.uint64(31)
    return bits


def uniforms(bits: Bits) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) from the upper 53 bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers_below(
    bits: Bits, sizes: NDArray[np.integer[Any]] | int
) -> tuple[NDArray[np.int64], Bits]:
    """Uniform integers in [0, size) from the upper 32 bits, and the bits left for a second choice.

    Sizes are below 2**31; two choices in a row need sizes whose product is well below 2**32.
    """
    scaled = (bits >> np.uint64(32)) * np.asarray(sizes, dtype=np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64), scaled << np.uint64(32)
