"""The settings of a run: a dataclass for each group of `configs/`, and what they must satisfy.

`register` puts the dataclasses into Hydra's ConfigStore as `base_<name>`; the YAML files build on
them, so that a key that does not exist or a value of the wrong type is refused while composing.
`validate` (of `sottovoce.server.limits`) refuses what only the values can show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from sottovoce.server.limits import validate as validate


@dataclass
class VocabularyConfig:
    """Where word ids come from. `training_text` reads private text: a release of its own."""

    source: str = "auto"
    buckets: int = 4096
    path: str | None = None


@dataclass
class TaskConfig:
    name: str = MISSING
    max_length: int = 32
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)


@dataclass
class RecurrentConfig:
    name: str = MISSING
    embedding_size: int = 64
    hidden_size: int = 64
    layers: int = 1
    dropout: float = 0.0


@dataclass
class TransformerConfig:
    """`hidden_size` is the width of a position; `heads` divides it."""

    name: str = MISSING
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0


@dataclass
class FedAvgConfig:
    """Who is sampled, what a device does with its examples, and how the sum is applied.

    `max_rate: null` caps the sampling rate at ten times that of uniform sampling.
    """

    name: str = "fedavg"
    server_learning_rate: float = 1.0
    sampler: str = "activity"
    activity_weight: str = "linear"
    activity_power: float = 0.5
    uniform_mix: float = 0.0
    max_rate: float | None = None
    total_weight: float | None = None
    learning_rate: float = 0.5
    batch_size: int = 8
    local_epochs: int = 1


@dataclass
class FedAdamConfig(FedAvgConfig):
    name: str = "fedadam"
    server_learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-4


@dataclass
class DevicePrivacyConfig:
    """Each device's update clipped to `clip_norm`, the cohort's sum noised once.

    Give the noise or the epsilon that it is found for; `delta: null` takes a public default.
    """

    enabled: bool = False
    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    max_epsilon: float | None = None


@dataclass
class ExamplePrivacyConfig(DevicePrivacyConfig):
    """Each example's gradient clipped to `clip_norm`, noise in every local step (eDP-SGD)."""

    max_participations: int | None = None
    clipping: str = "per_example"
    threshold: str = "fixed"


@dataclass
class PrivacyConfig:
    device: DevicePrivacyConfig = field(default_factory=DevicePrivacyConfig)
    example: ExamplePrivacyConfig = field(default_factory=ExamplePrivacyConfig)


@dataclass
class RunConfig:
    """What is measured and kept. `dir: null` is runs/<date>/<time>.

    `workers`: threads that train devices, or `auto` for one per core; no result depends on it.
    """

    evaluate_every: int = 5
    evaluation_devices: int = 1000
    checkpoint_every: int = 1
    keep_checkpoints: int = 2
    workers: int | str = "auto"
    dir: str | None = None
    progress: bool = True
    report: bool = True


@dataclass
class SimulateConfig:
    """`seed: null` takes entropy from the operating system, for the noise above all."""

    population: Any = MISSING
    task: TaskConfig = field(default_factory=TaskConfig)
    model: Any = MISSING
    strategy: Any = MISSING
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    run: RunConfig = field(default_factory=RunConfig)
    rounds: int = 60
    cohort_size: int = 500
    seed: int | None = None
    resume: str | None = None


@dataclass
class ReportConfig:
    """`run`: the folder to report on."""

    run: str | None = None


def register(verb: str) -> None:
    """Make the dataclasses of a verb known to Hydra; doing it twice changes nothing."""
    store = ConfigStore.instance()
    for group, name, node in _nodes(verb):
        store.store(group=group, name=name, node=node, provider="sottovoce")


def _nodes(verb: str) -> list[tuple[str | None, str, Any]]:
    """(group, name, dataclass). Imported per verb: some stand beside heavy code."""
    if verb == "report":
        return [(None, "base_report", ReportConfig)]
    if verb == "audit":
        from sottovoce.privacy.audit.run import AuditConfig

        return [(None, "base_audit", AuditConfig)]
    if verb == "account":
        from sottovoce.server.account import AccountConfig

        return [(None, "base_account", AccountConfig)]
    from sottovoce.simulations.assistant import AssistantConfig
    from sottovoce.simulations.jsonl import JsonlConfig

    return [
        (None, "base_simulate", SimulateConfig),
        ("population", "base_assistant", AssistantConfig),
        ("population", "base_jsonl", JsonlConfig),
        ("model", "base_recurrent", RecurrentConfig),
        ("model", "base_transformer", TransformerConfig),
        ("strategy", "base_fedavg", FedAvgConfig),
        ("strategy", "base_fedadam", FedAdamConfig),
    ]
