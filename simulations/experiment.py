"""From a run's settings to its parts: population, vocabulary, task, model, local training.

Coordinator and fleet both build from the same settings; in one process they share what they build.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from flwr.app import UserConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import DeviceOptimizer, ExampleClipping, LocalTraining
from sottovoce.client.memory import keep_freed_memory
from sottovoce.client.models import make_model
from sottovoce.client.models.hub_files import tokenizer_file
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.vocabulary import Vocabulary, make_vocabulary
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.private_metrics import MetricBounds
from sottovoce.simulations.attendance import attendance
from sottovoce.simulations.canaries import with_canaries
from sottovoce.simulations.canary_devices import with_device_canaries
from sottovoce.simulations.code_population import with_codes
from sottovoce.simulations.conditions import make_conditions
from sottovoce.simulations.continual import on_timeline
from sottovoce.simulations.cores import worker_count
from sottovoce.simulations.fleet import SimulatedFleet
from sottovoce.simulations.population import Population
from sottovoce.simulations.populations import make_population
from sottovoce.simulations.timeline import arrival_of, make_timeline
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

    @cached_property
    def payload_bytes(self) -> float:
        """Bytes of the trained parameters, which travel each way in every round."""
        return trained_bytes(self.initial_model())


def trained_bytes(model: nn.Module) -> float:
    """Bytes of the parameters that train, as they travel."""
    return float(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))


@lru_cache(maxsize=1)
def build_experiment(config_text: str) -> Experiment:
    """The parts of a run from its settings as YAML; kept for the next caller in this process."""
    config = OmegaConf.create(config_text)
    assert isinstance(config, DictConfig)
    population, dated = whole_population(config)
    source, path = vocabulary_source(config)
    vocabulary = make_vocabulary(
        source, dated, buckets=config.task.vocabulary.buckets, path=path
    )
    population, vocabulary = with_canaries(population, vocabulary, config)
    task = make_task(
        config.task.name,
        vocabulary=vocabulary,
        schema=population.schema,
        words=population.words,
        max_length=config.task.max_length,
    )
    task.check(population)
    return Experiment(config, population, vocabulary, task, local_training(config, len(population)))


def whole_population(config: DictConfig) -> tuple[Population, Population]:
    """The population of a run, on its timeline, and what of it can be read before round 1."""
    population = make_population(config.population, progress=config.run.get("progress", False))
    settings = config.get("timeline")
    timeline = make_timeline(settings, config.rounds)
    if timeline is None:
        population = with_codes(population, config.get("audit"))
        population = with_device_canaries(
            population, config.get("audit"), config.privacy.device.clip_norm
        )
        return population, population
    found = on_timeline(population, timeline, arrival_of(settings))
    return found, found.at_round(0)


def vocabulary_source(config: DictConfig) -> tuple[str, str | None]:
    """Source and file of the vocabulary; `auto` is the tokenizer of a pretrained model."""
    chosen = config.task.vocabulary
    if config.model.name == "pretrained" and chosen.source == "auto":
        return "file", str(tokenizer_file(config.model.path))
    return chosen.source, chosen.path


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
        example = example_clipping(config, privacy.example.noise_multiplier or 0.0)
        if privacy.example.noise_multiplier is None:
            delta = public_deltas(config, devices)["example"]
            example = example_clipping(config, example_noise(config, plan, delta))
    clip = privacy.device.clip_norm if privacy.device.enabled else None
    bounds = None
    if privacy.device.get("private_metrics", False):
        visits = plan.local_epochs * plan.max_examples
        bounds = MetricBounds(privacy.device.metrics_loss_bound, visits)
    return LocalTraining(
        strategy.learning_rate, plan, example, clip, device_optimizer(strategy), bounds
    )


def example_clipping(config: DictConfig, noise_multiplier: float) -> ExampleClipping:
    """What each local step does to its examples, with some noise in round 1.

    Settings of an older run, which lack the modes, mean per-example clipping at a fixed threshold.
    """
    privacy = config.privacy.example
    usual = ExampleClipping(privacy.clip_norm, noise_multiplier)
    decays = privacy.get("noise", "constant") == "decay"
    return ExampleClipping(
        clip_norm=privacy.clip_norm,
        noise_multiplier=noise_multiplier,
        mode=privacy.get("clipping", usual.mode),
        threshold=privacy.get("threshold", usual.threshold),
        micro_batch_size=privacy.get("micro_batch_size", usual.micro_batch_size),
        target_quantile=privacy.get("target_quantile", usual.target_quantile),
        quantile_learning_rate=privacy.get("quantile_learning_rate", usual.quantile_learning_rate),
        count_noise=privacy.get("count_noise", usual.count_noise),
        noise_decay=privacy.noise_decay if decays else usual.noise_decay,
        rounds=config.rounds,
    )


def device_optimizer(strategy: DictConfig) -> DeviceOptimizer:
    """What moves a device's weights; plain SGD where the settings of an older run are silent."""
    usual = DeviceOptimizer()
    return DeviceOptimizer(
        name=strategy.get("device_optimizer", usual.name),
        momentum=strategy.get("momentum", usual.momentum),
        proximal=strategy.get("proximal", usual.proximal),
        weight_decay=strategy.get("weight_decay", usual.weight_decay),
        beta1=strategy.get("device_beta1", usual.beta1),
        beta2=strategy.get("device_beta2", usual.beta2),
        eps_floor=strategy.get("device_eps_floor", usual.eps_floor),
    )


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
    bounded; ConfigError where it is not. With a decay it is the multiplier of round 1, found for a
    device that takes part in the last rounds, which have the least noise: just what the ledger
    books for it (`ExampleClipping.booked`).
    """
    privacy = config.privacy.example
    if privacy.max_participations is None:
        raise ConfigError(
            f"privacy.example.epsilon={privacy.epsilon} depends on how often a device takes part: "
            "set privacy.example.max_participations, or noise_multiplier in place of epsilon"
        )
    from sottovoce.privacy.accounting.calibration import calibrate_noise

    unit = example_clipping(config, 1.0)
    most = privacy.max_participations
    if unit.noise_decay != 1:
        most = min(most, config.rounds)
    shares = Counter(unit.booked(k + 1) for k in range(most))
    entries = [
        (level, plan.rate(level), plan.steps(level, 1 << level) * times, share)
        for share, times in shares.items()
        for level in range(MAX_LEVEL + 1)
    ]
    return calibrate_noise(
        privacy.epsilon,
        delta,
        by_level=[entry[:3] for entry in entries],
        shares=[entry[3] for entry in entries],
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
        keep_freed_memory()
        experiment = build_experiment(config_text)
        source = noise_source(experiment.config.seed, folder)
        model, settings = experiment.initial_model(), experiment.config.get("conditions")
        close_fleets()
        _fleets[key] = SimulatedFleet(
            experiment.population,
            experiment.task,
            model,
            experiment.training,
            source,
            workers=worker_count(experiment.config.run.workers),
            engine=experiment.config.privacy.example.get("engine", "grouped"),
            attendance=attendance(
                make_conditions(settings), experiment.training, trained_bytes(model)
            ),
        )
    return _fleets[key]


def close_fleets() -> None:
    """End the worker processes of this process' fleets."""
    for fleet in _fleets.values():
        fleet.close()
    _fleets.clear()


def noise_source(seed: int | None, folder: str) -> NoiseSource:
    """The randomness of a fleet: kept in `folder`, else of the seed, else fresh."""
    if folder:
        return NoiseSource.load(Path(folder))
    return NoiseSource.from_system() if seed is None else NoiseSource.from_seed(seed)
