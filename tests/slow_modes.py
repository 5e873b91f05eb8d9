"""The slow definition of a device's clipping modes: one gradient at a time, by plain formulas."""

from __future__ import annotations

import math

import numpy as np
import torch
from reference import train_device
from small_fleets import noise_stream, slow_noise
from torch import Tensor, nn

from sottovoce.client.cohort import Draw
from sottovoce.client.fleet import ExampleClipping
from sottovoce.client.training import sparse_table
from sottovoce.simulations.fleet import SimulatedFleet

Tensors = dict[str, Tensor]

MODES = {
    "micro_batch": ExampleClipping(0.4, 0.7, mode="micro_batch", micro_batch_size=2),
    "automatic": ExampleClipping(0.8, 0.7, threshold="automatic"),
    "layer_wise": ExampleClipping(0.8, 0.7, threshold="layer_wise"),
    "quantile": ExampleClipping(
        0.8, 0.7, threshold="quantile", target_quantile=0.3, quantile_learning_rate=0.9,
        count_noise=0.6,
    ),
    "decay": ExampleClipping(0.8, 0.7, noise_decay=0.6, rounds=4),
    "quantile of micro-batches, with decay": ExampleClipping(
        0.4, 0.7, mode="micro_batch", micro_batch_size=2, threshold="quantile",
        quantile_learning_rate=0.9, noise_decay=0.6, rounds=4,
    ),
    "automatic micro-batches": ExampleClipping(
        0.4, 0.7, mode="micro_batch", micro_batch_size=2, threshold="automatic"
    ),
}


class SlowDevice:
    """One device's steps by a mode, with the fleet's own batches, coins and noise."""

    def __init__(
        self, fast: SimulatedFleet, draw: Draw, touched: np.ndarray, server_round: int
    ) -> None:
        self.fast, self.draw, self.touched = fast, draw, touched
        self.training = fast.training.at(server_round)
        example = self.training.example
        assert example is not None
        self.example, self.clip, size = example, example.clip_norm, self.training.plan.batch_size
        micro = example.mode == "micro_batch"
        self.units = max(1, round(size / example.micro_batch_size)) if micro else size
        everything = fast.population.examples(np.array([draw.device]))
        self.batch = fast.task.collate(everything)
        self.noise = noise_stream(fast, draw.device, server_round)
        self.counts, coins = (
            fast.source.generator(purpose, server_round, draw.device)
            for purpose in ("device counts", "micro-batches")
        )
        shape = (len(self.batch["lengths"]), len(draw.steps))
        self.coins = coins.integers(0, self.units - 1, size=shape, endpoint=True)
        self.table, _ = sparse_table(fast.model, fast.training)
        self.clips: list[float] = []

    def update(self) -> tuple[Tensors, Tensors]:
        """The clipped signal, and the noise beside it."""
        training, optimizer = self.training, self.training.optimizer
        apart = optimizer.name == "sgd" and self.example.threshold != "quantile"
        self.joined = not apart
        signal, drift, _ = train_device(
            self.fast.model, lambda model, rows: torch.zeros(len(rows)),
            [step.tolist() for step in self.draw.steps],
            learning_rate=training.learning_rate, batch_size=training.plan.batch_size,
            example_clip=self.example.clip_norm if apart else None,
            update_clip=training.update_clip_norm, noise=self.drawn if apart else None,
            mean_gradients=self.mean, momentum=optimizer.momentum,
        )
        return signal, drift

    def mean(self, model: nn.Module, step: int) -> Tensors:
        numbers = self.draw.steps[step].tolist()
        units = [self.gradient(model, n) for n in numbers]
        if self.example.mode == "micro_batch":
            units = [
                _mean([u for u, n in zip(units, numbers, strict=True) if self.coins[n, step] == m],
                      model)
                for m in range(self.units)
            ]
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for unit in units:
            for name, part in self.clipped(unit).items():
                total[name] += part / self.units
        if self.joined:
            total = {n: total[n] + noise for n, noise in self.drawn().items()}
            self.clips.append(self.clip)
            self.move(sum((_norm(u) <= self.clip) - 0.5 for u in units))
        return total

    def gradient(self, model: nn.Module, number: int) -> Tensors:
        loss = self.fast.task.losses(model, {k: v[[number]] for k, v in self.batch.items()})[0]
        named = dict(model.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(named.items(), found, strict=True)
        }

    def clipped(self, unit: Tensors) -> Tensors:
        clip, norm = self.clip, _norm(unit)
        if self.example.threshold == "automatic":
            return {n: g * clip / (norm + 0.01) for n, g in unit.items()}
        if self.example.threshold == "layer_wise":
            layers = {name.rpartition(".")[0] for name in unit}
            parts = [{n: g for n, g in unit.items() if n.rpartition(".")[0] == x} for x in layers]
            share = clip / math.sqrt(len(layers))
            return {n: g * min(1, share / (_norm(part) or 1))
                    for part in parts for n, g in part.items()}
        return {n: g * min(1, clip / (norm or 1)) for n, g in unit.items()}

    def drawn(self) -> Tensors:
        multiplier = self.example.noise_multiplier
        if self.example.threshold == "quantile":
            count_noise = self._count_noise()
            multiplier = (multiplier**-2 - (2 * count_noise) ** -2) ** -0.5
        drawn = slow_noise(self.noise, self.fast.model, self.table, self.touched)
        return {n: tensor * (multiplier * self.clip / self.units) for n, tensor in drawn.items()}

    def move(self, count: float) -> None:
        if self.example.threshold == "quantile":
            count += self._count_noise() * self.counts.standard_normal()
            below = count / self.units + 0.5
            rate, target = self.example.quantile_learning_rate, self.example.target_quantile
            self.clip *= math.exp(-rate * (below - target))

    def _count_noise(self) -> float:
        usual = max(self.units / 20, self.example.noise_multiplier)
        return self.example.count_noise or usual


def _mean(units: list[Tensors], model: nn.Module) -> Tensors:
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for unit in units:
        for name, part in unit.items():
            total[name] += part / len(units)
    return total


def _norm(unit: Tensors) -> float:
    return math.sqrt(sum(float(g.double().pow(2).sum()) for g in unit.values()))
