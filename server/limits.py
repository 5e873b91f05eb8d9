"""What the values of a simulation's settings must satisfy, beyond their types.

Only what the settings alone can show is checked here: a population, a task or a model refuses its
own impossible settings when it is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError
from sottovoce.server.canary_device_limits import check_device_canaries
from sottovoce.server.canary_setup import check_canaries
from sottovoce.server.conditions_limits import check_conditions
from sottovoce.server.device_limits import check_device_layer
from sottovoce.server.live_limits import check_live
from sottovoce.server.report_limits import check_level_reports
from sottovoce.server.timeline_limits import check_timeline

LARGE_STEP = 0.005  # of an adaptive optimiser on weights that were pretrained

Limit = tuple[str, Callable[[float], bool]]

POSITIVE: Limit = ("above 0", lambda value: value > 0)
NOT_NEGATIVE: Limit = ("at least 0", lambda value: value >= 0)
AT_LEAST_1: Limit = ("at least 1", lambda value: value >= 1)
AT_LEAST_2: Limit = ("at least 2", lambda value: value >= 2)
SHARE: Limit = ("from 0 to 1", lambda value: 0 <= value <= 1)
RATE: Limit = ("above 0 and at most 1", lambda value: 0 < value <= 1)
DECAY: Limit = ("at least 0 and below 1", lambda value: 0 <= value < 1)
LOCAL: Limit = ("above 0 and at most 20", lambda value: 0 < value <= 20)
INSIDE: Limit = ("between 0 and 1", lambda value: 0 < value < 1)

LIMITS: dict[str, Limit] = {
    "rounds": AT_LEAST_1,
    "cohort_size": AT_LEAST_1,
    "noise_cohort_size": AT_LEAST_1,
    "conditions.seed": NOT_NEGATIVE,
    "conditions.round_minutes": POSITIVE,
    "conditions.start_hour": NOT_NEGATIVE,
    "conditions.dropout": DECAY,
    "conditions.deadline_s": POSITIVE,
    "conditions.jitter": NOT_NEGATIVE,
    "conditions.over_selection": AT_LEAST_1,
    "conditions.reference_examples_per_second": POSITIVE,
    "seed": NOT_NEGATIVE,
    "audit.number": AT_LEAST_1,
    "audit.seed": NOT_NEGATIVE,
    "population.devices": AT_LEAST_1,
    "population.held_out_devices": NOT_NEGATIVE,
    "population.max_examples_per_round": AT_LEAST_1,
    "population.min_devices": AT_LEAST_1,
    "population.min_cohort": AT_LEAST_1,
    "population.wait_s": NOT_NEGATIVE,
    "population.deadline_s": POSITIVE,
    "population.reply_share": RATE,
    "task.max_length": AT_LEAST_2,
    "task.vocabulary.buckets": AT_LEAST_2,
    "model.embedding_size": AT_LEAST_1,
    "model.hidden_size": AT_LEAST_1,
    "model.layers": AT_LEAST_1,
    "model.heads": AT_LEAST_1,
    "model.dropout": DECAY,
    "model.lora_rank": NOT_NEGATIVE,
    "model.lora_alpha": POSITIVE,
    "strategy.server_learning_rate": POSITIVE,
    "strategy.beta1": DECAY,
    "strategy.beta2": DECAY,
    "strategy.tau": POSITIVE,
    "strategy.activity_power": NOT_NEGATIVE,
    "strategy.uniform_mix": SHARE,
    "strategy.max_rate": RATE,
    "strategy.total_weight": POSITIVE,
    "strategy.level_epsilon": LOCAL,
    "strategy.learning_rate": POSITIVE,
    "strategy.batch_size": AT_LEAST_1,
    "strategy.local_epochs": AT_LEAST_1,
    "strategy.momentum": DECAY,
    "strategy.proximal": NOT_NEGATIVE,
    "strategy.weight_decay": NOT_NEGATIVE,
    "strategy.device_beta1": DECAY,
    "strategy.device_beta2": DECAY,
    "strategy.device_eps_floor": POSITIVE,
    "audit.codes": NOT_NEGATIVE,
    "audit.code_copies": AT_LEAST_1,
    "audit.device_canaries": NOT_NEGATIVE,
    "audit.canary_activity": AT_LEAST_1,
    "run.evaluate_every": AT_LEAST_1,
    "run.evaluation_devices": AT_LEAST_1,
    "run.target_metric": POSITIVE,
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
        "micro_batch_size": AT_LEAST_1,
        "target_quantile": INSIDE,
        "quantile_learning_rate": POSITIVE,
        "count_noise": POSITIVE,
        "noise_decay": RATE,
        "min_separation": AT_LEAST_1,
        "bands": AT_LEAST_1,
        "metrics_noise_multiplier": POSITIVE,
        "metrics_loss_bound": POSITIVE,
    }.items()
}

CHOICES: dict[str, tuple[str, ...]] = {
    "population.upload_encoding": ("fp32", "fp16", "int8"),
    "population.download_encoding": ("fp32", "fp16", "int8"),
    "task.vocabulary.source": ("auto", "grammar", "hash", "file", "training_text"),
    "audit.canaries": ("none", "natural", "mislabelled", "unique_token"),
    "strategy.sampler": ("activity", "uniform", "fixed_size"),
    "strategy.activity_weight": ("linear", "power", "log"),
    "strategy.device_optimizer": ("sgd", "adam"),
    "privacy.device.clipping": ("fixed", "adaptive"),
    "privacy.device.mechanism": ("independent", "tree", "banded", "bisr", "blt"),
    "privacy.example.clipping": ("per_example", "micro_batch"),
    "privacy.example.threshold": ("fixed", "automatic", "quantile", "layer_wise"),
    "privacy.example.noise": ("constant", "decay"),
    "privacy.example.engine": ("grouped", "opacus"),
}

USUAL = {"clipping": "per_example", "threshold": "fixed", "noise": "constant"}


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
    _check_pretrained(cfg)
    _check_cohort(cfg)
    _check_device_steps(cfg)
    for unit in ("device", "example"):
        _check_privacy(cfg, unit)
    _check_modes(cfg)
    check_device_layer(cfg)
    check_level_reports(cfg)
    check_conditions(cfg)
    check_timeline(cfg)
    check_device_canaries(cfg)
    check_canaries(cfg)
    check_live(cfg)
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
        raise ConfigError(f"run.workers={workers} must be a number of processes, or auto")


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


def _check_pretrained(cfg: DictConfig) -> None:
    source = cfg.task.vocabulary.source
    if cfg.model.name == "pretrained" and source not in ("auto", "file"):
        raise ConfigError(
            f"task.vocabulary.source={source} is not what model=pretrained was trained on: set "
            "task.vocabulary.source=auto, which takes its tokenizer.json"
        )


def _check_cohort(cfg: DictConfig) -> None:
    devices = _declared_devices(cfg)
    if devices is not None and cfg.cohort_size > devices:
        raise ConfigError(
            f"cohort_size={cfg.cohort_size} is more than population.devices={devices}: "
            "lower the one or raise the other"
        )


def _check_device_steps(cfg: DictConfig) -> None:
    """Settings that an older run does not have say nothing."""
    strategy = cfg.strategy
    if strategy.get("device_optimizer") == "adam" and strategy.momentum:
        raise ConfigError(
            f"strategy.momentum={strategy.momentum:g} is not used by "
            "strategy.device_optimizer=adam: set strategy.device_beta1, and strategy.momentum=0"
        )
    pulls = {key: strategy.get(key) or 0.0 for key in ("proximal", "weight_decay")}
    drag = strategy.learning_rate * sum(pulls.values())
    if drag >= 1:
        raise ConfigError(
            f"strategy.learning_rate={strategy.learning_rate:g} times strategy.proximal="
            f"{pulls['proximal']:g} plus strategy.weight_decay={pulls['weight_decay']:g} is "
            f"{drag:g} and must be below 1, or a step overshoots what pulls it: lower one of them"
        )


def _check_modes(cfg: DictConfig) -> None:
    example = cfg.privacy.example
    for key, value in USUAL.items():
        if not example.enabled and example.get(key, value) != value:
            raise ConfigError(
                f"privacy.example.{key}={example[key]} does nothing while "
                "privacy.example.enabled=false: choose privacy=example or privacy=both, or set "
                f"privacy.example.{key}={value}"
            )
    count_noise, noise = example.get("count_noise"), example.noise_multiplier
    if count_noise is not None and example.threshold != "quantile":
        raise ConfigError(
            f"privacy.example.count_noise={count_noise:g} is only used by "
            "privacy.example.threshold=quantile: choose that, or set it to null"
        )
    if count_noise is not None and noise is not None and count_noise <= noise / 2:
        raise ConfigError(
            f"privacy.example.count_noise={count_noise:g} must be above half of "
            f"privacy.example.noise_multiplier={noise:g}, or the count alone would spend more than "
            "a step may: raise it, or set it to null"
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
    model, strategy = cfg.model, cfg.strategy
    if model.name == "pretrained" and model.lora_rank == 0 and not model.heads_only:
        if strategy.name == "fedadam" and strategy.server_learning_rate > LARGE_STEP:
            yield (
                f"strategy.server_learning_rate={strategy.server_learning_rate:g} moves every "
                "pretrained weight by about as much in a round, which undoes the pretraining: with "
                "model.lora_rank=0 set 0.001 or less, or strategy=fedavg"
            )
    privacy = cfg.privacy
    noised = privacy.example.enabled and privacy.example.noise_multiplier != 0
    for key, value in (("strategy.device_optimizer", "adam"),
                       ("privacy.example.threshold", "quantile")):
        if OmegaConf.select(cfg, key) == value and noised and privacy.device.enabled:
            yield (
                f"{key}={value} clips each device's whole update, its own noise with it, to "
                "privacy.device.clip_norm: little signal may be left; "
                f"{'sgd' if value == 'adam' else 'a fixed one'} clips the signal alone"
            )
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
