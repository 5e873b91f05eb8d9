"""The coordinator's mechanism: one noised sum of clipped device updates per round.

Source: DP-FedAvg, McMahan et al. 2018, arXiv:1710.06963, with Poisson sampling by activity level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class DeviceMechanism:
    """Noised sum of device updates whose signals have norm at most `clip_norm`.

    `noise_multiplier`: standard deviation of the noise that the claim rests on, over `clip_norm`.
    `local_variance_bound`: public bound M on the summed variance (per coordinate) of the noise that
    devices added themselves; 0 when they add none.

    *Guarantee*: a release is N(sum of signals, (sigma S)^2 + M) in every coordinate, whoever took
    part. Its law given the others' data is that of a Poisson-sampled Gaussian of multiplier
    `noise_multiplier`, for the device unit under add/remove, observer `release`. Proof: let device
    i join with probability p and add s(n) + n, its signal (norm <= S, it may depend on n) and its
    own noise n of variance v. The coordinator tops the devices' noise up to M, so given n what is
    left in the sum has variance w = (sigma S)^2 + M - v >= (sigma S)^2 when i is in. When i is out,
    the same total splits as n' + rest with n' ~ N(0, v), rest ~ N(0, w). Conditional on n = n' the
    pair is (1 - p) N(n, w) + p N(n + s(n), w) against N(n, w), which is dominated by the sampled
    Gaussian with shift S and deviation sigma S; divergences are jointly convex, so the mixture over
    n is too. Without the top-up the sum's variance would tell who took part, and no amplification
    by sampling could be claimed.
    *Assumes*: the noise of `devices` is as declared; it exceeds M with probability at most `slack`
    (`variance_bound`), in which case pure noise is released; the observer sees releases only.
    """

    clip_norm: float
    noise_multiplier: float
    local_variance_bound: float = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of a release in each coordinate."""
        central = (self.noise_multiplier * self.clip_norm) ** 2
        return math.sqrt(central + self.local_variance_bound)

    def release(
        self, sums: Tensors, local_variance: float, generator: np.random.Generator
    ) -> Tensors:
        """The noised sums. `local_variance`: variance that the devices' own noise brought in.

        Noise is drawn name by name in alphabetical order, whatever the order of `sums`.
        """
        missing = self.deviation**2 - local_variance
        within = local_variance <= self.local_variance_bound * (1 + 1e-9)
        scale = math.sqrt(max(missing, 0.0)) if within else self.deviation
        noise = {
            name: generator.standard_normal(tuple(sums[name].shape), dtype=np.float32)
            for name in sorted(sums)
        }
        return {
            name: (value if within else torch.zeros_like(value))
            + torch.as_tensor(noise[name]) * scale
            for name, value in sums.items()
        }


def variance_bound(
    groups: Iterable[tuple[float, float, float]], slack: float, largest: float
) -> float:
    """Bound on a sum of independent on/off variances that fails with probability at most `slack`.

    `groups`: (devices, inclusion probability, variance when included) of each activity level.
    `largest`: the largest single variance. Bernstein's inequality: for mean m, summed second moment
    V and log L = ln(1 / slack), the sum exceeds m + bL/3 + sqrt((bL/3)^2 + 2VL) with probability at
    most `slack`.
    """
    levels = list(groups)
    mean = sum(count * rate * variance for count, rate, variance in levels)
    second = sum(count * rate * variance**2 for count, rate, variance in levels)
    if mean == 0:
        return 0.0
    log = math.log(1 / slack)
    third = largest * log / 3
    return mean + third + math.sqrt(third**2 + 2 * second * log)
