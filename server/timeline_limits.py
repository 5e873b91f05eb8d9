"""Which settings go together with a timeline: what could not be accounted is refused."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError
from sottovoce.simulations.timeline import make_timeline

# Setting, the one value that goes with a timeline, and why no other does.
ONLY: tuple[tuple[str, object, str], ...] = (
    ("strategy.total_weight", None, "is one total for all periods, whose devices differ"),
    ("strategy.level_epsilon", None, "is one report of a level that changes with the periods"),
    ("privacy.device.min_separation", None, "prefers devices by levels that change"),
    ("privacy.example.epsilon", None,
     "is a target for devices that stay at their level: give privacy.example.noise_multiplier"),
    ("privacy.example.noise", "constant",
     "is booked by how often a device took part at one level"),
    ("audit.codes", 0, "adds devices that belong to no period"),
    ("noise_cohort_size", None, "projects the cohorts of one population"),
)


def check_timeline(config: DictConfig) -> None:
    """Raise ConfigError, in one line, where a timeline is impossible or cannot be accounted.

    Settings that an older run does not have say nothing.
    """
    timeline = make_timeline(config.get("timeline"), config.rounds)
    if timeline is None:
        return
    for key, only, why in ONLY:
        value = OmegaConf.select(config, key)
        if value is not None and value != only:
            raise ConfigError(
                f"{key}={value} {why}: set {key}={'null' if only is None else only}, or "
                "timeline=static"
            )
    if config.strategy.sampler not in ("activity", "uniform"):
        raise ConfigError(
            f"strategy.sampler={config.strategy.sampler} has no rates that follow a timeline: "
            "choose activity or uniform, or timeline=static"
        )
