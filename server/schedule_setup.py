"""From settings to what a device-level claim without sampling rests on, or to a moving clip norm.

`privacy.device.min_separation` is the switch: with it the coordinator lets a device rest for so
many rounds, claims no secret draw, and may correlate its noise (`privacy.device.mechanism`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.calibration import calibrate_noise
from sottovoce.privacy.accounting.events import Event
from sottovoce.privacy.mechanisms.adaptive import AdaptiveMechanism
from sottovoce.privacy.mechanisms.correlated import CorrelatedMechanism, from_claims
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.optimised import make_factorisation
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.privacy.optimizer.quantile import QuantileClip, default_count_noise
from sottovoce.server.checkpoints import RunState
from sottovoce.server.conditions_limits import asked_cohort
from sottovoce.server.conditions_setup import simulated_part
from sottovoce.simulations.continual import ContinualPopulation
from sottovoce.simulations.experiment import Experiment
from sottovoce.simulations.timeline import make_timeline
from sottovoce.strategies.noised_sum import CENTRAL_NOISE
from sottovoce.strategies.participation import Participation
from sottovoce.strategies.periods import make_period_sampler
from sottovoce.strategies.samplers import Sampler, make_sampler
from sottovoce.strategies.separated import make_separated_sampler
from sottovoce.strategies.windowed import WindowedParticipation

CLAIM = "correlated_noise"


def schedule_of(config: DictConfig) -> Schedule | None:
    """Who may take part when, None where a run makes no such promise."""
    device = config.privacy.device
    if not device.enabled or device.get("min_separation") is None:
        return None
    return Schedule(config.rounds, device.min_separation, device.max_participations)


def participation_of(config: DictConfig) -> Participation:
    """An empty record of participations, with the bounds that the run's claims need."""
    schedule, example = schedule_of(config), config.privacy.example.max_participations
    timeline = make_timeline(config.get("timeline"), config.rounds)
    if timeline is not None:
        return WindowedParticipation(timeline, example)
    if schedule is None:
        return Participation(example)
    limit = min(schedule.participations, example or schedule.participations)
    return Participation(limit, schedule.min_separation)


def sampler_of(
    experiment: Experiment, source: NoiseSource, participation: Participation
) -> Sampler:
    """The sampler of a run. Raises ConfigError where its population is too small."""
    config, population = experiment.config, experiment.population
    schedule, asked = schedule_of(config), asked_cohort(config)
    if schedule is not None:
        return simulated_part(make_separated_sampler(
            config.strategy, population, int(asked), schedule,
            participation=participation, source=source,
        ), config)
    if isinstance(population, ContinualPopulation):
        return make_period_sampler(
            config.strategy, population, asked, source=source,
            private=config.privacy.device.enabled,
        )
    return simulated_part(make_sampler(
        config.strategy, population, asked, source=source,
        private=config.privacy.device.enabled,
    ), config)


def correlated_mechanism(
    config: DictConfig,
    schedule: Schedule,
    delta: float,
    spent: Sequence[Event],
    claims: Mapping[str, Any] | None,
) -> CorrelatedMechanism:
    """The mechanism of a schedule, its noise found for the target epsilon if one is set.

    `claims`: of the run to continue: what it began with stays as it was.
    """
    if claims is not None:
        return _continued(claims, schedule)
    device = config.privacy.device
    name = "identity" if device.mechanism == "independent" else device.mechanism
    try:
        factorisation = make_factorisation(name, schedule, device.bands)
    except ValueError as error:
        raise ConfigError(f"privacy.device: {error}") from None
    noise = device.noise_multiplier
    if noise is None:
        noise = calibrate_noise(
            device.epsilon, delta, 1.0, 1, sampling="none", relation="zero_out", spent=spent
        ) * factorisation.sensitivity(schedule)
    return CorrelatedMechanism(device.clip_norm, noise, factorisation, schedule)


def _continued(claims: Mapping[str, Any], schedule: Schedule) -> CorrelatedMechanism:
    """A run's own mechanism. Raises ConfigError where its settings were made to say otherwise."""
    found = from_claims(claims)
    planned = found.schedule
    for name in ("rounds", "min_separation", "participations"):
        if getattr(planned, name) != getattr(schedule, name):
            raise ConfigError(
                f"{name}={getattr(schedule, name)} is not the {getattr(planned, name)} that the "
                "run's noise was planned for: start a new run"
            )
    return found


def adaptive_mechanism(
    config: DictConfig, noise_multiplier: float, expected_cohort_size: float
) -> AdaptiveMechanism:
    """A clip norm that begins at `privacy.device.clip_norm` and follows the target quantile."""
    device = config.privacy.device
    count_noise = device.count_noise
    if count_noise is None:
        count_noise = default_count_noise(expected_cohort_size, noise_multiplier)
    try:
        quantile = QuantileClip(
            device.clip_norm, count_noise=count_noise, target=device.target_quantile,
            learning_rate=device.quantile_learning_rate,
        )
        return AdaptiveMechanism(quantile, noise_multiplier, expected_cohort_size)
    except ValueError as error:
        raise ConfigError(f"privacy.device.clipping=adaptive: {error}") from None


def take_up(mechanism: object, state: RunState, source: NoiseSource) -> None:
    """Bring a mechanism to where it was after the rounds of `state`."""
    if isinstance(mechanism, CorrelatedMechanism):
        mechanism.replay(
            state.round, state.parameters, lambda number: source.generator(CENTRAL_NOISE, number)
        )
    elif isinstance(mechanism, AdaptiveMechanism):
        mechanism.load(state.mechanism)
