"""What an attack on canaries may read: candidates and models, and no coin.

The coins are joined to the scores by `by_coin`, after an attack has scored every candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import RunError
from sottovoce.client.examples import Examples
from sottovoce.client.tasks.base import Batch, evaluation_mode, to_device
from sottovoce.privacy.audit.material import BATCH_SIZE, FinishedRun, losses
from sottovoce.privacy.audit.outcome import Scored
from sottovoce.privacy.audit.roc import Scores

if TYPE_CHECKING:
    from torch import nn

    from sottovoce.client.tasks.base import Task

REFERENCES = 2
SHADOW_DEVICES = 1000  # whose examples reference models learn from
SHADOW_EXAMPLES = 20_000  # of them, at most


class Slots(Protocol):
    """Of which candidate each coin is."""

    @property
    def coins(self) -> NDArray[np.bool_]: ...
    def __len__(self) -> int: ...


class Canaries(Protocol):
    """A population with canaries, as `sottovoce.simulations.canaries` makes it."""

    @property
    def slots(self) -> Slots: ...
    @property
    def activity(self) -> NDArray[np.unsignedinteger]: ...
    def candidates(self) -> Examples: ...
    def others(self, devices: NDArray[np.int64]) -> Examples: ...


def canaries_of(run: FinishedRun) -> Canaries | None:
    """The canaries that were put into the run's training data, None where none were."""
    found: Canaries | None = getattr(run, "canaries", None)
    return found


@dataclass(frozen=True)
class Shadows:
    """Models without any candidate, and data that belong to nobody in question.

    `models`: trained by the auditor on a random half each of the training data without candidates.
    `strangers`: examples that no model here was trained on.
    """

    models: tuple[nn.Module, ...]
    strangers: Examples


class CanaryView:
    """All candidates, in or out alike, and the models that the attacker has.

    `references`: how many models to train where an attack asks for them.
    """

    def __init__(self, run: FinishedRun, *, references: int, seed: int) -> None:
        self._run, self.references, self.seed = run, references, seed
        self.task: Task = run.task
        self.model: nn.Module = run.model

    @cached_property
    def candidates(self) -> Examples:
        """Every candidate's example, in the order of their ids."""
        return _canaries(self._run).candidates()

    @property
    def initial_model(self) -> nn.Module:
        """The model before training. RunError where it is gone."""
        if self._run.initial_model is None:
            raise RunError("the run kept no initial model: leave out attacks that compare with it")
        return self._run.initial_model

    @cached_property
    def final(self) -> Scores:
        """(candidates,) loss under the released model, in nats."""
        return losses(self.task, self.model, self.candidates)

    @cached_property
    def initial(self) -> Scores:
        """(candidates,) loss under the initial model, in nats."""
        return losses(self.task, self.initial_model, self.candidates)

    @cached_property
    def shadows(self) -> Shadows:
        """Reference models, trained now."""
        from sottovoce.privacy.audit.references import train_references

        canaries = _canaries(self._run)
        generator = np.random.default_rng([self.seed, 0x5AAD0])
        devices = generator.permutation(len(canaries.activity))[:SHADOW_DEVICES]
        known = canaries.others(np.sort(devices))
        rows = generator.permutation(len(known))[:SHADOW_EXAMPLES]
        strangers = self._run.population.held_out_examples(REFERENCES * BATCH_SIZE)
        if strangers is None or len(strangers) == 0:
            strangers = self._run.population.held_out_devices(BATCH_SIZE)
        models = train_references(
            self.task, self.initial_model, known.take(rows), self.references, generator
        )
        return Shadows(models, strangers)

    def batches(self, model: nn.Module) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """(rows, batch) of all candidates, where `model` computes, without gradients."""
        with evaluation_mode(model) as device:
            for rows, batch in self.task.evaluation_batches(self.candidates, BATCH_SIZE):
                yield rows, to_device(batch, device)


def by_coin(scores: Scores, run: FinishedRun) -> Scored:
    """(candidates,) scores, parted by the coins: who was in, and who was not."""
    coins = _canaries(run).slots.coins
    names = np.array([f"canary {i}" for i in range(len(coins))])
    return Scored(scores[coins], scores[~coins], names[coins].tolist(), names[~coins].tolist())


def _canaries(run: FinishedRun) -> Canaries:
    found = canaries_of(run)
    if found is None:
        raise RunError("the run has no canaries: give it audit.canaries=mislabelled")
    return found
