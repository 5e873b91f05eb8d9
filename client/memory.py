"""Memory that tensors gave back is kept for the next ones.

Training takes and gives back the same large blocks in every step. The C library hands large blocks
back to the system at once, which must then clear each page again before its next use: that can cost
as much as the arithmetic itself.
"""

from __future__ import annotations

import ctypes
import sys

NAMES = {"trim_threshold": -1, "mmap_threshold": -3, "arenas": -8}
LARGEST = 1 << 30


def tune_allocator(**options: int) -> bool:
    """Set options of mallopt(3), by the names in `NAMES`; False where the C library cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return all([mallopt(NAMES[option], value) for option, value in options.items()])


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to a gigabyte; False where the C library cannot.

    The process stays as large as it once was, and grows no further for it.
    """
    return tune_allocator(trim_threshold=LARGEST, mmap_threshold=LARGEST)
