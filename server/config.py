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
class PretrainedConfig:
    """A model of `transformers`: `path`, a folder or org/name on the hub, and what of it trains.

    `sha256`: of its weights; null takes those that are there and writes it into the run's settings.
    `lora_rank: 0` trains all weights, `heads_only` none but the heads; `lora_alpha: null` is
    2 * lora_rank, `lora_targets: null` queries and values. `dropout` is that of hidden states.
    """

    name: str = MISSING
    path: str = MISSING
    sha256: str | None = None
    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_targets: Any = None
    heads_only: bool = False
    dropout: float = 0.0


@dataclass
class FedAvgConfig:
    """Who is sampled, what a device does with its examples, and how the sum is applied.

    `max_rate: null` caps the sampling rate at ten times that of uniform sampling. A device steps
    by `device_optimizer`: sgd (with `momentum`) or adam (DP-AdamBC, with `device_beta1`,
    `device_beta2`; `device_eps_floor: null` is the variance of a step's noise). `proximal` pulls
    its weights towards the global ones (FedProx), `weight_decay` towards zero.

    `level_epsilon`: every device reports its activity level once, by randomised response of that
    local epsilon, and is sampled by its report; null: by its own level, which is taken as public
    to the coordinator.
    """

    name: str = "fedavg"
    server_learning_rate: float = 1.0
    sampler: str = "activity"
    activity_weight: str = "linear"
    activity_power: float = 0.5
    uniform_mix: float = 0.0
    max_rate: float | None = None
    total_weight: float | None = None
    level_epsilon: float | None = None
    learning_rate: float = 0.5
    batch_size: int = 8
    local_epochs: int = 1
    device_optimizer: str = "sgd"
    momentum: float = 0.0
    proximal: float = 0.0
    weight_decay: float = 0.0
    device_beta1: float = 0.9
    device_beta2: float = 0.999
    device_eps_floor: float | None = None


@dataclass
class FedAdamConfig(FedAvgConfig):
    name: str = "fedadam"
    server_learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-4


@dataclass
class UnitPrivacyConfig:
    """What both layers have. Give the noise or the epsilon that it is found for; `delta: null`
    takes a public default.
    """

    enabled: bool = False
    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    max_epsilon: float | None = None


@dataclass
class DevicePrivacyConfig(UnitPrivacyConfig):
    """Each device's update clipped to `clip_norm`, the cohort's sum noised once.

    `clipping`: fixed; or adaptive, where `clip_norm` is the first bound, which then follows the
    `target_quantile` of updates' norms by noised counts (`count_noise: null` is a twentieth of the
    cohort), the noise so split that a round costs what `noise_multiplier` says.

    `min_separation`: rounds that a device rests after it took part, `max_participations` its rounds
    in all (null: as many as fit). With them the claim rests on this schedule and on no secret
    draw, and `mechanism` says how noise is spread over rounds: independent; tree; banded, with
    `bands` (null: up to 32); bisr, with `bands` of the inverse; blt, with `bands` buffers.
    `noise_multiplier` is then that of the noise before it is correlated.

    `private_metrics`: training metrics of a round get noise of their own under the sample of its
    sum, `metrics_noise_multiplier` for all of them together (null: a hundredth of the cohort on
    each, and at least 4 noise multipliers), the sum a little more, so that the round costs what it
    did. Devices cut the mean loss they state to `metrics_loss_bound`.
    """

    clipping: str = "fixed"
    target_quantile: float = 0.5
    quantile_learning_rate: float = 0.2
    count_noise: float | None = None
    mechanism: str = "independent"
    min_separation: int | None = None
    max_participations: int | None = None
    bands: int | None = None
    private_metrics: bool = False
    metrics_noise_multiplier: float | None = None
    metrics_loss_bound: float = 10.0


@dataclass
class ExamplePrivacyConfig(UnitPrivacyConfig):
    """Each example's gradient clipped to `clip_norm`, noise in every local step (eDP-SGD).

    `clipping`: per_example, or micro_batch, which clips the mean gradient of about
    `micro_batch_size` examples at twice the sensitivity: the ledger counts half the noise
    multiplier. `threshold`: fixed; automatic, which scales every gradient to about `clip_norm`;
    layer_wise, which gives each layer an equal part of it; or quantile, where a device moves its
    threshold, from `clip_norm` on, towards the `target_quantile` of its gradients' norms by noised
    counts (`count_noise: null` is a twentieth of the batch, and `noise_multiplier` at least).
    `noise`: constant, or decay, by `noise_decay` from round to round. `engine`: grouped, many
    devices at once; or opacus, one by one, for layers without a grouped form (with or without this
    privacy).
    """

    max_participations: int | None = None
    clipping: str = "per_example"
    micro_batch_size: int = 4
    threshold: str = "fixed"
    target_quantile: float = 0.5
    quantile_learning_rate: float = 0.2
    count_noise: float | None = None
    noise: str = "constant"
    noise_decay: float = 0.99
    engine: str = "grouped"


@dataclass
class PrivacyConfig:
    device: DevicePrivacyConfig = field(default_factory=DevicePrivacyConfig)
    example: ExamplePrivacyConfig = field(default_factory=ExamplePrivacyConfig)


@dataclass
class RunConfig:
    """What is measured and kept. `dir: null` is runs/<date>/<time>.

    `workers`: processes that train devices, or `auto` for one per core; no result depends on it.
    `target_metric`: of the leading metric; the report says when, and at what cost, it was reached.
    """

    evaluate_every: int = 5
    evaluation_devices: int = 1000
    target_metric: float | None = None
    checkpoint_every: int = 1
    keep_checkpoints: int = 2
    workers: int | str = "auto"
    dir: str | None = None
    progress: bool = True
    report: bool = True


@dataclass
class TimelineConfig:
    """What devices hold when. `name`: static, or continual: `periods` of `rounds_per_period` rounds
    each (null: as many as the rounds need), in which a device keeps an example for `retention`
    periods; sampling rates follow.

    A generated population: `variation`, spread of the logarithm of a device's arrivals between
    periods; `late`, share of devices that join after the first; `leave`, share that falls silent
    after each; `drift`, of intents, by period. Real data: `order`, lines (a device's lines in
    their order, evenly over the periods) or shuffled (each in a period by hash).
    """

    name: str = "static"
    periods: int = 6
    rounds_per_period: int | None = None
    retention: int = 2
    variation: float = 0.5
    late: float = 0.1
    leave: float = 0.03
    drift: float = 0.2
    order: str = "lines"


@dataclass
class AuditCanaries:
    """What a run is given so that `sottovoce audit` can test its claims; by default nothing.

    `canaries`: none; natural (real examples), mislabelled (wrong labels; for next_word, words of
    other texts) or unique_token (words that nobody uses). Each of `number` candidates takes the
    place of a training example and is put in, or left out, by its own fair coin. `seed` decides
    which, where and by what coins (null: the run's seed, or fresh entropy, kept in its settings).

    `codes`: devices more that each say one code canary, `code_copies` times: secrets to extract.

    `device_canaries`: devices more, each in or out by its own fair coin, which hand over a random
    direction or train on a text of their own (`canary_kind`: direction, text), at the activity
    `canary_activity` (null: the busiest level's).
    """

    canaries: str = "none"
    number: int = 1000
    seed: int | None = None
    codes: int = 0
    code_copies: int = 100
    device_canaries: int = 0
    canary_kind: str = "direction"
    canary_activity: int | None = None


@dataclass
class SimulateConfig:
    """`seed: null` takes entropy from the operating system, for the noise above all.

    `noise_cohort_size`: noise and accounting of cohorts of that size, of which `cohort_size`
    devices are simulated: a projection, which has no epsilon of its own.
    """

    population: Any = MISSING
    task: TaskConfig = field(default_factory=TaskConfig)
    model: Any = MISSING
    strategy: Any = MISSING
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    conditions: Any = MISSING
    timeline: TimelineConfig = field(default_factory=TimelineConfig)
    audit: AuditCanaries = field(default_factory=AuditCanaries)
    run: RunConfig = field(default_factory=RunConfig)
    rounds: int = 60
    cohort_size: int = 500
    noise_cohort_size: int | None = None
    seed: int | None = None
    resume: str | None = None


GATEWAY_VERBS = ("gateway", "status", "tokens", "revoke")


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
        from sottovoce.privacy.audit.settings import AuditConfig

        return [(None, "base_audit", AuditConfig)]
    if verb == "account":
        from sottovoce.server.account import AccountConfig

        return [(None, "base_account", AccountConfig)]
    if verb == "study":
        from sottovoce.server.study import StudyConfig

        return [(None, "base_study", StudyConfig), *_nodes("simulate")]
    if verb == "serve":
        from sottovoce.server.gateway_config import ServeConfig

        return [(None, "base_serve", ServeConfig), *_nodes("simulate")]
    if verb in GATEWAY_VERBS:
        from sottovoce.server.gateway_config import nodes

        return nodes(verb)
    from sottovoce.simulations.assistant import AssistantConfig
    from sottovoce.simulations.conditions import ConditionsConfig
    from sottovoce.simulations.jsonl import JsonlConfig
    from sottovoce.simulations.live_population import LiveConfig
    from sottovoce.simulations.parquet import ParquetConfig

    return [
        (None, "base_simulate", SimulateConfig),
        ("conditions", "base_conditions", ConditionsConfig),
        ("timeline", "base_timeline", TimelineConfig),
        ("population", "base_assistant", AssistantConfig),
        ("population", "base_jsonl", JsonlConfig),
        ("population", "base_parquet", ParquetConfig),
        ("population", "base_live", LiveConfig),
        ("model", "base_recurrent", RecurrentConfig),
        ("model", "base_transformer", TransformerConfig),
        ("model", "base_pretrained", PretrainedConfig),
        ("strategy", "base_fedavg", FedAvgConfig),
        ("strategy", "base_fedadam", FedAdamConfig),
    ]
