"""Which settings go together with device conditions and noise cohorts, and how many are asked.
"""

from __future__ import annotations

import math

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.server.metrics_setup import wanted
from sottovoce.simulations.conditions import Conditions, check_partial_work, make_conditions


def conditions_of(config: DictConfig) -> Conditions:
    """The run's conditions; a laboratory where the settings of an older run say nothing."""
    return make_conditions(config.get("conditions"))


def over_selection(config: DictConfig) -> float:
    """Devices asked over devices wanted."""
    return conditions_of(config).settings.over_selection


def noise_cohort(config: DictConfig) -> int:
    """The cohort whose noise and accounting the run has: its own, or a projection's."""
    return int(config.get("noise_cohort_size") or config.cohort_size)


def projection_factor(config: DictConfig) -> float:
    """Devices for which each simulated one stands; 1 where a run is what it says."""
    return noise_cohort(config) / int(config.cohort_size)


def asked_cohort(config: DictConfig) -> float:
    """Expected number of devices asked in a round, of which some may not answer.

    A whole number where cohorts have a fixed size.
    """
    wanted_size, factor = noise_cohort(config), over_selection(config)
    if factor == 1:
        return wanted_size
    asked = wanted_size * factor
    fixed = config.strategy.sampler == "fixed_size" or config.privacy.device.get("min_separation")
    return math.ceil(asked - 1e-9) if fixed else asked


def check_conditions(config: DictConfig) -> None:
    """Raise ConfigError, in one line, where conditions or noise cohort contradict other settings.

    Settings that an older run does not have say nothing.
    """
    conditions = conditions_of(config)
    if not conditions.lossless:
        check_partial_work(conditions, config.privacy.example.enabled)
    _check_noise_cohort(config)
    asked, devices = asked_cohort(config), config.population.get("devices")
    if config.population.get("users") in ("auto", "natural") or devices is None:
        return
    if asked > devices and config.cohort_size <= devices:
        raise ConfigError(
            f"cohorts of {asked:,.0f} are to be drawn from population.devices={devices}: lower "
            "cohort_size, noise_cohort_size or conditions.over_selection, or raise the devices"
        )


def _check_noise_cohort(config: DictConfig) -> None:
    noise = config.get("noise_cohort_size")
    if noise is None:
        return
    here, device = f"noise_cohort_size={noise}", config.privacy.device
    if noise < config.cohort_size:
        raise ConfigError(
            f"{here} is below cohort_size={config.cohort_size}: noise of a smaller cohort is what "
            "cohort_size itself gives; raise it, or set it to null"
        )
    if not device.enabled:
        raise ConfigError(
            f"{here} scales the noise of privacy.device, which is not enabled: choose "
            "privacy=device, or set noise_cohort_size=null"
        )
    if config.privacy.example.enabled:
        raise ConfigError(
            f"{here} cannot scale noise that devices add themselves: choose privacy=device, or set "
            "noise_cohort_size=null"
        )
    if wanted(config):
        raise ConfigError(
            f"{here} has no noised training figures of its own: set "
            "privacy.device.private_metrics=false, or noise_cohort_size=null"
        )
