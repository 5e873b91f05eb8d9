"""A device's own coins for its examples: micro-batches and dropout masks.

The coin of an example in a step hangs on (round, device, step, example number) alone: not on which
other examples were drawn, on other devices, on padding, or on the order in which rows are computed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

LOW, HIGH = -(2**63), 2**63 - 1


def example_coins(
    generator: np.random.Generator, numbers: NDArray[np.int64], steps: int, low: int, high: int
) -> NDArray[np.int64]:
    """(examples, steps) independent uniform integers from `low` to `high`, both included.

    `generator`: of one purpose, round and device. `numbers`: (examples,) example numbers, sorted.
    """
    count = int(numbers[-1]) + 1 if len(numbers) else 0
    drawn = generator.integers(low, high, size=(count, steps), endpoint=True)
    return drawn[numbers]


def has_dropout(model: nn.Module) -> bool:
    """Whether some layer of the model drops units while it trains."""
    for module in model.modules():
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else None
        rate = getattr(module, "dropout", None) if rate is None else rate
        if isinstance(rate, float) and rate > 0:
            return True
    return False
