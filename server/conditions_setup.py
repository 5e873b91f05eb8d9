"""From settings to what device conditions and noise cohorts mean for sampling and accounting.

    asked     noise cohort (or cohort) * over_selection: what is sampled, what the ledger counts
    divisor   asked * the public conditions' expected share of replies: what sums are divided by

Both are public constants of the run. The accountant sees the rates at which devices are asked: that
many do not answer, for reasons that are not their data's, is never counted in anyone's favour.
"""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.server.conditions_limits import (
    conditions_of,
    noise_cohort,
    over_selection,
    projection_factor,
)
from sottovoce.simulations.conditions import Work
from sottovoce.simulations.experiment import Experiment
from sottovoce.strategies.projection import ProjectedSampler
from sottovoce.strategies.samplers import Sampler

CLAIM, PROJECTION = "conditions", "projection"
FEW = 0.9  # of the wanted cohort: expected replies below it are worth a word


def simulated_part(sampler: Sampler, config: DictConfig) -> Sampler:
    """The sampler as run: of a projection only the small cohort."""
    factor = projection_factor(config)
    return sampler if factor == 1 else ProjectedSampler(sampler, 1 / factor)


def work_of(experiment: Experiment) -> Work:
    """What a round asks of a device: its batches, and the trained parameters each way."""
    payload = experiment.payload_bytes
    return Work(experiment.training.plan, payload, payload)


def reply_share(experiment: Experiment, sampler: Sampler) -> float:
    """Expected share of asked devices that answer, by the conditions and public level counts.

    Where no counts are known, devices of the first level stand for all. Of real devices it is what
    the operator declares.
    """
    declared = experiment.config.population.get("reply_share")
    if declared is not None:
        return float(declared)
    conditions = conditions_of(experiment.config)
    if conditions.lossless:
        return 1.0
    counts = sampler.devices_by_level or {0: 1}
    weights = {level: count * sampler.rates[level] for level, count in counts.items()}
    work, rounds = work_of(experiment), experiment.config.rounds
    replies = sum(
        weight * conditions.reply_share(work, level, rounds) for level, weight in weights.items()
    )
    share = replies / sum(weights.values())
    if not share > 0:
        raise ConfigError(
            "conditions leave nobody who could answer: raise conditions.availability or "
            "conditions.deadline_s, or give devices more speed"
        )
    return share


def divisor(experiment: Experiment, sampler: Sampler) -> float:
    """What noised sums are divided by: the expected number of replies, public."""
    return sampler.expected_cohort_size * reply_share(experiment, sampler)


def run_claims(experiment: Experiment, sampler: Sampler) -> dict[str, Any]:
    """What the ledger says of conditions and of a projection; empty where there is neither."""
    config, found = experiment.config, {}
    settings = conditions_of(config).settings
    share = reply_share(experiment, sampler)
    if share != 1 or settings.over_selection != 1:
        found[CLAIM] = {
            "name": settings.name,
            "over_selection": settings.over_selection,
            "asked_cohort_size": sampler.expected_cohort_size,
            "expected_replies": sampler.expected_cohort_size * share,
            "rates": "at which devices are asked; that some do not answer is not counted",
        }
    if projection_factor(config) != 1:
        found[PROJECTION] = {
            "cohort_size": int(config.cohort_size), "noise_cohort_size": noise_cohort(config),
        }
    return found


def conditions_warnings(experiment: Experiment, sampler: Sampler) -> list[str]:
    """What a reader of the run must know of its conditions, a line each."""
    config, lines = experiment.config, []
    if projection_factor(config) != 1:
        lines.append(
            f"projection: noise and epsilon are those of cohorts of {noise_cohort(config):,} "
            f"devices, and {config.cohort_size:,} were simulated: this run itself does not have "
            "this epsilon, and its model must not be released"
        )
    share = reply_share(experiment, sampler)
    asked = config.cohort_size * over_selection(config)
    if share * asked < FEW * config.cohort_size:
        lines.append(
            f"conditions: of {asked:,.0f} devices asked a round, {share * asked:,.0f} are expected "
            f"to answer: for {config.cohort_size:,} set conditions.over_selection="
            f"{math.ceil(10 / share) / 10:g}"
        )
    return lines
