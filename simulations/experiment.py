"""From a run's settings to its parts: population, vocabulary, task, model, local training.

Coordinator and fleet both build from the same settings; in one process they share what they build.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import UserConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import ExampleClipping, LocalTraining
from sottovoce.client.models import make_model
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.vocabulary import Vocabulary, make_vocabulary
from sottovoce.privacy.noise import NoiseSource
from sottovoce.simulations.fleet import SimulatedFleet
from sottovoce.simulations.population import Population
from sottovoce.simulations.populations import make_population
from sottovoce.strategies.levels import MAX_LEVEL

SECRET_FOLDER = "secret-folder"


@dataclass(frozen=True)
class Experiment:
    """Everything that follows from the settings alone."""

    config: DictConfig
    population: Population
    vocabulary: Vocabulary
    task: Task
    training: LocalTraining

    def initial_model(self) -> nn.Module:
        """The model before training; its weights follow from the run's seed (0 without one)."""
        return build_model(self.config, self.task)


@lru_cache(maxsize=1)
def build_experiment(config_text: str) -> Experiment:
    """The parts of a run from its settings as YAML; kept for the next caller in this process."""
    config = OmegaConf.create(config_text)
    assert isinstance(config, DictConfig)
    population = make_population(config.population)
    vocabulary = make_vocabulary(
        config.task.vocabulary.source,
        population,
        buckets=config.task.vocabulary.buckets,
        path=config.task.vocabulary.path,
    )
    task = make_task(
        config.task.name,
        vocabulary=vocabulary,
        schema=population.schema,
        words=population.words,
        max_length=config.task.max_length,
    )
    task.check(population)
    return Experiment(config, population, vocabulary, task, local_training(config, len(population)))


def build_model(config: DictConfig, task: Task) -> nn.Module:
    """The configured model for a task, with its first weights."""
    sizes = {key: value for key, value in config.model.items() if key != "name"}
    generator = torch.Generator().manual_seed(config.seed or 0)
    return make_model(config.model.name, task, generator=generator, **sizes)


def local_training(config: DictConfig, devices: int) -> LocalTraining:
    """What a device does with its examples, from `strategy` and `privacy` settings.

    `devices`: of the population, for the default delta.
    """
    strategy, privacy = config.strategy, config.privacy
    plan = BatchPlan(
        batch_size=strategy.batch_size,
        local_epochs=strategy.local_epochs,
        max_examples=config.population.max_examples_per_round,
        poisson=privacy.example.enabled,
    )
    example = None
    if privacy.example.enabled:
        noise = privacy.example.noise_multiplier
        if noise is None:
            noise = example_noise(config, plan, public_deltas(config, devices)["example"])
        example = ExampleClipping(privacy.example.clip_norm, noise)
    clip = privacy.device.clip_norm if privacy.device.enabled else None
    return LocalTraining(strategy.learning_rate, plan, example, clip)


def public_deltas(config: DictConfig, devices: int) -> dict[str, float]:
    """Delta of each protected unit: as set, else 1 / (10 devices), and at most 1e-5."""
    default = min(1e-5, 0.1 / devices)
    return {
        unit: config.privacy[unit].delta or default
        for unit in ("device", "example")
        if config.privacy[unit].enabled
    }


def example_noise(config: DictConfig, plan: BatchPlan, delta: float) -> float:
    """Noise multiplier of on-device steps for `privacy.example.epsilon` at every activity level.

    The target is what the busiest device may spend, so how often a device may take part must be
    bounded; ConfigError where it is not.
    """
    privacy = config.privacy.example
    if privacy.max_participations is None:
        raise ConfigError(
            f"privacy.example.epsilon={privacy.epsilon} depends on how often a device takes part: "
            "set privacy.example.max_participations, or noise_multiplier in place of epsilon"
        )
    from sottovoce.privacy.calibration import calibrate_noise

    return calibrate_noise(
        privacy.epsilon,
        delta,
        by_level=[
            (level, plan.rate(level), plan.steps(level, 1 << level) * privacy.max_participations)
            for level in range(MAX_LEVEL + 1)
        ],
    )


_fleets: dict[tuple[int, str, str], SimulatedFleet] = {}


def simulated_fleet(config_text: str, node_config: UserConfig, run_id: int) -> SimulatedFleet:
    """The fleet of a node for a run's settings; the last one is kept for the run's next round.

    The in-process grid's nodes share the run's noise secret (`secret-folder`); a node of its own
    has its own from the operating system, unless the run is seeded. torch computes in
    one thread, as in `sottovoce simulate`.
    """
    folder = str(node_config.get(SECRET_FOLDER, ""))
    key = (run_id, config_text, folder)
    if key not in _fleets:
        torch.set_num_threads(1)
        experiment = build_experiment(config_text)
        source = noise_source(experiment.config.seed, folder)
        _fleets.clear()
        _fleets[key] = SimulatedFleet(
            experiment.population,
            experiment.task,
            experiment.initial_model(),
            experiment.training,
            source,
            workers=worker_count(experiment.config.run.workers),
        )
    return _fleets[key]


def worker_count(workers: int | str) -> int:
    """Threads that train groups of devices: as given, or one per core for `auto`."""
    return (os.cpu_count() or 1) if workers == "auto" else int(workers)


def noise_source(seed: int | None, folder: str) -> NoiseSource:
    """The randomness of a fleet: kept in `folder`, else of the seed, else fresh."""
    if folder:
        return NoiseSource.load(Path(folder))
    return NoiseSource.from_system() if seed is None else NoiseSource.from_seed(seed)
