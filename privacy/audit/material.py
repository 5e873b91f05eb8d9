"""What the attacks on one run share: who is compared, and what their data lose under the models.

Losses are computed once, when first asked for. Every draw (which devices, which of their examples)
is keyed by seed and purpose, and so never depends on which attacks run.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import RunError
from sottovoce.client.examples import Examples
from sottovoce.client.tasks.base import evaluation_mode, to_device
from sottovoce.privacy.audit.roc import Scores

if TYPE_CHECKING:
    from torch import nn

    from sottovoce.client.fleet import LocalTraining
    from sottovoce.client.tasks.base import Task
    from sottovoce.privacy.audit.canary_view import CanaryView
    from sottovoce.privacy.audit.code_canaries import CodeCanary
    from sottovoce.simulations.population import Population

BATCH_SIZE = 512
MOST_EXAMPLES = 64  # of one device: the mean is known well enough, and heavy tails cost no time


class FinishedRun(Protocol):
    """A run that ended, as an attacker with all public knowledge finds it.

    `initial_model`: the model before the first round, None where it was not kept. `participants`:
    ids of the training devices that took part in a round, None where that is unknown.

    For probes (`sottovoce.privacy.audit.probes`), `training`: what devices do, None where that is
    unknown, with `engine`. `codes`: the code canaries inserted, whose devices `population` leaves
    out; `codes_trained`: how many of them took part in a round, None where that is unknown.
    """

    @property
    def population(self) -> Population: ...
    @property
    def task(self) -> Task: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def initial_model(self) -> nn.Module | None: ...
    @property
    def ledger(self) -> Any: ...
    @property
    def summary(self) -> dict[str, Any]: ...
    @property
    def participants(self) -> NDArray[np.int64] | None: ...
    @property
    def training(self) -> LocalTraining | None: ...
    @property
    def engine(self) -> str: ...
    @property
    def codes(self) -> Sequence[CodeCanary]: ...
    @property
    def codes_trained(self) -> int | None: ...


@dataclass(frozen=True)
class Losses:
    """Losses of some devices' examples, in device order.

    `final`, `initial`: (examples,) float64 under the released and the initial model (None where
    that is gone). `offsets`: (devices + 1,) int64. `ids`: names of the candidates that score:
    devices with examples, or single examples.
    """

    final: Scores
    initial: Scores | None
    offsets: NDArray[np.int64]
    ids: Sequence[str]

    def scores(self, *, relative: bool) -> Scores:
        """(examples,) how well the model knows an example; `relative` to the initial model."""
        if not relative:
            return -self.final
        if self.initial is None:
            raise RunError("the run kept no initial model: leave out attacks that compare with it")
        return self.initial - self.final


class Material:
    """The candidates of one run, at most `devices` of each kind, and their losses."""

    def __init__(
        self, run: FinishedRun, *, devices: int, seed: int, references: int = 0
    ) -> None:
        self.run, self.references = run, references
        self.devices = devices
        self.seed = seed

    def generator(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])

    @cached_property
    def canaries(self) -> CanaryView:
        """The example canaries, without their coins. `references`: models to compare with."""
        from sottovoce.privacy.audit.canary_view import REFERENCES, CanaryView

        return CanaryView(self.run, references=self.references or REFERENCES, seed=self.seed)

    @cached_property
    def readable(self) -> int:
        """How many examples of a device may be read, its first ones: as many as of a held-out one.

        A source may hand out fewer examples of a held-out device than it has. Other or more
        examples of training devices would give them away by themselves.
        """
        if self.run.population.held_out == 0:
            return MOST_EXAMPLES
        return int(np.diff(self._held_out.device_offsets).max(initial=1))

    @cached_property
    def training_devices(self) -> Losses:
        """Training devices, each as likely as any other, whether or not they ever took part."""
        return self._devices(len(self.run.population), "training devices")

    @cached_property
    def participants(self) -> Losses:
        """Training devices that took part in a round."""
        if self.run.participants is None:
            raise RunError("the run does not say which devices took part")
        return self._devices(np.asarray(self.run.participants, np.int64), "participants")

    @cached_property
    def held_out_devices(self) -> Losses:
        """Devices that were never in the training population."""
        generator = self.generator("held-out devices")
        starts = self._held_out.device_offsets
        kept = [starts[i] + self._some(int(n), generator) for i, n in enumerate(np.diff(starts))]
        offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in kept])]).astype(np.int64)
        names = [f"held-out device {i}" for i in np.flatnonzero(np.diff(offsets))]
        rows = np.concatenate(kept).astype(np.int64)
        return self._losses(self._held_out.take(rows), offsets, names)

    @cached_property
    def training_examples(self) -> Losses:
        """One random example of each of the `training_devices`."""
        table = self.training_devices
        rows = _one_each(table.offsets, self.generator("training examples"))
        initial = None if table.initial is None else table.initial[rows]
        names = [f"one example of {name}" for name in table.ids]
        return Losses(table.final[rows], initial, np.arange(len(rows) + 1), names)

    @cached_property
    def held_out_examples(self) -> Losses:
        """Examples that training devices kept out of training: one each where devices are known."""
        examples = self.run.population.held_out_examples()
        if examples is None or len(examples) == 0:
            raise RunError("the population holds no examples of training devices out")
        generator = self.generator("held-out examples")
        if examples.devices > 1:
            rows = _one_each(examples.device_offsets, generator)
        else:
            rows = np.arange(len(examples))
        rows = generator.permutation(rows)[: self.devices]
        names = [f"held-out example {i}" for i in rows]
        return self._losses(examples.take(rows), np.arange(len(rows) + 1), names)

    @cached_property
    def _held_out(self) -> Examples:
        return self.run.population.held_out_devices(self.devices)

    def _devices(self, pool: NDArray[np.int64] | int, purpose: str) -> Losses:
        generator = self.generator(purpose)
        size = min(self.devices, pool if isinstance(pool, int) else len(pool))
        chosen = np.sort(generator.choice(pool, size, replace=False))
        activity = self.run.population.activity[chosen]
        indices = [self._some(int(n), generator) for n in activity]
        examples = self.run.population.examples(chosen, indices)
        names = [f"device {i}" for i in chosen[np.diff(examples.device_offsets) > 0]]
        return self._losses(examples, examples.device_offsets, names)

    def _some(self, available: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """Numbers of at most `MOST_EXAMPLES` of a device's readable examples, in order."""
        readable = min(available, self.readable)
        if readable <= MOST_EXAMPLES:
            return np.arange(readable, dtype=np.int64)
        return np.sort(generator.choice(readable, MOST_EXAMPLES, replace=False))

    def _losses(
        self, examples: Examples, offsets: NDArray[np.int64], ids: Sequence[str]
    ) -> Losses:
        initial = self.run.initial_model
        return Losses(
            final=losses(self.run.task, self.run.model, examples),
            initial=None if initial is None else losses(self.run.task, initial, examples),
            offsets=offsets,
            ids=ids,
        )


def losses(task: Task, model: nn.Module, examples: Examples) -> Scores:
    """(examples,) loss of each example under `model`, in nats."""
    found = np.empty(len(examples), dtype=np.float64)
    with evaluation_mode(model) as device:
        for rows, batch in task.evaluation_batches(examples, BATCH_SIZE):
            found[rows] = task.losses(model, to_device(batch, device)).double().cpu().numpy()
    return found


def device_means(values: Scores, offsets: NDArray[np.int64]) -> Scores:
    """Mean of each device's values; devices without any are left out."""
    counts = np.diff(offsets)
    owner = np.repeat(np.arange(len(counts)), counts)
    sums = np.bincount(owner, weights=values, minlength=len(counts))
    means: Scores = sums[counts > 0] / counts[counts > 0]
    return means


def _one_each(offsets: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """A random row of each range that is not empty."""
    filled = np.diff(offsets) > 0
    return generator.integers(offsets[:-1][filled], offsets[1:][filled])
