"""The simulated fleet: virtual devices, trained in groups by batched tensor programs.

Nothing exists for a device that was not sampled. What a device contributes depends on (round,
device) alone: not on the group it trained in, on padding, or on the order of devices.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.coins import has_dropout
from sottovoce.client.figures import bounded_figures
from sottovoce.client.fleet import Fleet, FleetReply, LocalTraining
from sottovoce.client.groups import GroupData, LocalUpdates
from sottovoce.client.tasks import Task
from sottovoce.client.training import GroupTrainer, sparse_table
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.simulations.cohort import Chunk, Draw, chunks, cut_group, draw_cohort
from sottovoce.simulations.coins import GroupCoins
from sottovoce.simulations.population import Population

CHUNK_DEVICES = 512
CANDIDATES = (8, 16, 32)
USUAL = 16
TRIALS = 3
GROUP_BYTES = 1 << 30  # about, of a group in training
STACKS = 4  # of trainable weights: they, gradients, moves and noise
KEPT_BYTES = 10  # in a forward pass, at each position, for each output of a linear layer

Trained = tuple[list[Draw], GroupData, LocalUpdates]


class SimulatedFleet(Fleet):
    """Virtual devices of a population.

    `source`: keyed randomness of batches and of on-device noise. `group_size`: devices that train
    at once; None lets the fleet choose (`GroupSize`). `workers`: threads that train groups.
    `engine`: grouped, or opacus, which trains device by device.

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
    ) -> None:
        self.population, self.task, self.model = population, task, model
        self.training, self.source, self.workers = training, source, workers
        self.engine, self.drops = engine, has_dropout(model)
        alone = 1 if engine == "opacus" else group_size
        most = largest_group(model, training.plan.batch_size * task.max_length)
        self.size = GroupSize(alone, fixed=source.reproducible, most=most)
        self._idle: dict[int, list[GroupTrainer]] = {}

    def train(
        self,
        parameters: dict[str, Tensor],
        devices: NDArray[np.int64],
        server_round: int,
        levels: NDArray[np.uint8] | None = None,
    ) -> FleetReply:
        draws = draw_cohort(
            self.population, devices, self.training.plan, server_round, self.source, levels
        )
        total = RoundSum(self.model, self.training, server_round)
        for group_draws, data, updates in self._trained(parameters, draws, server_round):
            total.add(group_draws, data, updates)
        first_device = int(devices.min()) if len(devices) else 0
        return total.reply(self.source.generator("untouched rows", server_round, first_device))

    def _trained(
        self, parameters: dict[str, Tensor], draws: list[Draw], server_round: int
    ) -> Iterator[Trained]:
        """Every group trained, in order: sums do not depend on the number of workers."""
        groups = self._groups(draws)
        with ThreadPoolExecutor(
            self.workers, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            waiting: deque[Future[Trained]] = deque()
            for chunk, first, size in groups:
                waiting.append(
                    pool.submit(self._train_group, parameters, chunk, first, size, server_round)
                )
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _groups(self, draws: list[Draw]) -> Iterator[tuple[Chunk, int, int]]:
        """(chunk, first device, devices) of each group."""
        for chunk in chunks(self.population, self.task, draws, CHUNK_DEVICES):
            first = 0
            while first < len(chunk.draws):
                size = self.size.next()
                yield chunk, first, size
                first += size

    def _train_group(
        self,
        parameters: dict[str, Tensor],
        chunk: Chunk,
        first: int,
        size: int,
        server_round: int,
    ) -> Trained:
        began = time.perf_counter()
        idle = self._idle.setdefault(size, [])
        trainer = idle.pop() if idle else self._trainer(size)
        trainer.training = self.training
        vocabulary = parameters[trainer.table].shape[0] if trainer.table else 0
        data = cut_group(chunk, first, size, trainer.table_input, vocabulary)
        draws, numbers = chunk.draws[first : first + size], chunk.numbers[first : first + size]
        coins = GroupCoins(self.source, server_round, draws, numbers)
        noise = coins.toss(data, self.training, dropout=self.drops)
        updates = trainer.train(parameters, data, server_round, noise)
        idle.append(trainer)
        self.size.measured(size, len(draws), time.perf_counter() - began)
        return draws, data, updates

    def _trainer(self, size: int) -> GroupTrainer:
        return GroupTrainer(self.model, self.task, self.training, size, self.engine)


class RoundSum:
    """The sum of a fleet's clipped updates, with the noise of rows that nobody drew.

    A device's noise on an embedding row that its text never touched does not enter its training,
    only the sum. Independent Gaussians add up to one of their summed variance, so those draws are
    made once for the sum: exact in distribution.
    """

    def __init__(self, model: nn.Module, training: LocalTraining, server_round: int) -> None:
        self.training = training.at(server_round)
        self.table = sparse_table(model, training)[0]
        self.sums = {
            name: torch.zeros(p.shape, dtype=torch.float64)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        rows = self.sums[self.table].shape[0] if self.table else 0
        self.untouched = torch.zeros(rows, dtype=torch.float64)  # variance still to be drawn
        self._variances: dict[int, float] = {}
        self.levels: dict[int, int] = {}
        self.dropped = 0
        self.totals = dict.fromkeys(
            ("examples", "loss", "clipped_examples", "clipped_devices", "norm"), 0.0
        )

    def add(self, draws: list[Draw], data: GroupData, updates: LocalUpdates) -> None:
        here = len(draws)
        keep = updates.finite[:here]
        for name, signal in updates.signal.items():
            part = signal if updates.noise is None else signal + updates.noise[name]
            part = part[:here][keep].double()
            if name == self.table:
                rows = torch.from_numpy(data.touched[:here])[keep]
                self.sums[name].index_add_(0, rows.flatten(), part.flatten(0, 1))
            else:
                self.sums[name] += part.sum(0)
        for k in torch.nonzero(keep).flatten().tolist():
            self.levels[draws[k].level] = self.levels.get(draws[k].level, 0) + 1
            self._owe(draws[k].level, data.touched[k, : data.touched_counts[k]])
        self._count(updates, keep)

    def _owe(self, level: int, touched: NDArray[np.int64]) -> None:
        if self.table is None:
            return
        if level not in self._variances:
            self._variances[level] = self.training.noise_variance(level)
        variance = self._variances[level]
        if variance:
            self.untouched += variance
            self.untouched[torch.from_numpy(touched)] -= variance

    def _count(self, updates: LocalUpdates, keep: Tensor) -> None:
        here = len(keep)
        self.dropped += here - int(keep.sum())
        bounds, clip_norm = self.training.metric_bounds, self.training.update_clip_norm
        if bounds is not None and clip_norm is not None:
            for name, value in bounded_figures(updates, keep, bounds, clip_norm).items():
                self.totals[name] = self.totals.get(name, 0.0) + value
        self.totals["examples"] += updates.examples
        self.totals["loss"] += updates.loss
        self.totals["clipped_examples"] += updates.clipped_examples
        self.totals["clipped_devices"] += int(updates.clipped[:here][keep].sum())
        self.totals["norm"] += float(updates.norms[:here][keep].sum())

    def reply(self, generator: np.random.Generator) -> FleetReply:
        """The finished sum in float32. `generator`: source of the untouched rows' noise."""
        if self.table and bool((self.untouched > 0).any()):
            table = self.sums[self.table]
            noise = torch.from_numpy(generator.standard_normal(tuple(table.shape)))
            table += noise * self.untouched.clamp_min(0).sqrt().unsqueeze(1)
        sums = {name: tensor.float() for name, tensor in self.sums.items()}
        return FleetReply(sums, self.levels, self.dropped, self.totals)


def largest_group(model: nn.Module, positions: int) -> int:
    """Devices that a thread has room for at once, each with `positions` in a step's batch."""
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    widths = sum(getattr(m, "out_features", 0) for m in model.modules())
    return max(1, GROUP_BYTES // max(1, own * STACKS + positions * widths * KEPT_BYTES))


class GroupSize:
    """How many devices train at once: the fastest of a few sizes, timed on the first groups.

    With a seed the size is fixed, so that the run's last bits do not depend on a clock. `most`:
    for large models, which do not fit many times; it bounds what is chosen, not a given `size`.
    """

    def __init__(self, size: int | None, *, fixed: bool, most: int = max(CANDIDATES)) -> None:
        self._sizes = [size for size in CANDIDATES if size <= most]
        self._usual = min(USUAL, most)
        alone = fixed or not self._sizes
        self.chosen: int | None = size or (self._usual if alone else None)
        self._trials = [size for size in self._sizes for _ in range(TRIALS)]
        self._seconds: dict[int, list[float]] = {size: [] for size in self._sizes}

    def next(self) -> int:
        if self.chosen is not None:
            return self.chosen
        return self._trials.pop(0) if self._trials else self._usual

    def measured(self, size: int, devices: int, seconds: float) -> None:
        """Note how long a group took; a size's first group warms up and does not count."""
        if self.chosen is not None:
            return
        self._seconds[size].append(seconds / devices)
        if all(len(seconds) >= TRIALS for seconds in self._seconds.values()):
            self.chosen = min(self._sizes, key=lambda s: min(self._seconds[s][1:]))
