"""What the values of a simulation's settings must satisfy, beyond their types.

Only what the settings alone can show is checked here: a population, a task or a model refuses its
own impossible settings when it is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError

Limit = tuple[str, Callable[[float], bool]]

POSITIVE: Limit = ("above 0", lambda value: value > 0)
NOT_NEGATIVE: Limit = ("at least 0", lambda value: value >= 0)
AT_LEAST_1: Limit = ("at least 1", lambda value: value >= 1)
AT_LEAST_2: Limit = ("at least 2", lambda value: value >= 2)
SHARE: Limit = ("from 0 to 1", lambda value: 0 <= value <= 1)
RATE: Limit = ("above 0 and at most 1", lambda value: 0 < value <= 1)
DECAY: Limit = ("at least 0 and below 1", lambda value: 0 <= value < 1)
INSIDE: Limit = ("between 0 and 1", lambda value: 0 < value < 1)

LIMITS: dict[str, Limit] = {
    "rounds": AT_LEAST_1,
    "cohort_size": AT_LEAST_1,
    "seed": NOT_NEGATIVE,
    "population.devices": AT_LEAST_1,
    "population.held_out_devices": NOT_NEGATIVE,
    "population.max_examples_per_round": AT_LEAST_1,
    "task.max_length": AT_LEAST_2,
    "task.vocabulary.buckets": AT_LEAST_2,
    "model.embedding_size": AT_LEAST_1,
    "model.hidden_size": AT_LEAST_1,
    "model.layers": AT_LEAST_1,
    "model.heads": AT_LEAST_1,
    "model.dropout": DECAY,
    "strategy.server_learning_rate": POSITIVE,
    "strategy.beta1": DECAY,
    "strategy.beta2": DECAY,
    "strategy.tau": POSITIVE,
    "strategy.activity_power": NOT_NEGATIVE,
    "strategy.uniform_mix": SHARE,
    "strategy.max_rate": RATE,
    "strategy.total_weight": POSITIVE,
    "strategy.learning_rate": POSITIVE,
    "strategy.batch_size": AT_LEAST_1,
    "strategy.local_epochs": AT_LEAST_1,
    "run.evaluate_every": AT_LEAST_1,
    "run.evaluation_devices": AT_LEAST_1,
    "run.checkpoint_every": AT_LEAST_1,
    "run.keep_checkpoints": AT_LEAST_1,
} | {
    f"privacy.{unit}.{key}": limit
    for unit in ("device", "example")
    for key, limit in {
        "clip_norm": POSITIVE,
        "noise_multiplier": NOT_NEGATIVE,
        "epsilon": POSITIVE,
        "max_epsilon": POSITIVE,
        "delta": INSIDE,
        "max_participations": AT_LEAST_1,
    }.items()
}

CHOICES: dict[str, tuple[str, ...]] = {
    "task.vocabulary.source": ("auto", "grammar", "hash", "file", "training_text"),
    "strategy.sampler": ("activity", "uniform", "fixed_size"),
    "strategy.activity_weight": ("linear", "power", "log"),
    "privacy.example.clipping": ("per_example",),
    "privacy.example.threshold": ("fixed",),
}


def validate(cfg: DictConfig) -> list[str]:
    """Warnings about the settings of a simulation; ConfigError where they are impossible."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{key} is missing: give {key}=VALUE")
    for key, limit in LIMITS.items():
        _check_limit(cfg, key, limit)
    for key, choices in CHOICES.items():
        _check_choice(cfg, key, choices)
    _check_workers(cfg)
    _check_vocabulary(cfg)
    _check_cohort(cfg)
    for unit in ("device", "example"):
        _check_privacy(cfg, unit)
    return list(_warnings(cfg))


def _check_limit(cfg: DictConfig, key: str, limit: Limit) -> None:
    value = OmegaConf.select(cfg, key)
    words, holds = limit
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise ConfigError(f"{key}={value} must be {words}")


def _check_choice(cfg: DictConfig, key: str, choices: tuple[str, ...]) -> None:
    value = OmegaConf.select(cfg, key)
    if value is not None and value not in choices:
        raise ConfigError(f"{key}={value} does not exist: choose {' or '.join(choices)}")


def _check_workers(cfg: DictConfig) -> None:
    workers = cfg.run.workers
    if workers != "auto" and not (isinstance(workers, int) and workers >= 1):
        raise ConfigError(f"run.workers={workers} must be a number of threads, or auto")


def _check_vocabulary(cfg: DictConfig) -> None:
    source, path = cfg.task.vocabulary.source, cfg.task.vocabulary.path
    if source == "file" and path is None:
        raise ConfigError(
            "task.vocabulary.source=file needs the file: give task.vocabulary.path=FILE"
        )
    if source != "file" and path is not None:
        raise ConfigError(
            f"task.vocabulary.path={path} is not read while task.vocabulary.source={source}: "
            "set task.vocabulary.source=file"
        )


def _check_cohort(cfg: DictConfig) -> None:
    devices = _declared_devices(cfg)
    if devices is not None and cfg.cohort_size > devices:
        raise ConfigError(
            f"cohort_size={cfg.cohort_size} is more than population.devices={devices}: "
            "lower the one or raise the other"
        )


def _declared_devices(cfg: DictConfig) -> int | None:
    """Training devices, where the settings say how many; None where the data will."""
    if OmegaConf.select(cfg, "population.users") in ("auto", "natural"):
        return None
    devices = OmegaConf.select(cfg, "population.devices")
    return None if devices is None else int(devices)


def _check_privacy(cfg: DictConfig, unit: str) -> None:
    layer, here = cfg.privacy[unit], f"privacy.{unit}"
    given = [key for key in ("noise_multiplier", "epsilon") if layer[key] is not None]
    if not layer.enabled:
        for key in (*given, *(["max_epsilon"] if layer.max_epsilon is not None else [])):
            raise ConfigError(
                f"{here}.{key}={layer[key]:g} protects nothing while {here}.enabled=false: "
                f"choose privacy={unit} or privacy=both, or set {here}.{key}=null"
            )
        return
    if not given:
        raise ConfigError(
            f"{here} has neither noise nor a target: give {here}.epsilon=4 or "
            f"{here}.noise_multiplier=1"
        )
    if len(given) == 2:
        raise ConfigError(
            f"{here}.epsilon={layer.epsilon:g} and {here}.noise_multiplier="
            f"{layer.noise_multiplier:g} contradict each other: set one of them to null"
        )


def _warnings(cfg: DictConfig) -> Iterator[str]:
    for unit in ("device", "example"):
        layer, here = cfg.privacy[unit], f"privacy.{unit}"
        if not layer.enabled:
            continue
        if layer.noise_multiplier == 0:
            yield f"{here}.noise_multiplier=0 clips but adds no noise: epsilon is infinite"
        if layer.epsilon and layer.max_epsilon and layer.epsilon > layer.max_epsilon:
            yield (
                f"{here}.epsilon={layer.epsilon:g} is above {here}.max_epsilon="
                f"{layer.max_epsilon:g}: the run will stop before its last round"
            )
