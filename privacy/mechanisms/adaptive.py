"""The coordinator's mechanism with a clip norm that follows a private quantile of updates' norms.

Each round releases two things about one cohort: the noised sum of updates clipped to S, and the
noised number of devices that stayed below S, by which S moves. Source: Andrew et al. 2021,
arXiv:1905.03871, algorithm 1; see `sottovoce.privacy.optimizer.quantile`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sottovoce.privacy.mechanisms.device import DeviceMechanism
from sottovoce.privacy.optimizer.quantile import QuantileClip

Tensors = dict[str, Tensor]


class AdaptiveMechanism:
    """Noised sum and noised count of a round. `quantile` holds S and moves it.

    `noise_multiplier`: z, of the round as a whole; the sum alone gets `sum_multiplier`, which is
    larger. `expected_cohort_size`: public; what the count is divided by.

    *Guarantee*: a round is one Gaussian release of multiplier z for the device unit, observer
    `release`, sampled as its cohort is: scaled to equal noise, a device moves the sum by at most
    1 / sum_multiplier and the count by at most 1 / (2 count_noise), whose squares add up to z^-2;
    under replace-one by twice that. S of later rounds is post-processing of noised counts.
    *Assumes*: devices add no noise of their own; fleets clip to the S they were sent, and count
    devices by their norms before clipping.
    """

    def __init__(
        self, quantile: QuantileClip, noise_multiplier: float, expected_cohort_size: float
    ) -> None:
        self.quantile, self.noise_multiplier = quantile, noise_multiplier
        self.expected_cohort_size = expected_cohort_size
        self.sum_multiplier = quantile.sum_multiplier(noise_multiplier)

    @property
    def clip_norm(self) -> float:
        """S of the round that comes next."""
        return self.quantile.clip_norm

    @property
    def deviation(self) -> float:
        """Standard deviation of that round's release in each coordinate."""
        return self.sum_multiplier * self.clip_norm

    def release(
        self, sums: Tensors, local_variance: float, generator: np.random.Generator
    ) -> Tensors:
        """The noised sums. Raises ValueError where devices added noise of their own."""
        if local_variance:
            raise ValueError(
                f"local_variance={local_variance:g} must be 0: a clip norm that follows counts "
                "covers no noise of devices' own"
            )
        plain = DeviceMechanism(self.clip_norm, self.sum_multiplier)
        return plain.release(sums, 0.0, generator)

    def observe(self, devices: int, clipped: float, generator: np.random.Generator) -> None:
        """Move S by how many of a round's `devices` were not `clipped`; after `release`."""
        below = devices - min(max(clipped, 0.0), float(devices))
        noise = self.quantile.count_noise * float(generator.standard_normal())
        self.quantile.update(below - 0.5 * devices + noise, self.expected_cohort_size)

    def state(self) -> Tensors:
        """Tensors that `load` restores, exactly."""
        return {"clip_norm": torch.tensor(self.clip_norm, dtype=torch.float64)}

    def load(self, state: Tensors) -> None:
        self.quantile.clip_norm = float(state["clip_norm"])
