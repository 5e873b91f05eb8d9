"""Which settings go together with canary devices: what they could not stand for is refused."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.audit.device_record import KINDS

# Setting, the one value that goes with canary devices, and why no other does.
ONLY: tuple[tuple[str, object, str], ...] = (
    ("noise_cohort_size", None, "is a projection, whose epsilon no attack could test"),
    ("strategy.level_epsilon", None, "has devices report their level, which canaries do not"),
    ("timeline.name", "static", "moves data between periods, to none of which canaries belong"),
)


def check_device_canaries(config: DictConfig) -> None:
    """Raise ConfigError, in one line, where canary devices cannot be what they stand for."""
    if not OmegaConf.select(config, "audit.device_canaries"):
        return
    kind = config.audit.canary_kind
    if kind not in KINDS:
        raise ConfigError(f"audit.canary_kind={kind} is unknown: choose {' or '.join(KINDS)}")
    for key, only, why in ONLY:
        value = OmegaConf.select(config, key)
        if value is not None and value != only:
            raise ConfigError(
                f"{key}={value} {why}: set {key}={'null' if only is None else only}, or "
                "audit.device_canaries=0"
            )
