"""Waiting longer after every failure, each device at a time of its own.

Full jitter (Brooker 2015): thousands of devices that lost their gateway together do not come back
together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class Backoff:
    """Seconds to wait: drawn between a quarter and the whole of `first_s`, doubled every time."""

    first_s: float = 1.0
    most_s: float = 300.0
    failures: int = 0
    draw: random.Random = field(default_factory=random.SystemRandom)

    def next_s(self) -> float:
        """How long to wait after one more failure."""
        bound = min(self.most_s, self.first_s * 2.0 ** min(self.failures, 40))
        self.failures += 1
        return bound * self.draw.uniform(0.25, 1.0)

    def jittered_s(self, seconds: float) -> float:
        """About `seconds`, a quarter more at most, never less."""
        return seconds * self.draw.uniform(1.0, 1.25)

    def reset(self) -> None:
        self.failures = 0
