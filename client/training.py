"""Local training of K devices; an edge device is K = 1.

Each device starts from the global model and takes its own number of steps along

    gradient + noise,    gradient = (sum of its clipped example gradients) / B

by its optimiser (`LocalDescent`), and what it hands over is clip(signal part) + noise part (see
`LocalUpdates`). The embedding table is cut down to the rows that a device's text touches wherever
all other rows would stay put: the cut changes nothing, and their noise is drawn once for the whole
sum (`RoundSum`).

All K devices take their first step from the same weights: one set of matrices serves all of their
rows, and stacks of weights begin with the second step. Devices come in the order of their numbers
of steps, so that those that still train are always the first ones, and nothing is computed for the
others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.descents import LocalDescent
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.groups import (
    DeviceNoise,
    GroupData,
    LocalUpdates,
    shortened,
)
from sottovoce.client.lazy_rows import LazyRows
from sottovoce.client.step_noise import StepNoise
from sottovoce.client.step_parts import Part, by_length, by_size, pass_rows
from sottovoce.client.tables import sparse_table as sparse_table
from sottovoce.client.tasks import Task
from sottovoce.client.thresholds import QuantileThresholds, Thresholds, make_thresholds
from sottovoce.privacy.gradients.clipping import Clipping
from sottovoce.privacy.gradients.engine import ClippedSums, backward, descend
from sottovoce.privacy.gradients.grouping import group
from sottovoce.privacy.gradients.micro_batches import MicroBatches

Backward = Callable[..., ClippedSums]
Tensors = dict[str, Tensor]


class GroupTrainer:
    """Trains groups of up to `devices`, one group after another.

    `engine`: grouped, all devices together on stacked weights; or opacus, for any layer that Opacus
    can take apart, with `devices` = 1. `table`: name of the embedding parameter that is cut
    down, or None. `micro_batches`: of each device, 0 where examples are clipped one by one.
    `lends`: whether the noise of a device's last step, which no training of
    its own sees any more, is left to whoever adds updates up (`LocalUpdates.owed`), and by plain
    SGD that of table rows after they were read last (`LazyRows`).
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        training: LocalTraining,
        devices: int,
        engine: str = "grouped",
        *,
        lends: bool = False,
    ) -> None:
        self.task, self.training, self.engine = task, training, engine
        # Its stacks take the size of whichever devices train: none need be kept for all of them.
        most = 1 if engine == "grouped" else devices
        self.grouped, self._backward = prepared(model, most, engine)
        self.table, self.table_input = sparse_table(model, training)
        self.lends = lends and training.linear
        example, size = training.example, training.plan.batch_size
        micro = example is not None and example.mode == "micro_batch"
        self._units = size if example is None else example.units(size)
        self.micro_batches = int(self._units) if micro else 0
        self._pass_rows = pass_rows(model, task.max_length, self.table)
        self.grouped.module.train()

    def train(
        self, parameters: Tensors, data: GroupData, server_round: int, noise: DeviceNoise
    ) -> LocalUpdates:
        """Local training of the group from the global `parameters`, in some round."""
        training, devices = self.training.at(server_round), len(data.steps)
        lazy = self._lazy_rows(training, parameters, data, noise)
        origin = {
            name: F.embedding(torch.from_numpy(data.touched), parameters[name])
            if name == self.table
            else parameters[name].expand(devices, *parameters[name].shape)
            for name in self.grouped.parameters if lazy is None or name != self.table
        }
        tally = _Tally(devices)
        descent = LocalDescent(
            training, origin, data.steps, noised=noise.sums is not None,
            lazy={} if lazy is None or self.table is None else {self.table: lazy},
        )
        thresholds = make_thresholds(
            training.example, training.plan.batch_size, devices, noise.counts
        )
        table = self.table if lazy is None else None
        steps = StepNoise(noise.sums, data, origin, table, lends=self.lends)
        for number in range(len(data.rows)):
            here = int((data.steps > number).sum())
            thresholds.take(here)
            read = None if lazy is None else lazy.read(number)
            now = Part.of(data, number, here)
            place = _Place(parameters, origin, descent, here, lazy, read)
            if descent.direct and self._descend(data, now, place, tally):
                continue
            gradients = self._gradients(data, now, place, thresholds, tally)
            deviation = thresholds.deviation
            drawn = steps.draw(number, here, deviation)
            longest = self._longest(now, thresholds)
            thresholds.move()
            descent.step(number, gradients, drawn, deviation, longest)
        norms, finite = descent.finish()
        self._let_go(parameters)
        return LocalUpdates(
            descent.signal, descent.noise, finite, norms, descent.clipped,
            tally.losses, tally.visits, tally.clipped, steps.owed(training),
            None if lazy is None else lazy.materialised,
        )

    def _lazy_rows(
        self, training: LocalTraining, parameters: Tensors, data: GroupData, noise: DeviceNoise
    ) -> LazyRows | None:
        """The cut table where its rows may wait for their noise."""
        if self.table is None or self.table_input is None or training.example is None:
            return None
        if not (training.plain and training.linear and (self.lends or noise.sums is None)):
            return None
        return LazyRows(
            data, data.batch[self.table_input], parameters[self.table], training.learning_rate,
            noise.sums, training.step_deviation,
        )

    def _longest(self, now: Part, thresholds: Thresholds) -> Tensor | None:
        """(n,) bounds on the norms of a step's clipped sums over the expected number of units."""
        rule = thresholds.rule
        if rule is None or isinstance(rule.clip_norm, Tensor):
            return None
        present = torch.from_numpy(now.present.sum(axis=1))
        units = torch.full_like(present, self.micro_batches) if self.micro_batches else present
        return units * (rule.clip_norm / self._units)

    def _put(self, place: _Place, chosen: NDArray[np.int64] | None = None) -> None:
        """The model on the weights of all devices that take a step, or of those chosen.

        Before the first step that is the global model but for a cut table, and those of a single
        device are no stack.
        """
        stacks = self.engine == "opacus" or self.grouped.freezes_stacks
        count = place.here if chosen is None else len(chosen)
        if self.grouped.freezes_stacks:
            self.grouped.resize(count)
        for name, parameter in self.grouped.parameters.items():
            if not place.moved and not stacks and name != self.table:
                parameter.data = place.parameters[name]
                continue
            own = place.stack(name)
            own = own if chosen is None else own[torch.from_numpy(chosen)]
            parameter.data = own[0] if count == 1 and not stacks else own

    def _let_go(self, parameters: Tensors) -> None:
        """Hold on to no device's weights between groups."""
        if self.engine == "grouped" and not self.grouped.freezes_stacks:
            for name, parameter in self.grouped.parameters.items():
                parameter.data = parameters[name]

    def _descend(self, data: GroupData, now: Part, place: _Place, tally: _Tally) -> bool:
        """Take a whole step without building gradients, where that is possible."""
        parts = by_length(now, data.batch["lengths"].numpy()) if now.rows.size else []
        if self.engine != "grouped" or len(parts) != 1:
            return False
        self._put(place)
        if not place.moved:
            place.descent.begin()
        now.average()
        losses, weighted, present = self._losses(data, now)
        here = {name: stack[: place.here] for name, stack in place.descent.weights.items()}
        descend(self.grouped, weighted, here, self.training.learning_rate)
        tally.add(losses.detach(), present, now, 0)
        return True

    def _gradients(
        self,
        data: GroupData,
        now: Part,
        place: _Place,
        thresholds: Thresholds,
        tally: _Tally,
    ) -> Tensors:
        """Mean gradients of a step, or sums of clipped units over their expected number."""
        if thresholds.rule is None:
            now.average()
        total: Tensors = {}
        for part in self._parts(now, data, thresholds):
            self._put(place, part.chosen)
            for name, added in self._sums(data, part, thresholds, tally, place.lazy).items():
                if name not in total:
                    total[name] = added
                elif part.chosen is None:
                    total[name].add_(added)
                else:
                    total[name].index_add_(0, torch.from_numpy(part.chosen), added)
        if not total:
            units = self.micro_batches * place.here
            thresholds.count(torch.zeros(units), torch.ones(units, dtype=torch.bool))
            return {n: torch.zeros(place.stack(n).shape) for n in self.grouped.parameters}
        return total

    def _parts(self, now: Part, data: GroupData, thresholds: Thresholds) -> list[Part]:
        """Passes of a step: the first one is of all devices.

        A micro-batch must be seen whole, and so must the units that a quantile is counted over.
        """
        if not now.rows.size:
            return []
        if self.micro_batches:
            return [now]
        lengths = data.batch["lengths"].numpy()
        whole = self.engine == "opacus" or isinstance(thresholds, QuantileThresholds)
        parts = [now] if whole else by_size(now, self._pass_rows)
        return [bucket for part in parts for bucket in by_length(part, lengths)]

    def _sums(
        self,
        data: GroupData,
        now: Part,
        thresholds: Thresholds,
        tally: _Tally,
        lazy: LazyRows | None,
    ) -> Tensors:
        losses, weighted, present = self._losses(data, now, lazy)
        rule, micro, groups = thresholds.rule, None, len(now.rows)
        if data.micro_batches is not None:
            unit = torch.from_numpy(data.micro_batches[now.rows.reshape(-1), now.number])
            micro = MicroBatches(unit, self.micro_batches * groups)
        found = self._backward(self.grouped, weighted, rule, groups, micro, self._units)
        if rule is not None:
            units = present if micro is None else torch.ones(micro.count, dtype=torch.bool)
            thresholds.count(found.norms, units)
        tally.add(losses.detach(), present, now, clipped_rows(found.norms, rule, micro))
        return found.sums

    def _losses(
        self, data: GroupData, now: Part, lazy: LazyRows | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of a part's rows, the same times their weights, and which rows are present."""
        rows = now.rows.reshape(-1)
        if data.seeds is not None:
            self.grouped.tape.row_seeds = torch.from_numpy(data.seeds[rows, now.number])
        if self.engine == "grouped":
            self.grouped.tape.fill(torch.from_numpy(now.fillers()), rows.size)
        batch = shortened(data.batch, rows)
        if self.engine == "grouped":
            self.grouped.tape.measure(batch["lengths"], max(int(batch["lengths"].max()), 1))
        if lazy is not None and self.table_input is not None:
            width = batch[self.table_input].shape[1:2]
            batch[self.table_input] = lazy.renumbered(now.rows, now.chosen, *width)
        losses = self.task.losses(self.grouped.module, batch)
        weighted = losses * torch.from_numpy(now.weights.reshape(-1))
        return losses, weighted, torch.from_numpy(now.present.reshape(-1))


@dataclass
class _Place:
    """Where devices are before a step: `here` of them take it. `read`: (n, R, D) rows of a lazy
    table that they read in it.
    """

    parameters: Tensors
    origin: Tensors
    descent: LocalDescent
    here: int
    lazy: LazyRows | None = None
    read: Tensor | None = None

    def stack(self, name: str) -> Tensor:
        """(n, *shape) of those that take the step."""
        weights = self.descent.weights or self.origin
        if self.read is not None and name not in self.origin:
            return self.read
        return weights[name][: self.here]

    @property
    def moved(self) -> bool:
        """Whether they have left the global model."""
        return bool(self.descent.weights)


class _Tally:
    """Running totals over the examples of each of a group's devices, whose rows come in turn."""

    def __init__(self, devices: int) -> None:
        self.losses = torch.zeros(devices, dtype=torch.float64)
        self.visits = torch.zeros(devices, dtype=torch.int64)
        self.clipped = 0

    def add(self, losses: Tensor, present: Tensor, part: Part, clipped: int) -> None:
        """Add a part of a step."""
        devices = len(part.rows)
        places = slice(0, devices) if part.chosen is None else torch.from_numpy(part.chosen)
        counted = torch.where(present, losses, 0.0).nan_to_num()
        self.losses[places] += counted.double().reshape(devices, -1).sum(1)
        self.visits[places] += present.reshape(devices, -1).sum(1)
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
