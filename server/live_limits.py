"""What a run over real devices (`population=live`) cannot be combined with."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError

HERE = "population=live"

# What is simulated, or would need devices to say more than they do: (setting, its value here, why).
FIXED: tuple[tuple[str, Any, str], ...] = (
    ("timeline.name", "static", "real devices have their own timeline"),
    ("conditions.name", "none", "real devices have their own conditions"),
    ("audit.canaries", "none", "canaries are put into simulated devices alone"),
    ("audit.codes", 0, "canaries are put into simulated devices alone"),
    ("audit.device_canaries", 0, "canaries are simulated devices"),
    ("strategy.level_epsilon", None, "devices declare their true level"),
    ("privacy.device.private_metrics", False, "devices report no metrics at all"),
    ("noise_cohort_size", None, "a projection is for simulations"),
    ("privacy.example.engine", "grouped", "devices have no Opacus"),
)


def is_live(config: DictConfig) -> bool:
    """Whether the run's devices are real."""
    return bool(OmegaConf.select(config, "population.name") == "live")


def draws_anew(config: DictConfig) -> bool:
    """Whether a resumed run's fleets draw new batches and noise for a round asked for again.

    Real devices always do, whatever seed the coordinator has: its own noise a second time, on
    another sum, would show the difference of the two.
    """
    return is_live(config) or config.seed is None


def check_live(config: DictConfig) -> None:
    """Raise ConfigError, in one line, for what a live run cannot have."""
    if not is_live(config):
        return
    for key, usual, reason in FIXED:
        value = OmegaConf.select(config, key)
        if value is not None and value != usual:
            raise ConfigError(
                f"{key}={value} does not go with {HERE}: {reason}; set "
                f"{key}={'null' if usual is None else str(usual).lower()}"
            )
    encoding = config.population.upload_encoding
    if encoding != "fp32" and config.privacy.device.enabled and config.privacy.example.enabled:
        raise ConfigError(
            f"population.upload_encoding={encoding} rounds updates that carry the device's own "
            "noise, which the device-level claim does not cover: set fp32, or choose "
            "privacy=device or privacy=example"
        )
