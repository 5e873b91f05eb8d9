"""The local batches of a whole cohort at once: what `draw_batches` does for one device.

Every (device, pass, example) has a random word of its own, a function of the round's secret key.
It is the coin of a Poisson step, or the example's place in an epoch; so a device's batches do not
depend on its company.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.batches import BatchPlan
from sottovoce.privacy.mechanisms.philox import WORDS, Words, philox

AT_ONCE = 1 << 16  # words in memory, several times over
PASS_BITS = np.uint64(24)  # of a sorting key, for at most so many passes of all devices

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Visits:
    """Which row enters which step of which device; all (visits,), `owner` counts devices."""

    owner: Ints
    step: Ints
    row: Ints


@dataclass(frozen=True)
class _Words:
    """A word for each example of each pass: (words,) arrays, by owner, pass and number."""

    owner: Ints
    turn: Ints
    number: Ints
    word: Words
    passed: Ints  # (words,) which of all passes, counted through the devices


def draw_visits(
    plan: BatchPlan,
    devices: Ints,
    levels: NDArray[np.uint8],
    counts: Ints,
    key: tuple[int, int],
) -> tuple[Visits, Ints]:
    """Visits of example numbers, by device and step, and the steps of each device (devices,).

    `levels`, `counts`: (devices,) activity levels and numbers of examples. `key`: of the round,
    secret. An epoch takes a device through its examples in random order, `max_examples` of them at
    most; a Poisson step lets each in with probability `plan.rate(level)`.
    """
    pairs = zip(levels.tolist(), counts.tolist(), strict=True)
    steps = np.array([plan.steps(level, count) for level, count in pairs], dtype=np.int64)
    passes = steps if plan.poisson else np.full(len(devices), plan.local_epochs)
    rates = np.array([plan.rate(level) for level in range(int(levels.max(initial=0)) + 1)])
    parts = []
    for part in _blocks(counts * passes):
        words = _words(devices[part], counts[part], passes[part], key)
        found = (
            _coins(words, rates[levels[part]]) if plan.poisson
            else _epochs(words, plan, steps[part])
        )
        parts.append((found.owner + part.start, found.step, found.row))
    owner, step, row = (
        np.concatenate([np.zeros(0, dtype=np.int64), *(part[side] for part in parts)])
        for side in range(3)
    )
    return Visits(owner, step, row), steps


def _coins(words: _Words, rates: NDArray[np.float64]) -> Visits:
    heads = (words.word >> np.uint64(11)).astype(np.float64) * 2.0**-53 < rates[words.owner]
    return Visits(words.owner[heads], words.turn[heads], words.number[heads])


def _epochs(words: _Words, plan: BatchPlan, steps: Ints) -> Visits:
    order = np.argsort(
        (words.passed.astype(np.uint64) << (np.uint64(64) - PASS_BITS)) | (words.word >> PASS_BITS)
    )
    starts = np.searchsorted(words.passed, words.passed)
    place = np.arange(len(order)) - starts
    kept = place < plan.max_examples
    owner, turn, place = words.owner[kept], words.turn[kept], place[kept]
    step = turn * (steps // plan.local_epochs)[owner] + place // plan.batch_size
    return Visits(owner, step, words.number[order][kept])


def _words(devices: Ints, counts: Ints, passes: Ints, key: tuple[int, int]) -> _Words:
    owner, turn = _expanded(passes)
    passed, block = _expanded(-(-counts[owner] // WORDS))
    words = philox(key, (block, turn[passed], devices[owner[passed]], 0)).ravel()
    number = (block[:, None] * WORDS + np.arange(WORDS)).ravel()
    passed = np.repeat(passed, WORDS)
    real = number < counts[owner[passed]]
    passed = passed[real]
    return _Words(owner[passed], turn[passed], number[real], words[real], passed)


def _expanded(counts: Ints) -> tuple[Ints, Ints]:
    """0, 1, 2, ... each `counts` times, and the number of each among its equals."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _blocks(sizes: Ints) -> Iterator[slice]:
    """Devices in turn, about `AT_ONCE` words together."""
    block = np.cumsum(sizes) // AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(sizes)]
    for start, end in zip(edges, edges[1:], strict=False):
        if start < end:
            yield slice(start, end)
