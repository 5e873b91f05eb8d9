"""Random unit directions of canary devices, regenerated from (seed, id) and never stored.

Coordinates are +-1 / sqrt(d), by fair coins: exactly of norm 1, near orthogonal to each other and
to whatever was trained (inner products of order 1 / sqrt(d)), and drawn an order faster than normal
ones. A Gaussian noise vector of deviation sigma projects onto each as exactly N(0, sigma^2).

Source: Andrew et al. 2024, arXiv:2302.03098, whose directions are uniform on the sphere: all that
is used of them holds for these as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 20  # coordinates at once, a multiple of 64


class Directions:
    """The directions of `canaries` devices in the space of parameters of `shapes`, by name.

    Coordinates come name by name in alphabetical order.
    """

    def __init__(self, seed: int, canaries: int, shapes: Mapping[str, torch.Size]) -> None:
        self.seed, self.canaries = seed, canaries
        self.shapes = {name: torch.Size(shapes[name]) for name in sorted(shapes)}
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def unit(self, canary: int) -> dict[str, Tensor]:
        """The direction of one canary: float32, norm 1 over all names together."""
        whole = np.empty(self.size, dtype=np.float32)
        for start, bits in self._chunks(canary):
            whole[start : start + len(bits)] = bits
        whole = (2 * whole - 1) / np.float32(math.sqrt(self.size))
        parts = torch.split(
            torch.from_numpy(whole), [shape.numel() for shape in self.shapes.values()]
        )
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def dots(self, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """(canaries,) inner products of `tensors` with every direction."""
        flat = flatten(tensors)
        if len(flat) != self.size:
            raise ValueError(f"{len(flat)} coordinates cannot meet directions of {self.size}")
        total, found = float(flat.sum()), np.empty(self.canaries)
        for canary in range(self.canaries):
            found[canary] = 2 * sum(
                float(flat[start : start + len(bits)] @ bits)
                for start, bits in self._chunks(canary)
            ) - total
        return found / math.sqrt(self.size)

    def _chunks(self, canary: int) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """First coordinate and 0 or 1 for each, of every chunk in turn."""
        name = f"canary direction {self.seed} {canary}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        for start in range(0, self.size, CHUNK):
            wanted = min(CHUNK, self.size - start)
            drawn = np.frombuffer(generator.bytes(-(-wanted // 64) * 8), dtype=np.uint8)
            yield start, np.unpackbits(drawn, count=wanted).astype(np.float64)


def flatten(tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """All coordinates, name by name in alphabetical order, in float64."""
    parts = [tensors[name].detach().reshape(-1).double().numpy() for name in sorted(tensors)]
    return np.concatenate([np.zeros(0), *parts])
