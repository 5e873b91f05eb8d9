"""Memory that tensors gave back is kept for the next ones.

Training takes and gives back the same large blocks in every step. The C library hands large blocks
back to the system at once, which must then clear each page again before its next use: that can cost
as much as the arithmetic itself.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names in mallopt(3)
LARGEST = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks of up to a gigabyte; False where the C library cannot.

    The process stays as large as it once was, and grows no further for it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(TRIM_THRESHOLD, LARGEST)) and bool(mallopt(MMAP_THRESHOLD, LARGEST))
