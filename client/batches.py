"""Which examples enter which local step.

With example-level privacy a device draws Poisson batches: example j enters step s independently
with probability q. Rate and number of steps depend on the device's public activity
*level* alone, so one example more or less changes nothing but its own coins. Without it a device
walks through a random part of its data, epoch by epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BatchPlan:
    """How a device divides its data into steps.

    `batch_size`: most examples a step (expected, for Poisson batches). `local_epochs`: expected
    visits of each example. `max_examples`: bound on the examples visited in one epoch (expected
    number for Poisson batches). `poisson`: independent coins instead of epochs.
    """

    batch_size: int
    local_epochs: int
    max_examples: int
    poisson: bool

    def rate(self, level: int) -> float:
        """Probability that an example enters a Poisson step."""
        return min(1.0, self.batch_size / largest(level))

    def steps(self, level: int, count: int) -> int:
        """Steps of a device at `level` with `count` examples; Poisson steps ignore the count."""
        size = largest(level) if self.poisson else count
        bounded = min(size, self.max_examples)
        return self.local_epochs * math.ceil(bounded / self.batch_size)


def largest(level: int) -> int:
    """Largest number of examples of a device at `level` (the last level is open)."""
    return (2 << level) - 1


def draw_batches(
    plan: BatchPlan, level: int, count: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Example numbers (below `count`) of each local step of one device; steps may be empty."""
    steps = plan.steps(level, count)
    if plan.poisson:
        chosen = generator.random((steps, count), dtype=np.float64) < plan.rate(level)
        return [np.flatnonzero(row) for row in chosen]
    batches: list[NDArray[np.int64]] = []
    per_epoch = steps // plan.local_epochs
    for _ in range(plan.local_epochs):
        order = generator.permutation(count)[: plan.max_examples]
        batches += np.array_split(order, np.arange(1, per_epoch) * plan.batch_size)
    return batches
