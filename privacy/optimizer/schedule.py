"""Noise multipliers step by step: constant, or falling from epoch to epoch (Dupuy et al. 2022,
arXiv:2107.14586)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class NoiseSchedule:
    """sigma decay^(step // steps_per_epoch); `decay` 1 is constant noise.

    *Guarantee*: public, fixed before training. The ledger gets each step's own sigma, and
    accountants compose them as they are: late steps with little noise are dear.

    Raises ValueError for impossible settings.
    """

    noise_multiplier: float
    decay: float = 1.0
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier} must be 0 or more and finite"
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"noise_decay={self.decay} must be above 0 and at most 1")
        if self.steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={self.steps_per_epoch} must be at least 1")

    def at(self, step: int) -> float:
        """The noise multiplier of step 0, 1, ..."""
        epoch = step // self.steps_per_epoch
        return float(self.noise_multiplier * self.decay**epoch)
