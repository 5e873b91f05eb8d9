"""What a run with canaries needs beyond its other settings (`sottovoce.simulations.canaries`)."""

from __future__ import annotations

import secrets

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError

SEED_BITS = 62


def pin_canaries(settings: DictConfig) -> None:
    """Write the seed of the canaries into a run's settings, in place, where it is left open.

    It is the run's own seed, or fresh entropy: whoever rebuilds the run has the same coins.
    """
    if OmegaConf.select(settings, "audit.canaries") in (None, "none"):
        return
    if settings.audit.seed is None:
        fresh = secrets.randbits(SEED_BITS)
        settings.audit.seed = fresh if settings.seed is None else settings.seed


def check_canaries(cfg: DictConfig) -> None:
    """Raise ConfigError where canaries do not fit the other settings."""
    if OmegaConf.select(cfg, "audit.canaries") in (None, "none"):
        return
    here = f"audit.canaries={cfg.audit.canaries}"
    if OmegaConf.select(cfg, "timeline.name") not in (None, "static"):
        raise ConfigError(
            f"{here} needs data that stay: set timeline=static, or audit.canaries=none"
        )
    source = cfg.task.vocabulary.source
    if source == "training_text":
        raise ConfigError(
            f"{here} cannot test a vocabulary read from the training text: set "
            "task.vocabulary.source=hash or file"
        )


def canary_warnings(cfg: DictConfig) -> list[str]:
    """What a reader of a run with canaries must know."""
    if OmegaConf.select(cfg, "audit.canaries") in (None, "none"):
        return []
    return [
        f"{cfg.audit.number} {cfg.audit.canaries} canary candidates take the place of training "
        "examples: this run is made to be audited, do not ship its model"
    ]
