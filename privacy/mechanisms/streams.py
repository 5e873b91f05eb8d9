"""Correlated noise, row by row: C^-1 z in memory for a few rows, never the matrix.

A stream is given each round's own generator and keeps what later rounds need of earlier noise.
What it keeps follows from the generators alone, so a run that resumes replays them in place of
storing noise: a checkpoint must not hold what could be subtracted from a release.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Draw = Callable[[], Row]


class NoiseStream(ABC):
    """Rows of correlated noise for `rounds` rounds; `at` of them were drawn.

    `memory`: rounds back that the next row depends on; None: all of them.
    """

    def __init__(self, rounds: int, memory: int | None = None) -> None:
        self.rounds, self.memory, self.at = rounds, memory, 0

    def next(self, size: int, generator: np.random.Generator) -> Row:
        """(size,) float32: the next round's noise, for z of unit variance.

        `generator`: of this round and nothing else, in its first state. Raises ValueError past the
        planned rounds: noise was set for those, and a round more would not be covered.
        """
        if self.at >= self.rounds:
            raise ValueError(
                f"round {self.at + 1} is beyond the {self.rounds} rounds that correlated noise was "
                "planned for: start a new run"
            )
        self.at += 1
        return self._row(lambda: generator.standard_normal(size, dtype=np.float32))

    def replay(
        self, rounds: int, size: int, generator_of: Callable[[int], np.random.Generator]
    ) -> None:
        """Come to the state after `rounds` rounds, the generator of round r being given anew."""
        self.at = 0 if self.memory is None else max(0, rounds - self.memory)
        while self.at < rounds:
            self.next(size, generator_of(self.at + 1))

    @abstractmethod
    def _row(self, draw: Draw) -> Row:
        """The row of round `at`; `draw` gives a fresh (size,) row of z each time."""


class RecursiveStream(NoiseStream):
    """C banded: w_t = (z_t - sum_{0<j<bands} c_j w_{t-j}) / c_0; keeps bands - 1 rows of w.

    Source: Choquette-Choo et al. 2023, arXiv:2306.08153, algorithm 9.
    """

    def __init__(self, rounds: int, coefficients: Any) -> None:
        super().__init__(rounds, memory=0 if len(coefficients) == 1 else None)
        self.coefficients = [float(c) for c in coefficients]
        self._rows: deque[Row] = deque(maxlen=len(self.coefficients) - 1)

    def _row(self, draw: Draw) -> Row:
        row = draw()
        for coefficient, earlier in zip(self.coefficients[1:], self._rows, strict=False):
            row -= np.float32(coefficient) * earlier
        row /= np.float32(self.coefficients[0])
        if self._rows.maxlen:
            self._rows.appendleft(row.copy())
        return row


class WindowStream(NoiseStream):
    """C^-1 banded: w_t = sum_{j<bands} r_j z_{t-j}; keeps bands - 1 rows of z."""

    def __init__(self, rounds: int, inverse: Any) -> None:
        super().__init__(rounds, memory=len(inverse) - 1)
        self.inverse = [float(r) for r in inverse]
        self._rows: deque[Row] = deque(maxlen=len(self.inverse) - 1)

    def _row(self, draw: Draw) -> Row:
        fresh = draw()
        row = fresh * np.float32(self.inverse[0])
        for coefficient, earlier in zip(self.inverse[1:], self._rows, strict=False):
            row += np.float32(coefficient) * earlier
        if self._rows.maxlen:
            self._rows.appendleft(fresh)
        return row


class BufferedStream(NoiseStream):
    """C a buffered linear Toeplitz matrix: one buffer for each decay rate.

    w_t = z_t - sum_j omega_j s_j, then s_j <- theta_j s_j + w_t. Source: Dvijotham et al. 2024,
    arXiv:2404.16706; McMahan et al. 2024, arXiv:2408.08868, algorithm 1.
    """

    def __init__(self, rounds: int, theta: Any, omega: Any) -> None:
        super().__init__(rounds)
        self.theta, self.omega = [float(t) for t in theta], [float(o) for o in omega]
        self._buffers: list[Row] = []

    def _row(self, draw: Draw) -> Row:
        row = draw()
        if self.at == 1:
            self._buffers = [np.zeros_like(row) for _ in self.theta]
        for omega, buffer in zip(self.omega, self._buffers, strict=True):
            row -= np.float32(omega) * buffer
        for theta, buffer in zip(self.theta, self._buffers, strict=True):
            buffer *= np.float32(theta)
            buffer += row
        return row


class TreeStream(NoiseStream):
    """Binary tree: the difference of two neighbouring prefix sums' noise; keeps log2(rounds) rows.

    `weights`: by height, how much a node's own noise counts in the estimate of its sum, the rest
    being its children's estimates (Honaker 2015; 1 everywhere: the node alone).
    """

    def __init__(self, rounds: int, weights: Any) -> None:
        super().__init__(rounds)
        self.weights = [float(w) for w in weights]
        self._nodes: list[tuple[int, Row]] = []  # (height, estimate) of the prefix, highest first

    def _row(self, draw: Draw) -> Row:
        height, estimate = 0, draw()
        gone = np.zeros_like(estimate)
        while self._nodes and self._nodes[-1][0] == height:
            left = self._nodes.pop()[1]
            gone += left
            height += 1
            weight = np.float32(self.weights[height])
            estimate = weight * draw() + (1 - weight) * (left + estimate)
        self._nodes.append((height, estimate))
        return estimate - gone
