"""What one step of eDP-SGD releases: how gradients are clipped, how much noise, for which event.

Everything that changes epsilon stands here; models, optimisers and engines change speed only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.gradients.clipping import Clipping, Mode, Threshold
from sottovoce.privacy.gradients.micro_batches import count_of
from sottovoce.privacy.optimizer.quantile import QuantileClip, default_count_noise
from sottovoce.privacy.optimizer.schedule import NoiseSchedule

Noise = Literal["constant", "decay"]
PURPOSE = "eDP-SGD step"


@dataclass
class Release:
    """A noised mean of clipped units: sum of clipped vectors + noise, over `expected_units`.

    `rule`: mode and threshold. `schedule`: noise multipliers of the steps, over C.
    `expected_units`: examples of an expected batch, or micro-batches. `sampling_rate`: of Poisson
    batches; None claims no amplification. `quantile`: state of a moving threshold.

    *Guarantee*: with noise of deviation `deviation(step)` on the sum, and `count_noise` on the
    count where there is one, step `step` is the Gaussian mechanism that `event(step)` states, for
    the example unit under add/remove.
    *Assumes*: what `Clipping`, `MicroBatches` and `QuantileClip` assume.
    """

    rule: Clipping
    schedule: NoiseSchedule
    expected_units: float
    sampling_rate: float | None = None
    quantile: QuantileClip | None = None

    @property
    def clip_norm(self) -> float:
        """The threshold C of the coming step."""
        return float(self.rule.clip_norm) if self.quantile is None else self.quantile.clip_norm

    def sum_multiplier(self, step: int) -> float:
        """Deviation of the sum's noise over C."""
        asked = self.schedule.at(step)
        return asked if self.quantile is None else self.quantile.sum_multiplier(asked)

    def deviation(self, step: int) -> float:
        """Standard deviation of the noise in each coordinate of the sum."""
        return self.sum_multiplier(step) * self.clip_norm

    def event(self, step: int) -> GaussianEvent:
        """For the ledger: noise over sensitivity, sum and count together."""
        return GaussianEvent(
            noise_multiplier=self.schedule.at(step) / self.rule.multiple,
            sampling="none" if self.sampling_rate is None else "poisson",
            sampling_rate=1.0 if self.sampling_rate is None else self.sampling_rate,
            unit="example",
            relation="add_remove",
            observer="release",
            purpose=PURPOSE,
        )


def make_release(
    *,
    clip_norm: float | None,
    max_grad_norm: float | None,
    noise_multiplier: float,
    expected_batch_size: float,
    sampling_rate: float | None,
    clipping: Mode,
    micro_batch_size: float | None,
    threshold: Threshold,
    target_quantile: float,
    quantile_learning_rate: float,
    count_noise: float | None,
    noise: Noise,
    noise_decay: float | None,
    steps_per_epoch: int | None,
) -> Release:
    """The release that the arguments of `EDPSGD` describe; ValueError for impossible ones."""
    bound = _either(clip_norm, max_grad_norm)
    positive("clip_norm", bound)
    positive("expected_batch_size", expected_batch_size)
    if sampling_rate is not None and not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate={sampling_rate} must be above 0 and at most 1")
    schedule = _schedule(noise_multiplier, noise, noise_decay, steps_per_epoch, sampling_rate)
    rule = Clipping(float(bound), clipping, threshold)
    units = _units(clipping, micro_batch_size, expected_batch_size)
    release = Release(rule, schedule, units, sampling_rate)
    if threshold == "quantile":
        release.quantile = QuantileClip(
            float(bound), target=target_quantile, learning_rate=quantile_learning_rate,
            count_noise=(
                default_count_noise(units, noise_multiplier) if count_noise is None else count_noise
            ),
        )
    elif count_noise is not None:
        raise ValueError(f"count_noise={count_noise} needs threshold=quantile, not {threshold}")
    release.deviation(0)  # finds out whether count and sum can share the noise
    return release


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be above 0 and finite")


def _either(clip_norm: float | None, max_grad_norm: float | None) -> float:
    if clip_norm is not None and max_grad_norm is not None and clip_norm != max_grad_norm:
        raise ValueError(
            f"clip_norm={clip_norm} and max_grad_norm={max_grad_norm} are two names of one bound: "
            "give one of them"
        )
    found = max_grad_norm if clip_norm is None else clip_norm
    if found is not None and not isinstance(found, int | float):
        raise ValueError(f"clip_norm={found} must be one number; for layers: threshold=layer_wise")
    return 1.0 if found is None else found


def _units(mode: Mode, micro_batch_size: float | None, expected_batch_size: float) -> float:
    if mode != "micro_batch":
        if micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} needs clipping=micro_batch: with {mode} "
                "every example is a unit of its own"
            )
        return expected_batch_size
    if micro_batch_size is None or not 1 <= micro_batch_size < math.inf:
        raise ValueError(f"micro_batch_size={micro_batch_size} must be given and at least 1")
    return count_of(expected_batch_size, micro_batch_size)


def _schedule(
    noise_multiplier: float,
    noise: Noise,
    decay: float | None,
    steps_per_epoch: int | None,
    sampling_rate: float | None,
) -> NoiseSchedule:
    if noise not in get_args(Noise):
        raise ValueError(f"noise={noise!r} does not exist: choose constant or decay")
    if noise == "constant":
        if decay is not None:
            raise ValueError(f"noise_decay={decay} needs noise=decay")
        return NoiseSchedule(noise_multiplier)
    if decay is None:
        raise ValueError("noise=decay needs noise_decay, the factor from epoch to epoch")
    if steps_per_epoch is None and sampling_rate is None:
        raise ValueError("noise=decay needs steps_per_epoch, or a sampling_rate to derive it from")
    steps = round(1 / sampling_rate) if steps_per_epoch is None and sampling_rate else None
    return NoiseSchedule(noise_multiplier, decay, steps_per_epoch or steps or 0)
