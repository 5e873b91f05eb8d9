"""The thresholds of K devices through one participation: fixed, or each after its own quantile.

With `quantile`, every device starts from the public `clip_norm`, and after each step moves its C
by how many gradients were below it, counted with noise (Andrew et al. 2021, arXiv:1905.03871).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sottovoce.client.example_clipping import ExampleClipping
from sottovoce.privacy.gradients.clipping import Clipping


class Thresholds:
    """The same rule in every step. `rule`: for the engine. `deviation`: of the noise in a step's
    mean gradient: a number, or (n,) where the n devices that take a step differ.
    """

    rule: Clipping | None
    deviation: float | Tensor

    def __init__(self, example: ExampleClipping | None, batch_size: int) -> None:
        self.rule = None if example is None else example.rule
        self.deviation = 0.0 if example is None else example.deviation(batch_size)

    def take(self, devices: int) -> None:
        """A step of the first `devices` begins: fewer from step to step."""

    def count(self, norms: Tensor, present: Tensor) -> None:
        """Note the norms of one step's units, group by group, where `present`."""

    def move(self) -> None:
        """The step is over."""


class QuantileThresholds(Thresholds):
    """Thresholds that follow each device's own noised counts.

    `counters`: generators of the count noise, one for each device that is really there.

    *Guarantee*: with noise of `deviation` on the mean gradient, a device's step, sum and count
    together, is the Gaussian mechanism that `ExampleClipping` states (`QuantileClip`); `rule` and
    `deviation` of the next step are post-processing of the noised counts before it.
    """

    def __init__(
        self,
        example: ExampleClipping,
        batch_size: int,
        devices: int,
        counters: list[np.random.Generator],
    ) -> None:
        self._example, self._counters = example, counters
        self._units = example.units(batch_size)
        self._clips = [example.quantile(batch_size) for _ in range(devices)]
        self._multiplier = self._clips[0].sum_multiplier(example.noise_multiplier)
        self.take(devices)

    def take(self, devices: int) -> None:
        self._here = devices
        self._counts = torch.zeros(devices, dtype=torch.float64)
        self._norms = torch.tensor([clip.clip_norm for clip in self._clips[:devices]])
        self.rule = self._example.rule.at(self._norms)
        self.deviation = self._norms * (self._multiplier / self._units)

    def count(self, norms: Tensor, present: Tensor) -> None:
        if not len(norms):
            return
        below, there = (part.view(self._here, -1) for part in (
            (norms <= self._per_unit(norms)) & present, present))
        self._counts += below.sum(1) - 0.5 * there.sum(1)

    def move(self) -> None:
        for k in range(min(self._here, len(self._counters))):
            noise = self._clips[k].count_noise * float(self._counters[k].standard_normal())
            self._clips[k].update(float(self._counts[k]) + noise, self._units)

    def _per_unit(self, norms: Tensor) -> Tensor:
        return self._norms.repeat_interleave(len(norms) // self._here)


def make_thresholds(
    example: ExampleClipping | None,
    batch_size: int,
    devices: int,
    counters: list[np.random.Generator] | None,
) -> Thresholds:
    """The thresholds that `example` asks for; `counters` are needed for a quantile."""
    if example is None or example.threshold != "quantile":
        return Thresholds(example, batch_size)
    if counters is None:
        raise ValueError("threshold=quantile needs generators for the noise on its counts")
    return QuantileThresholds(example, batch_size, devices, counters)
