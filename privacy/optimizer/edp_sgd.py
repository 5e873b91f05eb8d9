"""`EDPSGD`: the eDP-SGD optimiser for one model in an ordinary training loop.

    optimizer = EDPSGD(model, lr=0.1, clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=64)
    losses = F.cross_entropy(optimizer.model(x), y, reduction="none")
    optimizer.step(losses)

Each step: clip every example's gradient to `clip_norm`, sum, add N(0, (noise_multiplier
clip_norm)^2), divide by the expected batch size, descend (Abadi et al. 2016, arXiv:1607.00133,
algorithm 1), with the clipped sum from one backward pass (`sottovoce.privacy.gradients.engine`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.gradients.clipping import Mode, Threshold
from sottovoce.privacy.gradients.engine import ClippedSums
from sottovoce.privacy.gradients.micro_batches import MicroBatches
from sottovoce.privacy.optimizer.draws import Draws, Randomness
from sottovoce.privacy.optimizer.moves import Moves
from sottovoce.privacy.optimizer.releases import Noise, make_release, positive

Losses = Tensor | Callable[[nn.Module], Tensor]
Engine = Literal["grouped", "opacus"]


class EDPSGD(Optimizer):
    """DP-SGD on one model at about the price of SGD; a `torch.optim.Optimizer` for schedulers.

    `model`: its trainable parameters are moved in place. `lr`: learning rate; may change between
    steps, by `optimizer.lr` or a scheduler. `clip_norm`, or `max_grad_norm`: bound C on one
    example's gradient (L2, all parameters together), 1 by default. `noise_multiplier`: standard
    deviation of the noise over C. `expected_batch_size`: what sums are divided by; the *expected*
    size of a Poisson batch, not the one drawn. `sampling_rate`: probability with which each
    example enters each batch; None claims no amplification.

    `clipping`, `threshold`: see `sottovoce.privacy.Clipping`. With `micro_batch`, sums are divided
    by the number of micro-batches, expected_batch_size / `micro_batch_size`. For `quantile`:
    `target_quantile`, `quantile_learning_rate` and `count_noise` (`QuantileClip`). `noise`:
    constant, or decay by `noise_decay` every `steps_per_epoch` steps (1 / sampling_rate by
    default).

    `optimizer`: sgd with `momentum`, or adam, freed of the noise's bias (`AdamBC`), with `betas`.
    `weight_decay` is decoupled and acts on the weights alone. `engine`: grouped, or opacus for
    layers that only Opacus knows. `generator`: source of noise and coins, the operating system's
    entropy by default. `ledger`: where every step is written down.

    *Guarantee*: each step is a Gaussian mechanism for the example unit under add/remove, of noise
    multiplier `noise_multiplier`, or half of it with `micro_batch`, whose sensitivity is 2C; the
    ledger holds each step's own for an accountant. What follows (momentum, Adam, weight decay) is
    post-processing.
    *Assumes*: batches drawn by Poisson sampling at `sampling_rate` (empty ones are steps too); or,
    without it, that no example's presence changes who else is in a batch. Row i of the losses
    depends on example i only, and an example has one row in a batch. The observer sees models, not
    batches.

    Raises ValueError for impossible settings, UnsupportedLayer for a layer without per-example
    gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        clip_norm: float | None = None,
        max_grad_norm: float | None = None,
        noise_multiplier: float,
        expected_batch_size: float,
        sampling_rate: float | None = None,
        clipping: Mode = "per_example",
        micro_batch_size: float | None = None,
        threshold: Threshold = "fixed",
        target_quantile: float = 0.5,
        quantile_learning_rate: float = 0.2,
        count_noise: float | None = None,
        noise: Noise = "constant",
        noise_decay: float | None = None,
        steps_per_epoch: int | None = None,
        optimizer: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        engine: Engine = "grouped",
        generator: Randomness = None,
        ledger: Ledger | None = None,
    ) -> None:
        positive("lr", lr)
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay={weight_decay} must be 0 or more and finite")
        self.release = make_release(
            clip_norm=clip_norm, max_grad_norm=max_grad_norm, noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size, sampling_rate=sampling_rate,
            clipping=clipping, micro_batch_size=micro_batch_size, threshold=threshold,
            target_quantile=target_quantile, quantile_learning_rate=quantile_learning_rate,
            count_noise=count_noise, noise=noise, noise_decay=noise_decay,
            steps_per_epoch=steps_per_epoch,
        )
        self.expected_batch_size = expected_batch_size
        self._moves = Moves(
            optimizer, lr, momentum=momentum, betas=betas, noise_variance=self._variance(0)
        )
        self._grouped, self._backward = _engine(engine, model)
        self._draws = Draws(generator)
        self.ledger = ledger if ledger is not None else Ledger()
        self.steps = 0
        self._sums: dict[str, Tensor] | None = None
        self._count = 0.0
        super().__init__(
            list(self._grouped.parameters.values()), {"lr": lr, "weight_decay": weight_decay}
        )

    @staticmethod
    def make_private(**settings: Any) -> tuple[nn.Module, EDPSGD, DataLoader[Any]]:
        """See `sottovoce.privacy.optimizer.from_opacus.make_private`."""
        from sottovoce.privacy.optimizer.from_opacus import make_private

        return make_private(**settings)

    @staticmethod
    def make_private_with_epsilon(**settings: Any) -> tuple[nn.Module, EDPSGD, DataLoader[Any]]:
        """See `sottovoce.privacy.optimizer.from_opacus.make_private_with_epsilon`."""
        from sottovoce.privacy.optimizer.from_opacus import make_private_with_epsilon

        return make_private_with_epsilon(**settings)

    @property
    def model(self) -> nn.Module:
        """The model to call in training; it shares all parameters with the one given."""
        module: nn.Module = self._grouped.module
        return module

    @property
    def lr(self) -> float:
        return float(self.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self.param_groups[0]["lr"] = value

    @property
    def clip_norm(self) -> float:
        """The threshold C of the coming step."""
        return self.release.clip_norm

    @property
    def noise_multiplier(self) -> float:
        """The noise multiplier asked for the coming step."""
        return self.release.schedule.at(self.steps)

    def get_epsilon(self, delta: float) -> float:
        """Epsilon of all steps in the ledger, for the example unit."""
        from sottovoce.privacy.accounting.accountants import epsilon

        return epsilon(self.ledger, delta, unit="example")

    def accumulate(self, losses: Losses) -> Tensor:
        """Add a part of a big batch, from its per-example losses (rows,), to the coming step.

        Clipped sums add up, so any division of a batch into parts gives the same step; noise and
        ledger come once, with `step`. Returns the unclipped norms (rows,), which are private: do
        not publish them. Not for micro-batches, which have to be seen whole.
        """
        if self._micro_batches and self._sums is not None:
            raise ValueError(
                "a micro-batch must be seen whole: give step() the whole batch, or use "
                "clipping=per_example"
            )
        if callable(losses):
            losses = losses(self.model)
        found = self._clipped(losses)
        total = self._sums or {}
        for name, part in found.sums.items():
            total[name] = total[name].add_(part) if name in total else part
        self._sums = total
        if self.release.quantile is not None:
            self._count += self.release.quantile.counted(found.norms)
        return found.norms

    def step(self, losses: Losses | None = None) -> Tensor:  # type: ignore[override]
        """One private step from per-example losses (rows,), or a callable that computes them.

        What `accumulate` has seen since the last step takes part. An empty batch (rows = 0) is a
        step of pure noise. Returns the unclipped gradient norms of the examples, or micro-batches,
        in `losses`, which are private: do not publish them.
        """
        if losses is None and self._sums is None:
            raise ValueError(
                "step() has no losses: give it the per-example losses (reduction='none') in place "
                "of loss.backward()"
            )
        norms = torch.zeros(0) if losses is None else self.accumulate(losses)
        sums, count = self._sums or {}, self._count
        self._sums, self._count = None, 0.0
        step, self.steps = self.steps, self.steps + 1
        self.ledger.append(self.release.event(step))
        self._moves.move(
            self._grouped.parameters, self._noised(sums, step), lr=self.lr,
            weight_decay=float(self.param_groups[0]["weight_decay"]),
            noise_variance=self._variance(step),
        )
        quantile = self.release.quantile
        if quantile is not None:
            noise = quantile.count_noise * float(self._draws.at("count", step).standard_normal())
            quantile.update(count + noise, self.release.expected_units)
        return norms

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the model's own group: ValueError for another, which no step would move."""
        if self.param_groups:
            raise ValueError(
                "EDPSGD moves the parameters of one model in one group: unfreeze them first and "
                "build it anew"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Neither copied nor pickled, see `Draws`; `state_dict` is what a run goes on from."""
        raise ValueError(
            "EDPSGD cannot be copied or pickled: both copies would draw the same noise; save "
            "state_dict() and load it into a new EDPSGD"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """For loops that call it: there is nothing to forget, and what was accumulated stays."""
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on: optimiser state, step count, threshold.

        Neither noise nor model nor ledger: save those as `Ledger.save` and torch do. Raises
        ValueError between `accumulate` and `step`, where private sums wait for their noise.
        """
        if self._sums is not None:
            raise ValueError("accumulated sums have no noise yet: call step() before state_dict()")
        own = {key: self.param_groups[0][key] for key in ("lr", "weight_decay")}
        return {"steps": self.steps, "param_group": own, "clip_norm": self.clip_norm,
                **self._moves.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`, with new noise.

        Raises ValueError where it is of another optimiser, where `ledger` lacks the steps taken
        so far, or where `generator` might repeat their noise.
        """
        steps = int(state_dict["steps"])
        if len(self.ledger) < steps:
            raise ValueError(
                f"the ledger has {len(self.ledger)} events and the state {steps} steps: pass the "
                "run's own, ledger=Ledger.load(...), or epsilon would come out too small"
            )
        self._draws.check_resumable(steps)
        self._draws.renew()
        self._moves.load(state_dict)
        self.steps, self._sums, self._count = steps, None, 0.0
        self.param_groups[0].update(state_dict["param_group"])
        if self.release.quantile is not None:
            self.release.quantile.clip_norm = float(state_dict["clip_norm"])

    @property
    def _micro_batches(self) -> int:
        """The public number of micro-batches; 0 where examples are clipped."""
        micro = self.release.rule.mode == "micro_batch"
        return int(self.release.expected_units) if micro else 0

    def _clipped(self, losses: Tensor) -> ClippedSums:
        if losses.shape == (0,):
            return ClippedSums({}, torch.zeros(self._micro_batches))
        micro = None
        if self._micro_batches:
            coins = self._draws.at("micro-batches", self.steps)
            micro = MicroBatches.drawn(losses.numel(), self._micro_batches, coins)
        rule = self.release.rule.at(self.clip_norm)
        found: ClippedSums = self._backward(self._grouped, losses, rule, 1, micro)
        return found

    def _variance(self, step: int) -> float:
        """Of the noise in each coordinate of the mean."""
        return float((self.release.deviation(step) / self.release.expected_units) ** 2)

    def _noised(self, sums: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The release, by name and in the order of the parameters."""
        generator, release = self._draws.at("edp-sgd", step), {}
        deviation, units = self._variance(step) ** 0.5, self.release.expected_units
        for name, parameter in self._grouped.parameters.items():
            noise = generator.standard_normal(tuple(parameter.shape), dtype=np.float32)
            full = torch.promote_types(parameter.dtype, torch.float32)
            gradient = torch.from_numpy(noise).to(parameter.device, full).mul_(deviation)
            if name in sums:
                gradient.add_(sums[name][0], alpha=1 / units)
            release[name] = gradient
        return release


def _engine(name: Engine, model: nn.Module) -> tuple[Any, Callable[..., ClippedSums]]:
    """The tracked model and the backward pass of the engine called `name`."""
    if name == "grouped":
        from sottovoce.privacy.gradients import engine, grouping

        return grouping.track(model), engine.backward
    if name == "opacus":
        from sottovoce.privacy.gradients import opacus_engine

        return opacus_engine.track(model), opacus_engine.backward
    raise ValueError(f"engine={name!r} does not exist: choose grouped or opacus")
