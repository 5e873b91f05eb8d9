"""Real devices' work on the data of simulated ones."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from sottovoce.client.agent.store import StoredExample
from sottovoce.client.agent.work import DeviceData, Trained, train_task
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.protocol.device_pb2 import Task as Order
from sottovoce.client.task_spec import TaskSpec, written_training
from sottovoce.client.tasks import Task
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.simulations.population import Population


def spec_of(
    task: Task, model: nn.Module, name: str, sizes: dict[str, int], training: LocalTraining,
    run: str = "r",
) -> TaskSpec:  # fmt: skip
    """The specification of a simulated fleet's run."""
    example = training.example
    clip = training.update_clip_norm
    return TaskSpec(
        run=run, rounds=10,
        task={
            "name": task.name, "vocabulary": task.vocabulary.to_json(),
            "schema": {"intents": list(task.schema.intents), "slots": list(task.schema.slots)},
            "max_length": task.max_length,
        },
        model={"name": name, **sizes},
        training=written_training(training),
        privacy={
            "example": None if example is None else {
                "noise_multiplier": example.noise_multiplier, "clip_norm": example.clip_norm
            },
            "device": None if clip is None else {"noise_multiplier": 1.0, "clip_norm": clip},
            "max_participations": None, "delta": {"example": 1e-5},
        },
        parameters=tuple((n, tuple(p.shape)) for n, p in model.named_parameters()),
    )  # fmt: skip


def stored(population: Population, device: int) -> list[StoredExample]:
    """A simulated device's examples as a real one would have them."""
    found, schema = population.examples(np.array([device])), population.schema
    rows = []
    for k in range(len(found)):
        span = slice(found.offsets[k], found.offsets[k + 1])
        rows.append(StoredExample(
            k + 1, tuple(population.words[w] for w in found.tokens[span]),
            None if found.intent is None else schema.intents[found.intent[k]],
            None if found.slots is None else tuple(schema.slots[s] for s in found.slots[span]),
        ))
    return rows


def live_update(
    spec: TaskSpec, population: Population, parameters: dict[str, Tensor], device: int,
    level: int, server_round: int, source: NoiseSource,
) -> Trained:  # fmt: skip
    """What a real device with a simulated one's number, data and coins hands over."""
    spec = TaskSpec.from_bytes(spec.to_bytes())
    order = Order(id=f"{device:032x}", run=spec.run, round=server_round, number=device, level=level)
    data = DeviceData(stored(population, device), level, source)
    return train_task(spec, order, parameters, data)
