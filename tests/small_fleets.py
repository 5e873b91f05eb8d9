"""Small simulated fleets, and the slow loop that says what they should sum up to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from reference import train_device
from torch import Tensor, nn

from sottovoce.client.batches import BatchPlan
from sottovoce.client.cohort import Draw, chunks, draw_cohort
from sottovoce.client.fleet import (
    DeviceOptimizer,
    ExampleClipping,
    FleetReply,
    LocalTraining,
)
from sottovoce.client.groups import GroupData, LocalUpdates
from sottovoce.client.models import make_model
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.training import GroupTrainer, sparse_table
from sottovoce.client.vocabulary import make_vocabulary
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.noise_streams import KEY_BYTES, NoiseStreams
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.fleet import SimulatedFleet

SIZES = {
    "bilstm": {"embedding_size": 6, "hidden_size": 5},
    "transformer": {"hidden_size": 8, "heads": 2, "layers": 1},
    "lstm": {"embedding_size": 6, "hidden_size": 5},
    "causal_transformer": {"hidden_size": 8, "heads": 2, "layers": 1},
}
TASK_OF = {"bilstm": "intent_slots", "transformer": "intent_slots"}
CLIPPED = ExampleClipping(clip_norm=0.8, noise_multiplier=0.0)
NOISED = ExampleClipping(clip_norm=0.8, noise_multiplier=0.7)
PLAIN = DeviceOptimizer()
OPTIMIZERS = {
    "sgd": PLAIN,
    "momentum": DeviceOptimizer(momentum=0.8),
    "proximal": DeviceOptimizer(proximal=0.3),
    "weight decay": DeviceOptimizer(weight_decay=0.2),
    "all of them": DeviceOptimizer(momentum=0.6, proximal=0.3, weight_decay=0.2),
    "adam": DeviceOptimizer("adam", beta1=0.8, beta2=0.9, eps_floor=1e-3),
    "adam with pulls": DeviceOptimizer("adam", proximal=0.3, weight_decay=0.2, eps_floor=1e-3),
}
DEVICES = np.array([3, 17, 40, 41, 77, 80, 99, 120, 121], dtype=np.int64)


@lru_cache
def parts(name: str) -> tuple[AssistantPopulation, Task, nn.Module]:
    population = AssistantPopulation(devices=200, held_out_devices=5, seed=4)
    vocabulary = make_vocabulary("grammar", population)
    task = make_task(
        TASK_OF.get(name, "next_word"), vocabulary=vocabulary, schema=population.schema,
        words=population.words, max_length=12,
    )
    model = make_model(name, task, generator=torch.Generator().manual_seed(5), **SIZES[name])
    return population, task, model


def fleet(
    name: str,
    example: ExampleClipping | None,
    update_clip: float | None,
    size: int = 4,
    optimizer: DeviceOptimizer = PLAIN,
    engine: str = "grouped",
    epochs: int = 1,
) -> SimulatedFleet:
    population, task, model = parts(name)
    plan = BatchPlan(4, local_epochs=epochs, max_examples=12, poisson=example is not None)
    training = LocalTraining(0.5, plan, example, update_clip, optimizer)
    source = NoiseSource.from_seed(9)
    return SimulatedFleet(population, task, model, training, source, size, engine=engine)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def slow_update(
    fast: SimulatedFleet, draw: Draw, touched: np.ndarray, server_round: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One device by `reference.train_device`, with the fleet's own batches and noise."""
    training, model, optimizer = fast.training, fast.model, fast.training.optimizer
    everything = fast.task.collate(fast.population.examples(np.array([draw.device])))

    def losses(m: nn.Module, rows: list[int]) -> Tensor:
        return fast.task.losses(m, {k: v[rows] for k, v in everything.items()})

    table, _ = sparse_table(model, training)
    stream = noise_stream(fast, draw.device, server_round)

    def noise() -> dict[str, Tensor]:
        drawn = slow_noise(stream, model, table, touched)
        return {name: tensor * training.step_deviation for name, tensor in drawn.items()}

    floor = optimizer.eps_floor or 0.0
    signal, drift, _ = train_device(
        model, losses, [step.tolist() for step in draw.steps],
        learning_rate=training.learning_rate, batch_size=training.plan.batch_size,
        example_clip=training.example.clip_norm if training.example else None,
        update_clip=training.update_clip_norm,
        noise=noise if training.step_deviation else None,
        momentum=optimizer.momentum, proximal=optimizer.proximal,
        weight_decay=optimizer.weight_decay,
        adam=(optimizer.beta1, optimizer.beta2, floor, training.step_deviation**2)
        if optimizer.name == "adam" else None,
    )
    return signal, drift


def noise_stream(fast: SimulatedFleet, device: int, server_round: int) -> NoiseStreams:
    """A device's own noise in a round."""
    key = fast.source.digest("device noise", server_round, device, size=KEY_BYTES)
    return NoiseStreams([key])


def slow_noise(
    stream: NoiseStreams, model: nn.Module, table: str | None, touched: np.ndarray
) -> dict[str, Tensor]:
    """The next step's normals of one device, in the `touched` rows of a cut table only."""
    drawn = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    others = [tensor for name, tensor in drawn.items() if name != table]
    flat = stream.draw([sum(tensor.numel() for tensor in others)])[0]
    for tensor in others:
        tensor.copy_(flat[: tensor.numel()].view(tensor.shape))
        flat = flat[tensor.numel() :]
    if table is not None:
        width = drawn[table].shape[1]
        drawn[table][touched] = stream.draw([len(touched) * width])[0].view(-1, width)
    return drawn


def slow_sum(fast: SimulatedFleet, devices: np.ndarray, server_round: int) -> dict[str, Tensor]:
    """Every device by itself, without noise."""
    total = {n: torch.zeros_like(p) for n, p in fast.model.named_parameters()}
    plan = fast.training.plan
    for draw in draw_cohort(fast.population, devices, plan, server_round, fast.source):
        signal, _ = slow_update(fast, draw, np.zeros(0, dtype=np.int64), server_round)
        for name, part in signal.items():
            total[name] += part.detach()
    return total


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    scale = max(float(t.abs().max()) for t in b.values())
    assert scale > 0
    for name in b:
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


def of_device(
    stacks: dict[str, Tensor], k: int, table: str | None, rows: np.ndarray, like: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One device's tensors, a cut table laid out in full."""
    found = {name: stack[k] for name, stack in stacks.items()}
    if table is not None:
        found[table] = torch.zeros_like(like[table])
        found[table][torch.from_numpy(rows)] = stacks[table][k, : len(rows)]
    return found


def trained(
    fast: SimulatedFleet, parameters: dict[str, Tensor], draws: list[Draw], server_round: int
) -> Iterator[tuple[list[Draw], GroupData, LocalUpdates]]:
    """Every group of `draws`, its devices keeping the noise of their last step to themselves."""
    trainers = {}
    for chunk in chunks(fast.population, fast.task, draws, len(draws)):
        first = 0
        while first < len(draws):
            way = fast.size.next()
            if way not in trainers:
                trainers[way] = GroupTrainer(
                    fast.model, fast.task, fast.training, way.devices, way.engine
                )
                fast._trainers = trainers
            yield fast._train_group(parameters, chunk, first, way, server_round)
            first += way.devices


def noised(
    size: int, devices: np.ndarray, optimizer: DeviceOptimizer = PLAIN, engine: str = "grouped"
) -> FleetReply:
    fast = fleet("bilstm", NOISED, 0.05, size, optimizer, engine)
    return fast.train(parameters_of(fast.model), devices, 2)
