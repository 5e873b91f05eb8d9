"""Epsilon of all that a device took part in, by the device's own count.

Schedules that never repeat a noise would make every participation dearer to account than the last:
beyond `MANY` different costs, noise is rounded down and rates up by at most 1 % each, which only
raises epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sottovoce.client.agent.journal import StepCost
from sottovoce.privacy.accounting.local_bound import epsilon_bound

MANY = 64
_GRID = 0.01


def epsilon_spent(costs: Sequence[tuple[StepCost, int]], delta: float) -> float:
    """Upper bound on epsilon at `delta` of some participations, each cost with its count.

    inf where one of them had no noise on the device; 0 for none.

    *Guarantee*: the device's updates are (epsilon, delta)-DP for each of its examples, under
    add/remove, against an observer who sees every one of them (`fleet`).
    *Assumes*: each participation ran as its `StepCost` says: independent secret coins, fresh noise.
    """
    if any(cost.noise_multiplier is None and count for cost, count in costs):
        return math.inf
    steps = [
        (cost.noise_multiplier, cost.sampling_rate, cost.steps * count)
        for cost, count in costs
        if cost.noise_multiplier is not None and cost.sampling_rate > 0
    ]
    return epsilon_bound(steps if len(steps) <= MANY else map(_rounded, steps), delta)


def _rounded(step: tuple[float, float, int]) -> tuple[float, float, int]:
    """No cheaper a step, one of few."""
    noise, rate, count = step
    down, up = math.floor(math.log(noise) / _GRID), math.ceil(math.log(rate) / _GRID)
    return min(noise, math.exp(down * _GRID)), min(1.0, max(rate, math.exp(up * _GRID))), count
