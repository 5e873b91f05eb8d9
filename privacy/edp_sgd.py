"""`EDPSGD`: the eDP-SGD optimiser for one model in an ordinary training loop.

    optimizer = EDPSGD(model, lr=0.1, clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=64)
    losses = F.cross_entropy(optimizer.model(x), y, reduction="none")
    optimizer.step(losses)

Each step: clip every example's gradient to `clip_norm`, sum, add N(0, (noise_multiplier
clip_norm)^2), divide by the expected batch size, descend (Abadi et al. 2016, arXiv:1607.00133,
algorithm 1), with the clipped sum from one backward pass (`sottovoce.privacy.engine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sottovoce.privacy.engine import backward
from sottovoce.privacy.events import GaussianEvent
from sottovoce.privacy.grouping import track
from sottovoce.privacy.ledger import Ledger
from sottovoce.privacy.noise import NoiseSource


class EDPSGD:
    """DP-SGD on one model at about the price of SGD.

    `model`: its trainable parameters are moved in place. `lr`: learning rate. `clip_norm`: bound
    on one example's gradient (L2, all parameters together). `noise_multiplier`: standard
    deviation of the noise over `clip_norm`. `expected_batch_size`: what sums are divided by; the
    *expected* size of a Poisson batch, not the one drawn. `sampling_rate`: probability with which
    each example enters each batch; None claims no amplification. `generator`: source of noise,
    the operating system's entropy by default. `ledger`: where every step is written down.

    *Guarantee*: each step is a Gaussian mechanism of sensitivity `clip_norm` for the example unit
    under add/remove; `ledger` holds them for an accountant.
    *Assumes*: batches drawn by Poisson sampling at `sampling_rate` (empty ones are steps too);
    the observer sees models, not batches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        clip_norm: float = 1.0,
        noise_multiplier: float,
        expected_batch_size: float,
        sampling_rate: float | None = None,
        generator: np.random.Generator | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("clip_norm", clip_norm),
                            ("expected_batch_size", expected_batch_size)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0 and finite")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier={noise_multiplier} must be 0 or more and finite")
        if sampling_rate is not None and not 0 < sampling_rate <= 1:
            raise ValueError(f"sampling_rate={sampling_rate} must be above 0 and at most 1")
        self._grouped = track(model)
        self.lr, self.clip_norm, self.noise_multiplier = lr, clip_norm, noise_multiplier
        self.expected_batch_size, self.sampling_rate = expected_batch_size, sampling_rate
        self.generator = generator or NoiseSource.from_system().generator("edp-sgd")
        self.ledger = ledger if ledger is not None else Ledger()

    @property
    def model(self) -> nn.Module:
        """The model to call in training; it shares all parameters with the one given."""
        return self._grouped.module

    def step(self, losses: Tensor | Callable[[nn.Module], Tensor]) -> Tensor:
        """One private step from per-example losses (rows,), or a callable that computes them.

        An empty batch (rows = 0) is a step of pure noise. Returns the unclipped gradient norms
        (rows,), which are private: do not publish them.
        """
        if callable(losses):
            losses = losses(self.model)
        sums, norms = self._sums(losses)
        self.ledger.append(self._event())
        with torch.no_grad():
            for name, parameter in self._grouped.parameters.items():
                noise = self.generator.standard_normal(tuple(parameter.shape), dtype=np.float32)
                release = torch.from_numpy(noise).to(parameter.device) * (
                    self.noise_multiplier * self.clip_norm
                )
                if name in sums:
                    release = release + sums[name][0]
                step = self.lr / self.expected_batch_size
                parameter.sub_(release.to(parameter.dtype), alpha=step)
        return norms

    def _sums(self, losses: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if losses.numel() == 0:
            return {}, torch.zeros(0)
        result = backward(self._grouped, losses, self.clip_norm, groups=1)
        return result.sums, result.norms

    def _event(self) -> GaussianEvent:
        return GaussianEvent(
            noise_multiplier=self.noise_multiplier,
            sampling="none" if self.sampling_rate is None else "poisson",
            sampling_rate=1.0 if self.sampling_rate is None else self.sampling_rate,
            unit="example",
            relation="add_remove",
            observer="release",
            purpose="eDP-SGD step",
        )
