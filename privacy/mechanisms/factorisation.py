"""Correlated noise for prefix sums: factorisations A = B C of the matrix that adds updates up.

The model after round t is a sum of t updates: a row of A x. Releasing A x + B z = A (x + C^-1 z),
z independent Gaussian rows, adds in round t the noise (C^-1 z)_t, which later rounds partly take
back: sums suffer less than from independent noise at the same epsilon.

*Guarantee* (of every factorisation here): the whole sequence of noised updates is one Gaussian
mechanism of sensitivity S `sensitivity(schedule)`, S bounding every contribution: it is a function
of C x + z. Relation zero-out: a unit takes part as it does, with its contributions or with zeros.
Updates may depend on everything released before: C is lower triangular (or, for the tree, a row of
z is drawn when the rounds it covers are over) and z is Gaussian, for which adaptive inputs cost
nothing more (Denisov et al. 2022, arXiv:2202.08312, theorem 2.1).
*Assumes*: the schedule holds, and the rounds do not go beyond it.

`identity`  independent noise
`tree`      binary tree, Kairouz et al. 2021, arXiv:2103.00039
`banded`    BandMF, C banded and Toeplitz, Choquette-Choo et al. 2023, arXiv:2306.08153
`bisr`      banded inverse square root, Kalinin et al. 2025, arXiv:2505.12128
`blt`       buffered linear Toeplitz, McMahan et al. 2024, arXiv:2408.08868
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from sottovoce.privacy.mechanisms import series, tree
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.privacy.mechanisms.series import Floats
from sottovoce.privacy.mechanisms.streams import (
    BufferedStream,
    NoiseStream,
    RecursiveStream,
    TreeStream,
    WindowStream,
)


class Factorisation(ABC):
    """A = B C for `rounds` rounds. `numbers`: what determines it beside its name, as floats."""

    name: ClassVar[str]

    def __init__(self, rounds: int, numbers: Mapping[str, Any]) -> None:
        self.rounds = rounds
        self.numbers = {key: [float(v) for v in values] for key, values in numbers.items()}

    @abstractmethod
    def sensitivity(self, schedule: Schedule) -> float:
        """Largest |C u| for contributions of norm at most 1: what noise must be in proportion to.

        Raises ValueError for a schedule of more rounds.
        """

    @abstractmethod
    def strategy_matrix(self) -> Floats:
        """(rows, rounds) C, for small cases and tests."""

    @abstractmethod
    def prefix_variances(self, momentum: float = 0.0) -> Floats:
        """(rounds,) variance of the noise in the model after each round, for z of variance 1."""

    @abstractmethod
    def row_variances(self) -> Floats:
        """(rounds,) variance of the noise in each round's update, for z of variance 1."""

    @abstractmethod
    def stream(self) -> NoiseStream:
        """A generator of the rows of C^-1 z, at its beginning."""

    def mean_error(self, schedule: Schedule) -> float:
        """Root mean variance of prefix sums' noise, times the sensitivity: at equal epsilon."""
        return self.sensitivity(schedule) * math.sqrt(self.prefix_variances().mean())

    def max_error(self, schedule: Schedule) -> float:
        """The same for the worst round."""
        return self.sensitivity(schedule) * math.sqrt(self.prefix_variances().max())

    def to_json(self) -> dict[str, Any]:
        """All that it takes to build it again, exactly."""
        return {"name": self.name, "rounds": self.rounds, **self.numbers}

    def _check(self, schedule: Schedule) -> None:
        if schedule.rounds > self.rounds:
            raise ValueError(
                f"rounds={schedule.rounds} are more than the {self.rounds} that the noise was "
                "planned for"
            )


class Toeplitz(Factorisation):
    """C Toeplitz: `column` (rounds,) is its first column, `inverse` (rounds,) that of C^-1."""

    def __init__(self, rounds: int, numbers: Mapping[str, Any]) -> None:
        super().__init__(rounds, numbers)
        self.column, self.inverse = self._columns()

    @abstractmethod
    def _columns(self) -> tuple[Floats, Floats]:
        """First columns of C and C^-1."""

    def sensitivity(self, schedule: Schedule) -> float:
        self._check(schedule)
        return series.sensitivity(self.column, schedule)

    def strategy_matrix(self) -> Floats:
        return series.toeplitz(self.column, self.rounds)

    def prefix_variances(self, momentum: float = 0.0) -> Floats:
        column = series.filtered([1.0], [1.0, -(1 + momentum), momentum], self.inverse)
        return np.cumsum(column**2)

    def row_variances(self) -> Floats:
        return np.cumsum(self.inverse**2)


class Banded(Toeplitz):
    """`bands`: the coefficients of C, the first one not 0."""

    name = "banded"

    def _columns(self) -> tuple[Floats, Floats]:
        column = series.padded(self.numbers["bands"], self.rounds)
        return column, series.inverse(self.numbers["bands"], self.rounds)

    def stream(self) -> NoiseStream:
        return RecursiveStream(self.rounds, self.numbers["bands"])


class Identity(Banded):
    """Independent noise: C = I."""

    name = "identity"


class InverseBanded(Toeplitz):
    """`bands`: the coefficients of C^-1, the first one not 0."""

    name = "bisr"

    def _columns(self) -> tuple[Floats, Floats]:
        column = series.inverse(self.numbers["bands"], self.rounds)
        return column, series.padded(self.numbers["bands"], self.rounds)

    def stream(self) -> NoiseStream:
        return WindowStream(self.rounds, self.numbers["bands"])


class Buffered(Toeplitz):
    """c_0 = 1, c_i = sum_j omega_j theta_j^(i-1). `theta` in [0, 1), `omega` >= 0, sum at most 1.

    With that c does not grow, and its sensitivity is exact.
    """

    name = "blt"

    def _columns(self) -> tuple[Floats, Floats]:
        theta, omega = np.array(self.numbers["theta"]), np.array(self.numbers["omega"])
        powers = theta[None, :] ** np.arange(self.rounds - 1)[:, None]
        column = np.concatenate([[1.0], powers @ omega])
        return column, series.inverse(column, self.rounds)

    def stream(self) -> NoiseStream:
        return BufferedStream(self.rounds, self.numbers["theta"], self.numbers["omega"])


class Tree(Factorisation):
    """The binary tree, nodes estimated from their subtrees (Honaker 2015)."""

    name = "tree"

    def sensitivity(self, schedule: Schedule) -> float:
        """Exact for the plan's own rounds, or a bound: see `tree.squared_sensitivity`."""
        self._check(schedule)
        return math.sqrt(tree.squared_sensitivity(schedule))

    def strategy_matrix(self) -> Floats:
        return tree.strategy_matrix(self.rounds)

    def prefix_variances(self, momentum: float = 0.0) -> Floats:
        if momentum:
            raise ValueError(f"momentum={momentum:g} has no figure with a tree: use 0")
        return tree.prefix_variances(self.rounds)

    def row_variances(self) -> Floats:
        return tree.row_variances(self.rounds)

    def stream(self) -> NoiseStream:
        return TreeStream(self.rounds, tree.honaker(self.rounds)[0])


_KINDS: dict[str, type[Factorisation]] = {
    kind.name: kind for kind in (Identity, Tree, Banded, InverseBanded, Buffered)
}


def from_json(values: Mapping[str, Any]) -> Factorisation:
    """The factorisation that `to_json` wrote; ValueError where it is malformed."""
    numbers = {key: value for key, value in values.items() if key not in ("name", "rounds")}
    try:
        return _KINDS[values["name"]](int(values["rounds"]), numbers)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a factorisation lacks or garbles {error}") from error
