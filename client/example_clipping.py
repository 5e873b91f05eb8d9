"""On-device eDP-SGD: how a local step bounds and noises its examples, and what that is worth.

    clipping   per_example    each example's gradient is clipped
               micro_batch    the mean gradient of each micro-batch is (Dupuy et al. 2022,
                              arXiv:2107.14586)
    threshold  fixed, automatic, layer_wise, or quantile: each device's own C, which follows
               noised counts through one participation
    noise      constant, or smaller by a factor from round to round (decay)

The paper lets noise fall from epoch to epoch of one training; here a round is an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.gradients.clipping import Clipping, Mode, Threshold
from sottovoce.privacy.gradients.micro_batches import count_of
from sottovoce.privacy.optimizer.quantile import QuantileClip, default_count_noise
from sottovoce.privacy.optimizer.schedule import NoiseSchedule


@dataclass(frozen=True)
class ExampleClipping:
    """What each local step does to its examples' gradients.

    `clip_norm`: bound C on one example's gradient, or on a micro-batch's mean; with `quantile`
    the first one of every participation. `noise_multiplier`: sigma, standard deviation of the
    noise on a step's sum over C, in round 1. `mode`, `threshold`: see the module.
    `micro_batch_size`: examples of an expected micro-batch. `target_quantile`,
    `quantile_learning_rate`, `count_noise`: of `QuantileClip`; None for the last takes a twentieth
    of the expected batch, and sigma at least. `noise_decay`: round r has sigma decay^(r - 1).
    `rounds`: of the run, needed for a decay.

    *Guarantee*: a step of round r is a Gaussian mechanism for the example unit under add/remove,
    of noise multiplier sigma decay^(r - 1) / `multiple`: the sum's sensitivity is C, and 2C with
    micro-batches (`Clipping`). With `quantile` that is the worth of sum and count together
    (`QuantileClip`); C starts anew in each participation, and nothing of it leaves the device but
    in the noised update. `booked` says what the ledger gets.
    *Assumes*: what `Clipping` and `QuantileClip` assume; micro-batches drawn by coins of each
    example's own, among a public number of them.
    """

    clip_norm: float
    noise_multiplier: float
    mode: Mode = "per_example"
    threshold: Threshold = "fixed"
    micro_batch_size: float = 4
    target_quantile: float = 0.5
    quantile_learning_rate: float = 0.2
    count_noise: float | None = None
    noise_decay: float = 1.0
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.noise_decay != 1 and self.rounds is None:
            raise ConfigError(
                f"noise_decay={self.noise_decay:g} needs rounds: the ledger must know the last one"
            )
        if self.threshold == "quantile" and self.count_noise is not None:
            self._check_split(self.count_noise)

    @property
    def rule(self) -> Clipping:
        """How gradients are clipped, at the first threshold."""
        return Clipping(self.clip_norm, self.mode, self.threshold)

    @property
    def multiple(self) -> float:
        """Sensitivity of a step's sum over C under add/remove of an example."""
        return self.rule.multiple

    @property
    def steady(self) -> bool:
        """Whether the noise of a step has the same, public deviation on every device."""
        return self.threshold != "quantile"

    def units(self, batch_size: int) -> float:
        """What a step's sum is divided by: examples of an expected batch, or micro-batches."""
        micro = self.mode == "micro_batch"
        return count_of(batch_size, self.micro_batch_size) if micro else batch_size

    def at(self, server_round: int) -> ExampleClipping:
        """The same with the noise of round 1, 2, ..., and no decay. ValueError past `rounds`."""
        if self.noise_decay == 1:
            return self
        return replace(self, noise_multiplier=self._noise(server_round), noise_decay=1.0)

    def booked(self, participation: int) -> float:
        """Noise multiplier in the ledger for participation 1, 2, ... of a level's busiest device.

        With a decay, participation k is booked with the noise of round `rounds` + 1 - k.

        *Guarantee*: the ledger of a level whose busiest device took part k times costs no less
        than what any device of the level went through. It took part at most k times, once a
        round, so its last round is at most R = `rounds`, the one before at most R - 1, and so on:
        each has at least the noise of one of the k entries. Booking a round's own noise whenever
        the largest number of participations rises would not do: a device that joins late, though
        seldom, meets less noise than the one that set the record early.
        """
        if self.noise_decay == 1 or self.rounds is None:
            return self.noise_multiplier / self.multiple
        return self._noise(self.rounds + 1 - participation) / self.multiple

    def quantile(self, batch_size: int) -> QuantileClip:
        """A device's threshold at the start of a participation."""
        count_noise = self.count_noise
        if count_noise is None:
            count_noise = default_count_noise(self.units(batch_size), self.noise_multiplier)
        return QuantileClip(
            self.clip_norm, count_noise=count_noise, target=self.target_quantile,
            learning_rate=self.quantile_learning_rate,
        )

    def deviation(self, batch_size: int) -> float:
        """Standard deviation of the noise in a step's mean gradient, at the first threshold."""
        multiplier = self.noise_multiplier
        if self.threshold == "quantile":
            multiplier = self.quantile(batch_size).sum_multiplier(multiplier)
        return multiplier * self.clip_norm / self.units(batch_size)

    def _noise(self, server_round: int) -> float:
        if not 1 <= server_round <= (self.rounds or 0):
            raise ValueError(
                f"round={server_round} is not one of the run's rounds={self.rounds}: with "
                "noise=decay it would have less noise than the ledger says"
            )
        return NoiseSchedule(self.noise_multiplier, self.noise_decay).at(server_round - 1)

    def _check_split(self, count_noise: float) -> None:
        if count_noise <= self.noise_multiplier / 2:
            raise ConfigError(
                f"privacy.example.count_noise={count_noise:g} must be above half of "
                f"noise_multiplier={self.noise_multiplier:g}: the count alone would spend more "
                "than a step may; raise it, or set it to null"
            )
