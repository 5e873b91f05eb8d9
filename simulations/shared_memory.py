"""Tensors that a process shares with those it forks.

An anonymous shared mapping has no name and no file: whoever dies, however, the kernel frees it with
its last user, and the size of /dev/shm is no limit.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNED = 64  # bytes


def shared_tensors(like: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """Zeroed tensors of the given shapes and types, in memory that forked processes share."""
    starts, end = {}, 0
    for name, (shape, dtype) in like.items():
        starts[name] = end
        end += -(-shape.numel() * dtype.itemsize // ALIGNED) * ALIGNED
    memory = mmap.mmap(-1, max(end, 1))
    return {
        name: torch.frombuffer(
            memory, dtype=dtype, count=shape.numel(), offset=starts[name]
        ).view(shape)
        if shape.numel()
        else torch.zeros(shape, dtype=dtype)
        for name, (shape, dtype) in like.items()
    }
