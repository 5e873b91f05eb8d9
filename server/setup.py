"""From settings to a strategy with its guarantee: sampler, noise, budget, and what to warn of."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.models.hub_files import checked_folder
from sottovoce.privacy.accounting.calibration import calibrate_noise
from sottovoce.privacy.accounting.events import NonPrivateRelease, Unit
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.correlated import CorrelatedMechanism
from sottovoce.privacy.mechanisms.device import DeviceMechanism, variance_bound
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.private_metrics import PrivateMetrics
from sottovoce.server.budget import RunBudget
from sottovoce.server.canary_setup import canary_warnings, pin_canaries
from sottovoce.server.checkpoints import RunState
from sottovoce.server.conditions_limits import projection_factor
from sottovoce.server.conditions_setup import conditions_warnings, divisor, run_claims
from sottovoce.server.device_canaries import canary_watch
from sottovoce.server.limits import validate
from sottovoce.server.live_run import placement_of
from sottovoce.server.metrics_setup import CLAIM as MEASURED
from sottovoce.server.metrics_setup import private_metrics
from sottovoce.server.schedule_setup import (
    CLAIM,
    adaptive_mechanism,
    correlated_mechanism,
    participation_of,
    sampler_of,
    schedule_of,
    take_up,
)
from sottovoce.server.timeline_setup import activity_of
from sottovoce.simulations.experiment import Experiment, public_deltas
from sottovoce.strategies.levels import MAX_LEVEL
from sottovoce.strategies.noised_sum import Mechanism, NoisedSum
from sottovoce.strategies.optimizers import make_server_optimizer
from sottovoce.strategies.samplers import Sampler

UNITS: tuple[Unit, ...] = ("device", "example")
OVERFLOW = 1e-18  # most that a round adds to delta when devices' own noise passes its bound


@dataclass
class Setup:
    """The parts of a run that settings decide. `warnings`: lines for people and report."""

    strategy: NoisedSum
    budget: RunBudget
    sampler: Sampler
    warnings: list[str] = field(default_factory=list)


def make_setup(
    experiment: Experiment, source: NoiseSource, state: RunState | None, settings: str
) -> Setup:
    """Everything between the experiment and its first (or next) round.

    `state`: of the run to continue; its ledger goes on. Raises ConfigError for impossible privacy.
    """
    config, population = experiment.config, experiment.population
    participation = participation_of(config)
    sampler = sampler_of(experiment, source, participation)
    deltas = public_deltas(config, len(population))
    goes_on = state is not None and len(state.ledger) > 0
    ledger = state.ledger if state and goes_on else new_ledger(config, sampler, deltas)
    claims = state.ledger.claims.get(CLAIM) if state else None
    mechanism, figures = device_mechanism(experiment, sampler, deltas, claims)
    for name, said in run_claims(experiment, sampler).items():
        ledger.claims.setdefault(name, said)
    if figures is not None:
        ledger.claims.setdefault(MEASURED, figures.claims())
    if isinstance(mechanism, CorrelatedMechanism):
        ledger.claims.setdefault(CLAIM, mechanism.claims())
    optimizer = make_server_optimizer(
        config.strategy.name,
        learning_rate=config.strategy.server_learning_rate,
        beta1=config.strategy.get("beta1", 0.0),
        beta2=config.strategy.get("beta2", 0.0),
        tau=config.strategy.get("tau", 0.0),
    )
    if state is not None and state.round:
        optimizer.load(state.optimizer)
        participation.load(state.participation)
        take_up(mechanism, state, source)
    strategy = NoisedSum(
        sampler=sampler, activity=activity_of(population), optimizer=optimizer, mechanism=mechanism,
        training=experiment.training, ledger=ledger, participation=participation, source=source,
        settings=settings, private_metrics=figures, divisor=divisor(experiment, sampler),
        projection=projection_factor(config),
        canaries=canary_watch(experiment, source, divisor(experiment, sampler)),
        placement=placement_of(config),
    )
    limits = {
        unit: config.privacy[unit].max_epsilon for unit in deltas if config.privacy[unit].enabled
    }
    lines = warnings(experiment, deltas) + conditions_warnings(experiment, sampler)
    return Setup(strategy, RunBudget(ledger, deltas, limits), sampler, lines)


def new_ledger(config: DictConfig, sampler: Sampler, deltas: Mapping[str, float]) -> Ledger:
    """The ledger before round 1: what was spent on sampling, and what no noise protects."""
    noise = "os entropy" if config.seed is None else "reproducible noise: simulation only"
    ledger = Ledger(
        levels=sampler.devices_by_level, deltas=deltas,
        claims={**sampler.describe(), **({"noise": noise} if deltas else {})},
    )
    for event in sampler.events:
        ledger.append(event)
    if config.privacy.device.enabled:
        ledger.append(NonPrivateRelease(
            purpose="each round's sum before central noise", unit="device", observer="server"))
    if config.task.vocabulary.source == "training_text":
        for unit in (unit for unit in UNITS if unit in deltas):
            ledger.append(NonPrivateRelease(
                purpose="vocabulary read from the training text", unit=unit, observer="release"))
    return ledger


def device_mechanism(
    experiment: Experiment,
    sampler: Sampler,
    deltas: Mapping[str, float],
    claims: Mapping[str, Any] | None = None,
) -> tuple[Mechanism | None, PrivateMetrics | None]:
    """The central mechanism, its noise found for the target epsilon if one is set, and what noises
    training metrics where they are private: the two share a round's noise multiplier.

    `claims`: what the ledger of the run to continue says of correlated noise.
    """
    privacy, rounds = experiment.config.privacy.device, experiment.config.rounds
    if not privacy.enabled:
        return None, None
    noise = privacy.noise_multiplier
    if noise is None and privacy.epsilon is None:
        raise ConfigError("privacy.device needs noise_multiplier or epsilon: set one of them")
    spent = sampler.events
    schedule = schedule_of(experiment.config)
    if schedule is not None:
        return correlated_mechanism(
            experiment.config, schedule, deltas["device"], spent, claims
        ), None
    if noise is None:
        fixed = sampler.sampling == "fixed_size"
        noise = calibrate_noise(
            privacy.epsilon,
            deltas["device"],
            by_level=sampler.plan(rounds),
            sampling=sampler.sampling,
            relation="replace_one" if fixed else "add_remove",
            spent=spent,
        )
    expected = divisor(experiment, sampler)
    bounds = experiment.training.metric_bounds
    figures = private_metrics(experiment.config, bounds, noise, expected)
    noise = noise if figures is None else figures.rest
    if privacy.get("clipping") == "adaptive":
        return adaptive_mechanism(experiment.config, noise, expected), figures
    bound = local_noise_bound(experiment.training, sampler)
    return DeviceMechanism(privacy.clip_norm, noise, bound), figures


def local_noise_bound(training: LocalTraining, sampler: Sampler) -> float:
    """Public bound on the variance that devices' own noise brings into one round's sum.

    It holds but for a probability of `OVERFLOW` a round, which delta has room for. Where only the
    total is public, every device counts as the noisiest.

    *Assumes*: a declared `strategy.total_weight` is not below the true one: cohorts larger than
    expected would pass the bound more often.
    """
    variances = {level: training.noise_variance(level) for level in range(MAX_LEVEL + 1)}
    largest = max(variances.values())
    if largest == 0:
        return 0.0
    if sampler.sampling == "fixed_size":
        return math.ceil(sampler.expected_cohort_size) * largest
    return max(
        variance_bound(
            [
                (count, part.rates.get(level, 0.0), variances[level])
                for level, count in part.most_devices_by_level.items()
            ],
            OVERFLOW,
            largest,
        )
        for part in sampler.parts
    )


def warnings(experiment: Experiment, deltas: Mapping[str, float]) -> list[str]:
    """What a reader of the run must know, a line each."""
    devices = len(experiment.population)
    lines = validate(experiment.config)
    if deltas.get("device", 0.0) >= 1 / devices:
        lines.append(
            f"delta={deltas['device']:g} is not below 1/devices={1 / devices:g}: it would allow "
            "publishing some device's data outright; set privacy.device.delta lower"
        )
    if not experiment.vocabulary.is_public:
        lines.append(
            "the vocabulary was read from the training text: that is a release which no epsilon "
            "covers; use task.vocabulary.source=hash or file"
        )
    lines += canary_warnings(experiment.config)
    if experiment.config.seed is not None and deltas:
        lines.append(
            f"seed={experiment.config.seed} gives reproducible noise: simulation only, "
            "never release a model trained so"
        )
    return lines


def settings_text(config: DictConfig) -> str:
    """Resolved settings as YAML: what `config.yaml` holds and fleets are sent.

    A pretrained model is pinned to its weights, canaries to their seed: whoever builds them from
    these settings has the same.
    """
    settings = config.copy()
    pin_canaries(settings)
    if settings.model.name == "pretrained" and settings.model.sha256 is None:
        settings.model.sha256 = checked_folder(settings.model.path, None)[1]
    if settings.get("audit") and settings.audit.seed is None:
        settings.audit.seed = secrets.randbits(63) if settings.seed is None else settings.seed
    return OmegaConf.to_yaml(settings, resolve=True)


