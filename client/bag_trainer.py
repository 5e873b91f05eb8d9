"""Local training of bag-of-words classifiers in C, one device after another.

The steps are those of `GroupTrainer` with plain SGD, with the same clipping (`clip_factors`),
projection (`LocalDescent`), lazily drawn rows (`LazyRows`) and noise that is owed (`StepNoise`).
But a device's weights stay in the processor's cache from its first step to its last, and what it
hands over goes straight into the sum of the round. Model: Joulin et al. 2016, arXiv:1607.01759.

A row has the words of its own length, whatever it is padded to.

A device's draws come from its stream in this order: in every step but the first one those of the
rows that it reads, ascending, then in every step but the last one those of all other parameters.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.bag_models import BagModel, bag_model, shapes
from sottovoce.client.batch_draws import Visits
from sottovoce.client.batches import BatchPlan
from sottovoce.client.cohort import Chunk, Draw
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.groups import LocalUpdates
from sottovoce.client.native import kernels
from sottovoce.client.native.bags import AUTOMATIC, CLIPPED, PLAIN, BagGroup
from sottovoce.client.round_sum import RoundSum
from sottovoce.client.tasks import Task
from sottovoce.privacy.mechanisms.noise_streams import NoiseStreams
from sottovoce.strategies.levels import MAX_LEVEL

ROWS, WORDS, RATE = 5, 4, 0.1  # of the batch on which kernels and autograd have to agree
CLOSE, ROUNDING = 1e-4, 1e-2  # relative to moves, and to weights in whose rounding moves may hide
LARGEST = 1 << 26  # numbers of noise of a device, all of which are in memory while it trains

Tensors = dict[str, Tensor]


class BagTrainer:
    """Trains `found`, which is what `bag_model` says of a model, task and training."""

    def __init__(self, found: BagModel) -> None:
        self.found, self._group = found, BagGroup()

    def train(
        self,
        parameters: Tensors,
        chunk: Chunk,
        first: int,
        devices: int,
        streams: NoiseStreams | None,
        total: RoundSum,
    ) -> LocalUpdates:
        """Train devices `first:first + devices` of a chunk, as many as there are, for `total`.

        `streams`: one of each device, None where they add no noise. Finite updates, signal and
        noise, are added to `total` already; what comes back has none.

        *Guarantee*: that of `LocalDescent` with plain SGD, of each device: a signal's norm is at
        most S = `update_clip_norm` of `total.training`, each step is the Gaussian mechanism of
        `ExampleClipping` (norms are added up in float64 and never taken as less than they are), and
        what was drawn plus what is owed has the variance `LocalTraining.noise_variance`
        (`LazyRows`). A row whose gradient is not finite adds nothing, nor does a device whose
        signal is not.
        """
        training, draws = total.training, chunk.draws[first : first + devices]
        steps = np.array([len(draw.steps) for draw in draws], dtype=np.int64)
        updates, readings = _nothing(len(draws)), np.zeros_like(steps)
        self._set_group(chunk, slice(first, first + len(draws) + 1), steps, readings, updates)
        self._set_model(parameters, total)
        self._set_training(training)
        self._group.plan()
        self._set_noise(training, streams, steps, readings)
        self._group.train()
        updates.clipped_examples = int(self._group.fields.clipped_examples)
        if streams is not None:
            updates.owed = torch.from_numpy((steps > 0) * _variance(training))
        return updates

    def _set_group(
        self,
        chunk: Chunk,
        bounds: slice,
        steps: NDArray[np.int64],
        readings: NDArray[np.int64],
        updates: LocalUpdates,
    ) -> None:
        """Whose rows and visits there are, and where to write what is found of each device."""
        batch, visits = chunk.batch, chunk.visits
        self._group.set(
            devices=len(steps), columns=batch["tokens"].shape[1], tokens=batch["tokens"].long(),
            lengths=batch["lengths"].long(), labels=batch["intent"].long(),
            starts=chunk.of[bounds], step=visits.step, row=visits.row, steps=steps,
            readings=readings,
            losses=updates.losses, visits=updates.visits, norms=updates.norms,
            finite=updates.finite, clipped=updates.clipped, clipped_examples=0,
        )

    def _set_model(self, parameters: Tensors, total: RoundSum) -> None:
        """What is trained, and where it is summed up."""
        found, sums = self.found, total.sums
        own = {name: parameters[name].float().contiguous() for name in found.names}
        assert all(sums[name].shape == tensor.shape for name, tensor in own.items())
        weights, biases = zip(*found.layers, strict=True)
        self._group.set(
            layers=len(found.layers), vocabulary=len(own[found.table]), mean=int(found.mean),
            padding=-1 if found.padding is None else found.padding,
            widths=np.array(shapes(found, own), dtype=np.int64), table=own[found.table],
            weights=[own[name] for name in weights],
            biases=[None if name is None else own[name] for name in biases],
            table_sum=sums[found.table], weight_sums=[sums[name] for name in weights],
            bias_sums=[None if name is None else sums[name] for name in biases],
            drawn=total.touched,
        )
        self._dense = sum(own[name].numel() for name in found.names if name != found.table)
        self._width = own[found.table].shape[1]

    def _set_training(self, training: LocalTraining) -> None:
        example = training.example
        automatic = example is not None and example.threshold == "automatic"
        self._group.set(
            clips=PLAIN if example is None else AUTOMATIC if automatic else CLIPPED,
            rate=training.learning_rate, bound=training.update_clip_norm or 0.0,
            clip=0.0 if example is None else example.clip_norm,
            units=1.0 if example is None else example.units(training.plan.batch_size),
            variance=_variance(training),
        )

    def _set_noise(
        self,
        training: LocalTraining,
        streams: NoiseStreams | None,
        steps: NDArray[np.int64],
        readings: NDArray[np.int64],
    ) -> None:
        """How many draws each device needs, and the streams that they are taken from."""
        if streams is None:
            self._group.set(noise=0)
            return
        counts = np.maximum(steps - 1, 0) * self._dense + readings * self._width
        most = int(counts.max(initial=0)) + 1
        keys, places = streams.handed_over(counts)
        self._group.set(
            keys=keys, places=places, counts=counts, noise=np.empty(most, dtype=np.float32),
            tails=np.empty(most, dtype=np.int32),
            deviation=training.learning_rate * training.step_deviation,
        )


def _variance(training: LocalTraining) -> float:
    """Of the noise of one step in each coordinate of an update."""
    return (training.learning_rate * training.step_deviation) ** 2


def _nothing(devices: int) -> LocalUpdates:
    """What is found of devices, before anything is: without tensors of their own."""
    flags, wide = torch.zeros(2, devices, dtype=torch.bool), torch.float64
    norms = torch.zeros(devices, dtype=torch.float32)
    return LocalUpdates(
        {}, None, finite=flags[0], norms=norms, clipped=flags[1],
        losses=torch.zeros(devices, dtype=wide), visits=torch.zeros(devices, dtype=torch.int64),
        clipped_examples=0,
    )


def make_bag_trainer(
    model: nn.Module, task: Task, training: LocalTraining
) -> BagTrainer | None:
    """A trainer for the model where there are kernels, it is a bag, and both agree; else None."""
    found = None if kernels() is None else bag_model(model, task, training)
    if found is None or _draws(found, model, task, training) > LARGEST:
        return None
    return BagTrainer(found) if agrees(BagTrainer(found), model, task) else None


def _draws(found: BagModel, model: nn.Module, task: Task, training: LocalTraining) -> int:
    """Most numbers of noise that a device may draw in a round, about."""
    if training.step_deviation == 0:
        return 0
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    width = dict(model.named_parameters())[found.table].shape[1]
    dense = sum(sizes.values()) - sizes[found.table]
    read = min(training.plan.batch_size * task.max_length * width, sizes[found.table])
    return training.plan.steps(MAX_LEVEL, 1 << MAX_LEVEL) * (dense + read)


def agrees(trainer: BagTrainer, model: nn.Module, task: Task) -> bool:
    """Whether a step on a few random rows is what autograd makes of it, to rounding."""
    training = LocalTraining(RATE, BatchPlan(ROWS, 1, ROWS, poisson=False), None, None)
    chunk = _random_chunk(len(dict(model.named_parameters())[trainer.found.table]), task)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    own = copy.deepcopy(model).train()  # first, for a model that cannot be run says so here
    losses = task.losses(own, chunk.batch)
    gradients = torch.autograd.grad(losses.mean(), list(own.parameters()))
    total = RoundSum(model, training, 1)
    updates = trainer.train(parameters, chunk, 0, 1, None, total)
    if abs(float(losses.detach().double().sum()) - updates.loss) > CLOSE * ROWS:
        return False
    for (name, start), gradient in zip(parameters.items(), gradients, strict=True):
        gradient = gradient.to_dense()  # that of a table may be sparse
        reach = CLOSE * (RATE * gradient.abs().max() + ROUNDING * start.abs().max())
        if not bool((total.sums[name] + RATE * gradient).abs().max() <= reach):
            return False
    return True


def _random_chunk(vocabulary: int, task: Task) -> Chunk:
    """One device with one step of a few rows."""
    random = np.random.default_rng(0)
    numbers = np.arange(ROWS)
    batch = {
        "tokens": torch.from_numpy(random.integers(0, vocabulary, (ROWS, WORDS))),
        "lengths": torch.full((ROWS,), WORDS),
        "intent": torch.from_numpy(random.integers(0, task.outputs[0].classes, ROWS)),
    }
    visits = Visits(np.zeros(ROWS, dtype=np.int64), np.zeros(ROWS, dtype=np.int64), numbers)
    ends = np.array([0, ROWS])
    return Chunk([Draw(0, 0, [numbers])], [numbers], batch, ends, visits, ends)
