"""Kernels in C for what torch's own operators leave on the table, where they were built.

A C compiler at installation is all they need; without one everything runs on torch alone, slower
and to rounding the same. `kernels()` is None then. Which of them run follows from processor and
build alone: a seeded run gives the same bytes each time on a machine.

SOTTOVOCE_KERNELS, an environment variable: off, generic, avx2 or avx512 (that, or what the
processor has below it).
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from sottovoce.client.errors import ConfigError

Library = ctypes.CDLL
LEVELS = ("generic", "avx2", "avx512")
VARIABLE = "SOTTOVOCE_KERNELS"

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES: dict[str, tuple[object, list[type]]] = {
    "kernels_use": (ctypes.c_int, [ctypes.c_int]),
    "kernels_level": (ctypes.c_int, []),
    "kernels_streams": (ctypes.c_int, [_POINTER, _POINTER, _POINTER, _INT, _FLOAT, _POINTER]),
    "kernels_gram": (ctypes.c_int, [_POINTER, _INT, _INT, _INT, _INT, _INT, _POINTER]),
    "kernels_linear": (None, [*[_INT] * 4, *[_POINTER] * 4]),
    "kernels_matmul": (None, [*[_INT] * 4, *[_POINTER] * 3]),
    "kernels_outer": (
        None, [*[_INT] * 4, *[_POINTER] * 3, ctypes.c_int, _FLOAT, _POINTER, _INT]
    ),
    "kernels_lstm": (ctypes.c_int, [_POINTER, ctypes.c_int]),
    "kernels_bags_scratch": (_INT, [_INT]),
    "kernels_bags_plan": (_INT, [_POINTER]),
    "kernels_bags_train": (None, [_POINTER]),
}


@lru_cache(maxsize=1)
def kernels() -> Library | None:
    """The compiled kernels, at the processor's best level; None where there are none.

    Raises ConfigError for an unknown level in the environment.
    """
    wanted = os.environ.get(VARIABLE, LEVELS[-1])
    if wanted == "off":
        return None
    if wanted not in LEVELS:
        raise ConfigError(f"{VARIABLE}={wanted} is none of: off, {', '.join(LEVELS)}")
    found = _library()
    if found is not None:
        found.kernels_use(LEVELS.index(wanted))
    return found


def level() -> str:
    """Which kernels run: off, or one of `LEVELS`."""
    found = kernels()
    return "off" if found is None else LEVELS[found.kernels_level()]


def address(tensor: Tensor) -> int:
    """Where the numbers of a contiguous tensor of the processor's own memory begin."""
    if not (tensor.is_contiguous() and tensor.device.type == "cpu"):
        raise ValueError("a kernel was given a tensor that is not contiguous, or on a GPU")
    return tensor.data_ptr()


def _library() -> Library | None:
    folder = Path(__file__).parent
    sources = [path.stat().st_mtime for path in folder.glob("*.[ch]")]  # none but in a checkout
    for path in sorted(folder.glob("_kernels*.so")):
        if path.stat().st_mtime < max(sources, default=0.0):
            continue  # of an older build, whose structures may have another layout
        try:
            library = Library(str(path))
            for name, (result, arguments) in SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):  # of another machine
            continue
        return library
    return None
