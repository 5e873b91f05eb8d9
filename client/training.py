"""Local training of K devices at once; an edge device is K = 1.

Each device starts from the global model and takes its own number of steps along

    gradient + noise,    gradient = (sum of its clipped example gradients) / B

by its optimiser (`LocalDescent`), and what it hands over is clip(signal part) + noise part (see
`LocalUpdates`). The embedding table is cut down to the rows that a device's text touches wherever
all other rows would stay put: the cut changes nothing, and their noise is drawn once for the whole
sum (`RoundSum`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.descents import LocalDescent, columns
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.groups import (
    DeviceNoise,
    GroupData,
    LocalUpdates,
    length_buckets,
    shortened,
)
from sottovoce.client.tasks import Task
from sottovoce.client.thresholds import Thresholds, make_thresholds
from sottovoce.privacy.gradients.clipping import Clipping
from sottovoce.privacy.gradients.engine import ClippedSums, backward
from sottovoce.privacy.gradients.grouping import group
from sottovoce.privacy.gradients.micro_batches import MicroBatches

Backward = Callable[..., ClippedSums]


class GroupTrainer:
    """Trains K devices together on stacked weights; reused for group after group.

    `engine`: grouped, or opacus for any layer that Opacus can take apart, with `devices` = 1.
    `table`: name of the embedding parameter that is cut down, or None. `micro_batches`: of all
    devices together, 0 where examples are clipped one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        training: LocalTraining,
        devices: int,
        engine: str = "grouped",
    ) -> None:
        self.task, self.training, self.devices = task, training, devices
        self.grouped, self._backward = prepared(model, devices, engine)
        self.table, self.table_input = sparse_table(model, training)
        example, size = training.example, training.plan.batch_size
        micro = example is not None and example.mode == "micro_batch"
        self._units = size if example is None else example.units(size)
        self.micro_batches = int(self._units) * devices if micro else 0
        self.grouped.module.train()

    def train(
        self, parameters: dict[str, Tensor], data: GroupData, server_round: int, noise: DeviceNoise
    ) -> LocalUpdates:
        """Local training of the group from the global `parameters`, in some round."""
        self._load(parameters, data)
        tally = _Tally(self.devices)
        training = self.training.at(server_round)
        weights = {name: stack.detach() for name, stack in self.grouped.parameters.items()}
        descent = LocalDescent(training, weights, data.steps, noised=noise.sums is not None)
        thresholds = make_thresholds(
            training.example, training.plan.batch_size, self.devices, noise.counts
        )
        for step in range(len(data.rows)):
            gradients = self._gradients(data, step, thresholds, tally)
            active = torch.from_numpy(data.steps > step)
            deviation = thresholds.deviation
            drawn = self._step_noise(data, active, noise.sums, deviation) if noise.sums else None
            thresholds.move(active)
            descent.step(step, gradients, drawn, deviation)
        norms, finite = descent.finish()
        return LocalUpdates(
            descent.signal, descent.noise, finite, norms, descent.clipped,
            tally.losses, tally.visits, tally.clipped,
        )

    def _load(self, parameters: dict[str, Tensor], data: GroupData) -> None:
        with torch.no_grad():
            for name, stack in self.grouped.parameters.items():
                if name == self.table:
                    stack.data = parameters[name][torch.from_numpy(data.touched)]
                else:
                    stack.copy_(parameters[name].expand_as(stack))

    def _gradients(
        self, data: GroupData, step: int, thresholds: Thresholds, tally: _Tally
    ) -> dict[str, Tensor]:
        """Mean gradients of a step, or sums of clipped units over their expected number."""
        now = _Step.of(data, step)
        if thresholds.rule is None:
            now.weights /= np.maximum(now.present.sum(axis=1, keepdims=True), 1)
        total: dict[str, Tensor] = {}
        for part in self._parts(data.batch["lengths"].numpy()[now.rows]):
            for name, added in self._sums(data, now, part, thresholds, tally).items():
                if name in total:
                    total[name].add_(added)
                else:
                    total[name] = added
        if not total:
            units = self.micro_batches
            thresholds.count(torch.zeros(units), torch.ones(units, dtype=torch.bool))
            return {n: torch.zeros_like(p.data) for n, p in self.grouped.parameters.items()}
        if thresholds.rule is not None:
            for tensor in total.values():
                tensor.div_(self._units)
        return total

    def _parts(self, lengths: NDArray[np.int64]) -> list[slice]:
        """Columns of a step that go together; a micro-batch must be seen whole."""
        if self.micro_batches:
            return [slice(0, lengths.shape[1])] if lengths.size else []
        return length_buckets(lengths)

    def _sums(
        self, data: GroupData, now: _Step, part: slice, thresholds: Thresholds, tally: _Tally
    ) -> dict[str, Tensor]:
        rows, rule = now.rows[:, part].reshape(-1), thresholds.rule
        present = torch.from_numpy(now.present[:, part].reshape(-1))
        if data.seeds is not None:
            self.grouped.tape.row_seeds = torch.from_numpy(data.seeds[rows, now.number])
        losses = self.task.losses(self.grouped.module, shortened(data.batch, rows))
        weighted = losses * torch.from_numpy(now.weights[:, part].reshape(-1))
        micro = None
        if data.micro_batches is not None:
            unit = torch.from_numpy(data.micro_batches[rows, now.number])
            micro = MicroBatches(unit, self.micro_batches)
        found = self._backward(self.grouped, weighted, rule, self.devices, micro)
        if rule is not None:
            units = present if micro is None else torch.ones(micro.count, dtype=torch.bool)
            thresholds.count(found.norms, units)
        tally.add(losses.detach(), present, clipped_rows(found.norms, rule, micro))
        return found.sums

    def _step_noise(
        self,
        data: GroupData,
        active: Tensor,
        generators: list[np.random.Generator],
        deviation: float | Tensor,
    ) -> dict[str, Tensor]:
        """A step's noise of each active device: the touched rows of a cut table, else all."""
        drawn = {name: torch.zeros_like(p.data) for name, p in self.grouped.parameters.items()}
        for k in torch.nonzero(active).flatten().tolist():
            for name, tensor in drawn.items():
                target = tensor[k, : data.touched_counts[k]] if name == self.table else tensor[k]
                generators[k].standard_normal(dtype=np.float32, out=target.numpy())
        for tensor in drawn.values():
            own = columns(deviation, tensor) if isinstance(deviation, Tensor) else deviation
            tensor.mul_(own)
        return drawn


@dataclass
class _Step:
    """A step of all devices: `rows` (K, B), which of them are `present`, and their weights."""

    number: int
    rows: NDArray[np.int64]
    present: NDArray[np.bool_]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, data: GroupData, number: int) -> _Step:
        rows = data.rows[number]
        present = rows != len(data.batch["lengths"]) - 1
        return cls(number, rows, present, present.astype(np.float32))


class _Tally:
    """Running totals over the examples of each of a group's devices, whose rows come in turn."""

    def __init__(self, devices: int) -> None:
        self.losses = torch.zeros(devices, dtype=torch.float64)
        self.visits = torch.zeros(devices, dtype=torch.int64)
        self.clipped = 0

    def add(self, losses: Tensor, present: Tensor, clipped: int) -> None:
        counted, devices = torch.where(present, losses, 0.0).nan_to_num(), len(self.visits)
        self.losses += counted.double().reshape(devices, -1).sum(1)
        self.visits += present.reshape(devices, -1).sum(1)
        self.clipped += clipped


def clipped_rows(norms: Tensor, rule: Clipping | None, micro: MicroBatches | None) -> int:
    """Rows whose gradient, or whose micro-batch's mean, was longer than its threshold."""
    if rule is None:
        return 0
    clip = rule.clip_norm
    if isinstance(clip, Tensor):
        clip = clip.repeat_interleave(len(norms) // len(clip))
    over = norms > clip
    return int((over if micro is None else micro.to_rows(over)).sum())


def prepared(model: nn.Module, devices: int, engine: str) -> tuple[Any, Backward]:
    """The model made ready for an engine, and the engine's backward pass.

    Raises ConfigError for an unknown engine, or where Opacus is not installed; UnsupportedLayer
    where the engine cannot take a layer.
    """
    if engine == "grouped":
        return group(model, devices), backward
    if engine != "opacus":
        raise ConfigError(f"engine={engine} does not exist: choose grouped or opacus")
    from sottovoce.privacy.gradients import opacus_engine

    return opacus_engine.group(model, devices), opacus_engine.backward


def sparse_table(model: nn.Module, training: LocalTraining) -> tuple[str | None, str | None]:
    """Name of the token embedding's parameter and of the batch entry that feeds it.

    (None, None) when the model names none, when its table is frozen or shared with another layer,
    which would see the cut, or when `training` moves rows that the text does not touch.
    """
    inputs: dict[str, str] = getattr(model, "sparse_inputs", {})
    for module, entry in inputs.items() if training.keeps_untouched_rows else ():
        weight = model.get_submodule(module).weight
        users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
        if isinstance(weight, nn.Parameter) and weight.requires_grad and len(users) == 1:
            return f"{module}.weight", entry
    return None, None
