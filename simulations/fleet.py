"""The simulated fleet: virtual devices, trained in groups by batched tensor programs.

Nothing exists for a device that was not sampled. What a device contributes depends on (round,
device) alone: not on the group it trained in, on padding, or on the order of devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.alone import LoneTrainer
from sottovoce.client.bag_trainer import BagTrainer, make_bag_trainer
from sottovoce.client.cohort import Chunk, Draw, chunks, cut_group, draw_cohort
from sottovoce.client.coins import has_dropout
from sottovoce.client.fleet import Fleet, FleetReply, LocalTraining
from sottovoce.client.group_coins import GroupCoins
from sottovoce.client.groups import GroupData, LocalUpdates
from sottovoce.client.round_sum import Figures, Room, new_room, room_shapes
from sottovoce.client.round_sum import RoundSum as RoundSum
from sottovoce.client.tasks import Task
from sottovoce.client.training import GroupTrainer
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.simulations.attendance import Attendance, noted
from sottovoce.simulations.blocks import (
    Block,
    block_devices,
    by_block,
    cut_blocks,
    expected_work,
    heavy,
    join,
    one_thread,
    spans,
)
from sottovoce.simulations.canary_devices import canaries_of, direction_update
from sottovoce.simulations.group_size import (
    ALONE,
    BAGS,
    NATIVE,
    GroupSize,
    Way,
    possible_ways,
)
from sottovoce.simulations.population import Population
from sottovoce.simulations.workers import Workers, layout_of
from sottovoce.strategies.levels import activity_levels

AT_ONCE = 512  # most devices whose examples are gathered in one go
# With CUDA, autograd has threads once it has run, and nothing may be forked any more: where there
# are to be workers, this process never trains.
MANY_BLOCKS = 1 if torch.version.cuda is None else 0
NOTHING = np.zeros(0, dtype=np.int64)

Trained = tuple[list[Draw], GroupData, LocalUpdates]


class SimulatedFleet(Fleet):
    """Virtual devices of a population.

    `source`: keyed randomness of batches and of on-device noise. `group_size`: devices that train
    at once; None lets the fleet choose (`GroupSize`). `workers`: processes that train blocks of
    devices (`Workers`); with 1 this process trains them.
    `engine`: grouped, or opacus, which trains device by device. `attendance`: which of the devices
    that are asked take part, and with how much of their work; None: all, with all of it.

    *Guarantee*: with `training.example`, each local step is the Gaussian mechanism for the example
    unit under add/remove that `ExampleClipping` states for its round, at the Poisson rate of the
    device's level, and the whole update is post-processing of the noised steps. Every device's
    signal has norm at most S = `training.update_clip_norm`, and the noise that passes beside it has
    the variance that `training` of the round declares (`LocalTraining.noise_variance`) in every
    coordinate. `LocalDescent` says how, optimiser by optimiser.
    *Assumes*: honest devices; activity levels are public.
    """

    def __init__(
        self,
        population: Population,
        task: Task,
        model: nn.Module,
        training: LocalTraining,
        source: NoiseSource,
        group_size: int | None = None,
        workers: int = 1,
        engine: str = "grouped",
        attendance: Attendance | None = None,
    ) -> None:
        self.population, self.task, self.model = population, task, model
        self.training, self.source, self.workers = training, source, workers
        self.engine, self.drops, self.attendance = engine, has_dropout(model), attendance
        self.canaries = canaries_of(population)
        self._bags: BagTrainer | None = None
        positions = training.plan.batch_size * task.max_length
        ways = possible_ways(model, training, engine, positions)
        if group_size is not None and engine != "opacus":
            ways = [Way(engine, group_size)]
        elif engine == "grouped":
            self._bags = make_bag_trainer(model, task, training)
            ways = ways if self._bags is None else [Way(NATIVE, BAGS)]
        self.size = GroupSize(ways, fixed=source.reproducible)
        self._trainers: dict[Way, GroupTrainer | LoneTrainer] = {}
        self._heavy = heavy(model, training, task.max_length)
        self._processes: Workers | None = None

    def train(
        self,
        parameters: dict[str, Tensor],
        devices: NDArray[np.int64],
        server_round: int,
        levels: NDArray[np.uint8] | None = None,
    ) -> FleetReply:
        first_device = int(devices.min()) if len(devices) else 0
        self.population.at_round(server_round).expect(devices)  # read while the first ones train
        devices, canaries = self._apart(devices)
        blocks, absent = self._blocks(devices, levels, server_round)
        total = RoundSum(self.model, self.training, server_round)
        with one_thread():
            for figures, room in self._sums(parameters, blocks, server_round):
                total.merge(figures, room)
            self._add_canaries(total, canaries, server_round)
        reply = total.reply(self.source.generator("untouched rows", server_round, first_device))
        return noted(reply, absent)

    def train_blocks(
        self,
        parameters: dict[str, Tensor],
        blocks: list[Block],
        server_round: int,
        room: Callable[[], Room],
    ) -> Iterator[RoundSum]:
        """The sum of each of `blocks` in turn, each in a new `room`; one gathering for all."""
        devices, levels = join(blocks)
        population = self.population.at_round(server_round)
        draws = draw_cohort(
            population, devices, self.training.plan, server_round, self.source, levels
        )
        if self.attendance is not None:  # all are here, some with a part of their steps
            draws, _ = self.attendance.apply(draws, server_round)
        parts = by_block(draws, blocks)
        whole = [draw for part in parts for draw in part]
        (chunk,) = chunks(population, self.task, whole, len(whole))
        first = end = 0
        for part in parts:
            end += len(part)
            own = replace(chunk, draws=chunk.draws[:end], numbers=chunk.numbers[:end])
            total = RoundSum(self.model, self.training, server_round, room())
            while first < end:
                way = self.size.next()
                if way.engine == NATIVE:
                    self._train_bags(parameters, own, first, way.devices, total)
                else:
                    total.add(*self._train_group(parameters, own, first, way, server_round))
                first = min(first + way.devices, end)
            yield total

    def close(self) -> None:
        """End the worker processes; a later round starts new ones."""
        if self._processes is not None:
            self._processes.close()
        self._processes = None

    def _apart(self, devices: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
        """Devices that train, and canaries that hand over a direction."""
        if self.canaries is None or self.canaries.kind != "direction":
            return devices, []
        are = self.canaries.are(devices)
        return devices[~are], devices[are].tolist()

    def _add_canaries(self, total: RoundSum, canaries: list[int], server_round: int) -> None:
        """Add what canaries hand over, which is clipped, noised and counted as any other."""
        shapes = {name: tensor.shape for name, tensor in total.sums.items()}
        for device in canaries:
            assert self.canaries is not None
            total.add(*direction_update(
                self.canaries, device, self.training, shapes, total.table, server_round
            ))

    def _blocks(
        self, devices: NDArray[np.int64], levels: NDArray[np.uint8] | None, server_round: int
    ) -> tuple[list[Block], dict[str, int]]:
        """The cohort in blocks, and counts of the devices that conditions keep from its work."""
        plan, absent = self.training.plan, dict[str, int]()
        activity = self.population.at_round(server_round).activity
        steps, rows = expected_work(activity[devices], plan)
        if self.attendance is not None:
            own = activity_levels(activity[devices]) if levels is None else levels
            asked = [
                Draw(device, level, [NOTHING] * count)
                for device, level, count in zip(
                    devices.tolist(), own.tolist(), steps.tolist(), strict=True
                )
            ]
            here, absent = self.attendance.apply(asked, server_round)
            devices = np.array([draw.device for draw in here], dtype=np.int64)
            if levels is not None:
                levels = np.array([draw.level for draw in here], dtype=np.uint8)
            whole, rows = expected_work(activity[devices], plan)
            steps = np.array([len(draw.steps) for draw in here], dtype=np.int64)
            rows = rows * steps / np.maximum(whole, 1)
        size = block_devices(len(devices), self.size.devices, heavy=self._heavy)
        return cut_blocks(devices, levels, (steps, rows), size), absent

    def _sums(
        self, parameters: dict[str, Tensor], blocks: list[Block], server_round: int
    ) -> Iterator[tuple[Figures, Room]]:
        """Every block's sum, in order; its room is used again for the next."""
        if self.workers > 1 and len(blocks) > MANY_BLOCKS:
            yield from self._workers(parameters).train(parameters, blocks, server_round)
            return
        room = new_room(room_shapes(self.model, self.training))
        for some in spans(blocks, AT_ONCE):
            for total in self.train_blocks(parameters, some, server_round, lambda: room):
                yield total.figures, room

    def _workers(self, parameters: dict[str, Tensor]) -> Workers:
        now = self._processes
        if now is None or now.count != self.workers or now.layout != layout_of(parameters):
            self.close()
            self._processes = now = Workers(self, parameters, self.workers, AT_ONCE)
        return now

    def _train_group(
        self,
        parameters: dict[str, Tensor],
        chunk: Chunk,
        first: int,
        way: Way,
        server_round: int,
    ) -> Trained:
        began = time.perf_counter()
        trainer = self._trainers.get(way) or self._trainer(way)
        trainer.training = self.training
        vocabulary = parameters[trainer.table].shape[0] if trainer.table else 0
        data = cut_group(chunk, first, way.devices, trainer.table_input, vocabulary)
        here = slice(first, first + way.devices)
        draws = chunk.draws[here]
        coins = GroupCoins(self.source, server_round, draws, chunk.numbers[here])
        noise = coins.toss(data, self.training, dropout=self.drops)
        updates = trainer.train(parameters, data, server_round, noise)
        work = sum(draw.rows for draw in draws)
        self.size.measured(way, work, time.perf_counter() - began)
        return draws, data, updates

    def _train_bags(
        self, parameters: dict[str, Tensor], chunk: Chunk, first: int, devices: int, total: RoundSum
    ) -> None:
        """Train a group for `total`, device by device in C."""
        assert self._bags is not None
        here = slice(first, first + devices)
        draws = chunk.draws[here]
        coins = GroupCoins(self.source, total.round, draws, chunk.numbers[here])
        noised = total.training.step_deviation > 0
        streams = coins.streams("device noise") if noised else None
        updates = self._bags.train(parameters, chunk, first, devices, streams, total)
        total.note(draws, updates)

    def _trainer(self, way: Way) -> GroupTrainer | LoneTrainer:
        parts = self.model, self.task, self.training
        self._trainers[way] = LoneTrainer(*parts) if way.engine == ALONE else GroupTrainer(
            *parts, way.devices, way.engine, lends=True
        )
        return self._trainers[way]
