"""The coordinator's mechanism without a sampling promise: correlated noise on every round's sum.

DP-FTRL as a mechanism: x_t + S sigma (C^-1 z)_t is released in round t, x_t the sum of clipped
updates. What is promised rests on who may take part when, not on a secret draw, and holds for the
whole run at once. Sources: see `sottovoce.privacy.mechanisms.factorisation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.mechanisms.factorisation import Factorisation, from_json
from sottovoce.privacy.mechanisms.separation import Schedule

Tensors = dict[str, Tensor]

PURPOSE = "noised sums, one correlated release of all planned rounds"


class CorrelatedMechanism:
    """Noised sums of device updates of norm at most `clip_norm`, over the rounds of a schedule.

    `noise_multiplier`: standard deviation of z over `clip_norm`. `worth`: that over the sensitivity
    of the factorisation: the multiplier of the one Gaussian release that the run amounts to.

    *Guarantee*: all releases together are one Gaussian release of multiplier `worth` for the device
    unit under zero-out (the device takes part in the same rounds, with zeros in place of its
    signal), observer `release`. Devices may add noise of their own: given that noise, signals are
    still bounded by S, and divergences are jointly convex over it. No amplification is claimed.
    *Assumes*: a device takes part as `schedule` allows, which rounds being no function of anybody's
    data; one generator a round, used for nothing else.
    """

    def __init__(
        self,
        clip_norm: float,
        noise_multiplier: float,
        factorisation: Factorisation,
        schedule: Schedule,
    ) -> None:
        self.clip_norm, self.noise_multiplier = clip_norm, noise_multiplier
        self.factorisation, self.schedule = factorisation, schedule
        self.sensitivity = factorisation.sensitivity(schedule)
        self.worth = noise_multiplier / self.sensitivity
        self._deviations = np.sqrt(factorisation.row_variances())
        self._stream = factorisation.stream()

    @property
    def deviation(self) -> float:
        """Standard deviation of the newest release's noise in each coordinate."""
        scale = self.noise_multiplier * self.clip_norm
        return float(scale * self._deviations[max(self._stream.at, 1) - 1])

    def release(
        self, sums: Tensors, local_variance: float, generator: np.random.Generator
    ) -> Tensors:
        """The next round's noised sums. `local_variance`: of devices' own noise, not relied upon.

        Raises RunError past the planned rounds.
        """
        try:
            row = self._stream.next(_size(sums), generator)
        except ValueError as error:
            raise RunError(str(error)) from None
        noise = torch.from_numpy(row) * (self.noise_multiplier * self.clip_norm)
        names = sorted(sums)
        parts = torch.split(noise, [sums[name].numel() for name in names])
        shaped = dict(zip(names, parts, strict=True))
        return {name: value + shaped[name].view(value.shape) for name, value in sums.items()}

    def replay(
        self, rounds: int, like: Tensors, generator_of: Callable[[int], np.random.Generator]
    ) -> None:
        """Go on after `rounds` rounds of a run that was stopped. `like`: tensors as released."""
        self._stream.replay(rounds, _size(like), generator_of)

    def event(self, server_round: int | None) -> GaussianEvent:
        """What a round adds to the ledger; None: what the next round would.

        The first one stands for the whole plan, so that a run that ends early has paid in full. The
        others count nothing, and say that a release took place.

        Raises RunError where the round is not the next one: its noise would be another's.
        """
        ahead = self._stream.at + 1
        if server_round is not None and server_round != ahead:
            raise RunError(f"round {server_round} has no noise: the next one is round {ahead}")
        return GaussianEvent(
            noise_multiplier=self.worth,
            count=int(ahead == 1),
            sampling="none",
            unit="device",
            relation="zero_out",
            observer="release",
            purpose=PURPOSE,
            round=server_round,
        )

    def claims(self) -> dict[str, Any]:
        """What a reader must know to check the claim, as JSON values."""
        return {
            "factorisation": self.factorisation.to_json(),
            "rounds": self.schedule.rounds,
            "min_separation": self.schedule.min_separation,
            "max_participations": self.schedule.participations,
            "sensitivity": self.sensitivity,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
        }


def from_claims(claims: Mapping[str, Any]) -> CorrelatedMechanism:
    """The mechanism of a run under way, at its beginning: coefficients are never searched twice."""
    schedule = Schedule(claims["rounds"], claims["min_separation"], claims["max_participations"])
    return CorrelatedMechanism(
        claims["clip_norm"],
        claims["noise_multiplier"],
        from_json(claims["factorisation"]),
        schedule,
    )


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Epsilon of a rho-zCDP mechanism: Canonne et al. 2020, arXiv:2004.00010, corollary 13.

    For figures to set beside published ones; a Gaussian release has a smaller, exact one.
    """
    from scipy.optimize import minimize_scalar

    def bound(log_excess: float) -> float:
        order = 1 + math.exp(log_excess)
        rest = (math.log(delta) + math.log(order)) / (order - 1)
        return order * rho + math.log1p(-1 / order) - rest

    found = minimize_scalar(bound, bounds=(-12.0, 16.0), method="bounded")
    return max(0.0, float(found.fun))


def _size(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
