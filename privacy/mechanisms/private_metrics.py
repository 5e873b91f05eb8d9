"""Training figures of a round that are released with noise, under the sample of its sum.

Every device contributes one vector v = (1, clipped?, loss, examples, norm) / sqrt(5), each entry
cut to [0, 1] by a public bound, so that |v| <= 1. The cohort's sum of vectors and the noised sum of
updates come from one sample: scaled to equal noise they are one Gaussian release of multiplier

    z = (z_sum^-2 + z_m^-2)^(-1/2),    so    z_sum = (z^-2 - z_m^-2)^(-1/2)

is what the sum must get for the round to be worth the z that was asked for (the split of Andrew et
al. 2021, arXiv:1905.03871, theorem 1, with a vector in place of a count).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FIGURES = ("devices", "clipped", "loss", "examples", "norm")
"""Entries of a device's vector, each from 0 to 1; `devices` is 1."""

PREFIX = "bounded_"
"""What a fleet's totals call the sums of `FIGURES` over its devices."""

NORMS = 10.0
"""Updates' norms are cut at so many clip norms."""

LEAST_SHARE = 4.0
"""The usual z_m is at least so many z: noise on the sum grows by 3.3 % at most."""


@dataclass(frozen=True)
class MetricBounds:
    """Public bounds that a device cuts its figures to: mean loss of an example, and visits."""

    loss: float
    examples: int


@dataclass(frozen=True)
class PrivateMetrics:
    """The noised figures of a round. `whole`: z, of the round with all it releases; `own`: z_m.

    `bounds`: what devices cut their figures to.

    *Guarantee*: with `rest` as the noise multiplier of everything else that is released about the
    round's cohort, the round is one Gaussian release of multiplier `whole` for the device unit,
    observer `release`, sampled as its cohort is: a device moves the vectors' sum by at most 1, and
    the noise on it has deviation `own` in every coordinate.
    *Assumes*: fleets cut every device's figures before they add them up; the other releases of the
    round come from the same cohort, and their noise is drawn apart from this.

    Raises ValueError where the figures alone would spend more than the round may.
    """

    whole: float
    own: float
    bounds: MetricBounds

    def __post_init__(self) -> None:
        if not (math.isfinite(self.own) and self.own > self.whole):
            raise ValueError(
                f"metrics_noise_multiplier={self.own:g} must be above noise_multiplier="
                f"{self.whole:g}: the figures alone would spend more than a round may"
            )

    @property
    def rest(self) -> float:
        """Noise multiplier that is left for the sum (and the count of a moving clip norm)."""
        if self.whole == 0:
            return 0.0
        return float((self.whole**-2 - self.own**-2) ** -0.5)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on a figure's sum over devices, each at most 1."""
        return self.own * math.sqrt(len(FIGURES))

    def noised(
        self, totals: Mapping[str, float], generator: np.random.Generator
    ) -> dict[str, float]:
        """The figures' sums over devices with noise, from the fleets' `totals`."""
        noise = self.deviation * generator.standard_normal(len(FIGURES))
        sums = np.array([totals.get(PREFIX + name, 0.0) for name in FIGURES])
        return dict(zip(FIGURES, (sums + noise).tolist(), strict=True))

    def metrics(self, noised: Mapping[str, float], clip_norm: float) -> dict[str, float]:
        """A round's metrics from noised sums alone: post-processing.

        `clip_norm`: of the round. Means are over devices, each figure cut to its bound first.
        """
        devices = max(noised["devices"], 1.0)
        share = {name: min(max(noised[name] / devices, 0.0), 1.0) for name in FIGURES}
        return {
            "devices": float(max(round(noised["devices"]), 0)),
            "examples": float(max(round(noised["examples"] * self.bounds.examples), 0)),
            "clipped_fraction": share["clipped"],
            "mean_signal_norm": share["norm"] * NORMS * clip_norm,
            "train_loss": share["loss"] * self.bounds.loss,
        }

    def claims(self) -> dict[str, Any]:
        """What the ledger says of the figures."""
        return {
            "noise_multiplier": self.own, "figures": list(FIGURES),
            "loss_bound": self.bounds.loss, "examples_bound": self.bounds.examples,
            "norm_bound": f"{NORMS:g} clip norms",
        }


def default_noise(expected_devices: float, noise_multiplier: float) -> float:
    """Noise of a hundredth of the expected devices on every figure, and at least 4 z."""
    wanted = expected_devices / (100 * math.sqrt(len(FIGURES)))
    return max(wanted, LEAST_SHARE * noise_multiplier, 1e-3)
