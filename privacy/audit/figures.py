"""What an audit may say of a figure: a bound at a confidence, or an estimate that promises nothing.

LowerBound   epsilon is above it, save with probability 1 - confidence
Estimate     a guess at epsilon, without a guarantee
Exposure     how far a secret stands out among others that were not inserted: an estimate, in bits

They are different types, so that no table and no verdict can mistake one for the other, and they
print differently: `≥ 1.62` against `≈ 1.62 (no bound)`. Only a `LowerBound` reaches a verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Interval = tuple[float, float]


@dataclass(frozen=True)
class LowerBound:
    """Epsilon is above `epsilon`, save with probability 1 - `confidence`.

    `ceiling`: the largest value that this test could have certified, had every guess been right.
    `assumes`: what the probability statement rests on.
    """

    epsilon: float
    confidence: float
    method: str
    ceiling: float
    assumes: str

    def __str__(self) -> str:
        return f"≥ {math.floor(self.epsilon * 100) / 100:.2f}"


@dataclass(frozen=True)
class Estimate:
    """A guess at epsilon without any guarantee: it may lie above the true value."""

    epsilon: float
    method: str

    def __str__(self) -> str:
        return f"≈ {self.epsilon:.2f} (no bound)"


@dataclass(frozen=True)
class Exposure:
    """Bits by which a secret outranks others of its kind, at most `most` = log2(all of them).

    `interval`: of the rank, where that was found among a sample of the others.
    """

    bits: float
    interval: Interval
    most: float
    confidence: float
    method: str

    def __str__(self) -> str:
        low, high = self.interval
        return f"≈ {self.bits:.1f} bits [{low:.1f}, {high:.1f}] of {self.most:.1f} (no bound)"
