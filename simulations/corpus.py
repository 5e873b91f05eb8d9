"""The corpus of a population of real data: its examples by device, in memory or in an index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.examples import Examples


@dataclass(frozen=True)
class CorpusSettings:
    """All that decides which examples a population has, and on which device each lies.

    `columns`: name of each field's column in a table; None for JSONL. The rest: see
    `CorpusPopulation`.
    """

    paths: tuple[Path, ...]
    test_paths: tuple[Path, ...] = ()
    columns: tuple[tuple[str, str], ...] | None = None
    users: str = "auto"
    devices: int = 500
    alpha: float = 1.0
    mu: float = 2.3
    sigma: float = 1.3
    held_out_fraction: float = 0.1
    seed: int = 0


def _nothing() -> None:
    """What a corpus in memory has to forget."""


def _nobody(devices: NDArray[np.int64]) -> None:
    """Whose examples a corpus in memory has to read."""


@dataclass(frozen=True)
class Corpus:
    """Examples sorted by device, the training devices first.

    `train` has labels as numbered in `intents` and `tags`, in order of appearance. `test`: the test
    files' examples in their random order, as those of one device, or None. `activity`: (training
    devices,). `natural`: whether a device is a user. `empty`: rows without words. `folder`: of the
    index, None in memory. `release`: forgets what was read of mapped arrays. `expect`: lets the
    system read the examples of some devices in advance.
    """

    train: Examples
    test: Examples | None
    activity: NDArray[np.unsignedinteger[Any]]
    held_out: int
    words: Sequence[str]
    intents: tuple[str, ...]
    tags: tuple[str, ...]
    natural: bool
    empty: int
    folder: Path | None = None
    release: Callable[[], None] = _nothing
    expect: Callable[[NDArray[np.int64]], None] = _nobody


def activity_kind(largest: int) -> str:
    """The smallest kind of unsigned integer for a device's number of examples."""
    return "u2" if largest < 1 << 16 else "u4"
