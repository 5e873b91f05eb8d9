"""One device's local round: the code that simulates it, for a cohort of one.

    draw_at -> chunks -> cut_group -> GroupCoins -> GroupTrainer or LoneTrainer -> RoundSum

is what a simulated fleet runs for thousands of devices at once, so what holds for a simulated
device holds for a real one. The batches' rates, and with example privacy their number, follow the
activity level that the device declared for the run, never what it holds on the day.

An example is left out where the run's public label sets lack its labels, or where it has none and
the task needs them; a word that the vocabulary does not have is <unk>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.agent.journal import StepCost
from sottovoce.client.alone import LoneTrainer
from sottovoce.client.batches import largest
from sottovoce.client.cohort import chunks, cut_group, draw_at
from sottovoce.client.coins import has_dropout
from sottovoce.client.errors import RunError
from sottovoce.client.examples import Examples, Schema
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.group_coins import GroupCoins
from sottovoce.client.round_sum import RoundSum
from sottovoce.client.task_spec import TaskSpec
from sottovoce.client.tasks import Task
from sottovoce.client.training import GroupTrainer
from sottovoce.privacy.mechanisms.noise import NoiseSource

if TYPE_CHECKING:
    from sottovoce.client.agent.store import StoredExample
    from sottovoce.client.protocol.device_pb2 import Task as Order

Ints = NDArray[np.int64]

COPIES = 8  # of all that trains: weights, gradients, moves, noise, and a sum in float64
COIN_BYTES, VISIT_BYTES = 60, 200  # while batches are drawn: of a Poisson coin, of a place in one
KEPT_BYTES = 10  # at each position, for each output of a layer: as in a simulation's groups


class NotFinite(RunError):
    """An update with values that are no numbers."""


@dataclass(frozen=True)
class DeviceData:
    """What a device brings to a task.

    `examples`: that count in the run. `level`: declared for it. `source`: coins and noise, fresh
    for every training but in tests. `models`: folder of pretrained models, or None.
    """

    examples: Sequence[StoredExample]
    level: int
    source: NoiseSource
    models: Path | None = None


@dataclass(frozen=True)
class Trained:
    """What a device hands over. `clipped`: whether its signal was longer than the bound."""

    update: dict[str, Tensor]
    clipped: bool


def train_task(
    spec: TaskSpec, order: Order, parameters: dict[str, Tensor], data: DeviceData
) -> Trained:
    """The device's update for a task, from the global `parameters`.

    Raises DataError or ConfigError for a specification that cannot be built, NotFinite for an
    update that is not finite.

    *Guarantee*: with example privacy, every local step is the Gaussian mechanism for the example
    unit under add/remove that the specification states for the round, at the Poisson rate of
    `data.level`, and the update is post-processing of the noised steps. The signal's norm is at
    most S, the order's `clip_norm` or the specification's bound.
    *Assumes*: `data.source` is used for this training alone; the level was fixed before the run.
    """
    training = ordered_training(spec, order)
    held = Held.of(spec, data.examples)
    task = spec.build_task(held.words)
    model = spec.build_model(data.models, task)
    draws = draw_at(
        np.array([order.number]), np.array([data.level], dtype=np.uint8), np.array([len(held)]),
        training.plan, order.round, data.source,
    )  # fmt: skip
    (chunk,) = chunks(held, task, draws, 1)
    trainer = trainer_of(model, task, training)
    vocabulary = parameters[trainer.table].shape[0] if trainer.table else 0
    group = cut_group(chunk, 0, 1, trainer.table_input, vocabulary)
    coins = GroupCoins(data.source, order.round, draws, chunk.numbers)
    noise = coins.toss(group, training, dropout=has_dropout(model))
    updates = trainer.train(parameters, group, order.round, noise)
    total = RoundSum(model, training, order.round)
    total.add(draws, group, updates)
    if total.dropped:
        raise NotFinite("the update is not finite: it is not sent")
    generator = data.source.generator("untouched rows", order.round, order.number)
    return Trained(total.reply(generator).sums, bool(updates.clipped[0]))


def trainer_of(
    model: nn.Module, task: Task, training: LocalTraining
) -> GroupTrainer | LoneTrainer:
    """Plain autograd where nothing needs single examples' gradients, the grouped engine else."""
    if training.example is None and training.plain and not has_dropout(model):
        return LoneTrainer(model, task, training)
    return GroupTrainer(model, task, training, 1, lends=True)


def ordered_training(spec: TaskSpec, order: Order) -> LocalTraining:
    """Local training of a task: the specification's, with the bound that the task sets."""
    training = spec.local_training()
    return replace(training, update_clip_norm=order.clip_norm) if order.clips else training


def step_cost(spec: TaskSpec, server_round: int, level: int) -> StepCost:
    """What a participation in a round costs, by what is run, not by what was promised.

    Without example privacy the number of steps is the largest that a device at `level` takes: what
    a policy is asked about never depends on the examples.
    """
    training = spec.local_training().at(server_round)
    plan, example = training.plan, training.example
    if example is None:
        return StepCost(None, 1.0, plan.steps(level, largest(level)))
    noise = example.noise_multiplier / example.multiple
    return StepCost(noise or None, plan.rate(level), plan.steps(level, largest(level)))


def needed_mb(spec: TaskSpec, level: int = 0) -> float:
    """About what training takes at `level`, in megabytes, beside the program itself.

    Of public figures alone: all that trains, several times over, a batch of the longest rows, and
    the draws of all batches (a coin for each example and Poisson step).
    """
    widths = sum(
        shape[0] for name, shape in spec.parameters
        if len(shape) == 2 and not name.endswith(("embedding.weight", "positions.weight"))
    )
    positions = spec.training["plan"]["batch_size"] * spec.task["max_length"]
    plan = spec.local_training().plan
    steps = plan.steps(level, largest(level))
    drawn = COIN_BYTES * largest(level) if plan.poisson else VISIT_BYTES * plan.batch_size
    return 1e-6 * float(
        COPIES * spec.model_bytes + positions * widths * KEPT_BYTES + steps * drawn
    )


class Held:
    """A device's usable examples as a population of one (`cohort.Holders`).

    `words`: the different words, in the order of their first use.
    """

    def __init__(self, examples: Sequence[StoredExample], schema: Schema | None) -> None:
        number: dict[str, int] = {}
        tokens = [number.setdefault(w, len(number)) for e in examples for w in e.tokens]
        sizes = [len(example.tokens) for example in examples]
        self.words = list(number)
        self.activity: NDArray[np.unsignedinteger[Any]] = np.array(
            [len(examples)], dtype=np.uint32
        )
        offsets = np.cumsum([0, *sizes], dtype=np.int64)
        self._all = Examples(
            np.array(tokens, dtype=np.int32), offsets, np.array([0, len(examples)], dtype=np.int64),
            *(_labels(examples, schema) if schema else (None, None)),
        )  # fmt: skip

    @classmethod
    def of(cls, spec: TaskSpec, examples: Sequence[StoredExample]) -> Held:
        """Those of `examples` that the task of `spec` can use."""
        if spec.task["name"] != "intent_slots":
            return cls(examples, None)
        intents, slots = (tuple(spec.task["schema"][kind]) for kind in ("intents", "slots"))
        known, tags = frozenset(intents), frozenset(slots)
        usable = [
            e for e in examples
            if e.intent in known
            and (not tags or (e.slots is not None and tags.issuperset(e.slots)))
        ]
        return cls(usable, Schema(intents, slots))

    def __len__(self) -> int:
        return len(self._all)

    def examples(self, devices: Ints, indices: Sequence[Ints] | None = None) -> Examples:
        """All, or example numbers `indices[0]`; `devices` is this one."""
        return self._all if indices is None else self._all.take(indices[0])


def _labels(
    examples: Sequence[StoredExample], schema: Schema
) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    """Intents (examples,) and tags (tokens,) by their places in the public sets."""
    intents = {label: place for place, label in enumerate(schema.intents)}
    found = np.array([intents[e.intent or ""] for e in examples], dtype=np.int32)
    if not schema.slots:
        return found, None
    tags = {tag: place for place, tag in enumerate(schema.slots)}
    return found, np.array([tags[tag] for e in examples for tag in e.slots or ()], dtype=np.int32)
