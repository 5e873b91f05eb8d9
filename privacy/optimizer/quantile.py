"""A clip norm that follows a private quantile of the gradients' norms.

    fraction = (sum over units of (1[norm <= C] - 1/2) + N(0, sigma_b^2)) / expected units + 1/2
    C <- C exp(-learning_rate (fraction - target))

Each step releases two things about one sample: the clipped sum and the count. Rescaled to equal
sensitivity they are one Gaussian vector, as good as a single release of the noise multiplier

    z = (z_sum^-2 + (2 sigma_b)^-2)^(-1/2),    so    z_sum = (z^-2 - (2 sigma_b)^-2)^(-1/2)

is what the sum must get for the step to be worth the z that was asked for. A C read from norms
without such noise would be a release that no ledger knows of.

Source: Andrew, Thakkar, McMahan and Ramaswamy 2021, arXiv:1905.03871, algorithm 1, theorem 1.
"""

from __future__ import annotations

import math

from torch import Tensor

RANGE = 1e6  # how far, as a factor, the threshold may go from where it began


class QuantileClip:
    """State of one private quantile estimate; `clip_norm` is the current threshold, a release.

    `clip_norm`: the first one, chosen without the data. `count_noise`: sigma_b, standard deviation
    of the noise on the count; the paper takes a twentieth of the expected units. `target`: the
    quantile to follow. `learning_rate`: of the geometric update.

    *Guarantee*: a step with `sum_multiplier(z)` on the sum and `count_noise` on the count is a
    Gaussian mechanism of noise multiplier z. The count has sensitivity 1/2 under add/remove of a
    unit. For micro-batches an example turns one indicator round, which counts 1 where its mean
    counts 2C: both are twice as much, so the split is the same and the step is worth z / 2.
    *Assumes*: sum and count come from one batch, clipped at `clip_norm` as it was before the step.

    Raises ValueError for impossible settings.
    """

    def __init__(
        self,
        clip_norm: float,
        *,
        count_noise: float,
        target: float = 0.5,
        learning_rate: float = 0.2,
    ) -> None:
        for name, value in (("clip_norm", clip_norm), ("count_noise", count_noise),
                            ("quantile_learning_rate", learning_rate)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0 and finite")
        if not 0 < target < 1:
            raise ValueError(f"target_quantile={target} must be between 0 and 1")
        self.first = self.clip_norm = clip_norm
        self.count_noise, self.target, self.learning_rate = count_noise, target, learning_rate

    def sum_multiplier(self, noise_multiplier: float) -> float:
        """z_sum: deviation of the sum's noise over `clip_norm`, so that the whole is worth z."""
        if noise_multiplier == 0:
            return 0.0
        left = noise_multiplier**-2 - (2 * self.count_noise) ** -2
        if left <= 0:
            raise ValueError(
                f"count_noise={self.count_noise:g} must be above noise_multiplier / 2="
                f"{noise_multiplier / 2:g}: the count alone spends more than the step may"
            )
        return float(left**-0.5)

    def counted(self, norms: Tensor) -> float:
        """What one batch's units (units,) add to the count; private until it is noised."""
        return float((norms <= self.clip_norm).sum()) - 0.5 * len(norms)

    def update(self, noised_count: float, expected_units: float) -> None:
        """Move the threshold, given a count with its noise: post-processing."""
        fraction = noised_count / expected_units + 0.5
        moved = math.log(self.clip_norm / self.first) - self.learning_rate * (
            fraction - self.target
        )
        limit = math.log(RANGE)
        self.clip_norm = self.first * math.exp(min(max(moved, -limit), limit))


def default_count_noise(expected_units: float, noise_multiplier: float) -> float:
    """A twentieth of the expected units, and at least z: the sum's noise grows by 15 % at most."""
    return max(expected_units / 20, noise_multiplier)
