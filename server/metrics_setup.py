"""From settings to training metrics that are released with noise, or to exact ones."""

from __future__ import annotations

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.mechanisms.private_metrics import MetricBounds, PrivateMetrics, default_noise

HERE = "privacy.device"
CLAIM = "private_metrics"


def wanted(config: DictConfig) -> bool:
    """Whether a run noises its metrics; settings of an older run say nothing."""
    return bool(config.privacy.device.get("private_metrics", False))


def private_metrics(
    config: DictConfig,
    bounds: MetricBounds | None,
    noise_multiplier: float,
    expected_devices: float,
) -> PrivateMetrics | None:
    """The noised metrics of rounds that are worth `noise_multiplier` with all they release.

    `bounds`: what devices cut their figures to; None where metrics are exact. Raises ConfigError,
    in one line, where metrics alone would spend more.
    """
    if bounds is None:
        return None
    own = config.privacy.device.metrics_noise_multiplier
    if own is None:
        own = default_noise(expected_devices, noise_multiplier)
    try:
        return PrivateMetrics(noise_multiplier, own, bounds)
    except ValueError as error:
        raise ConfigError(f"{HERE}.private_metrics=true: {error}; raise it, or set it to null"
                          ) from None


def check_private_metrics(config: DictConfig) -> None:
    """Raise ConfigError, in one line, where settings contradict each other."""
    device = config.privacy.device
    own = device.get("metrics_noise_multiplier")
    if not wanted(config):
        if own is not None:
            raise ConfigError(
                f"{HERE}.metrics_noise_multiplier={own:g} is only used with "
                f"{HERE}.private_metrics=true: set that, or set it to null"
            )
        return
    if not device.enabled:
        raise ConfigError(
            f"{HERE}.private_metrics=true does nothing while {HERE}.enabled=false: choose "
            f"privacy=device, or set {HERE}.private_metrics=false"
        )
    if config.privacy.example.enabled:
        raise ConfigError(
            f"{HERE}.private_metrics=true noises figures only after the server has seen them, from "
            "which privacy.example protects: choose privacy=device, or set "
            f"{HERE}.private_metrics=false"
        )
    if device.get("min_separation") is not None:
        raise ConfigError(
            f"{HERE}.private_metrics=true shares a round's noise, which {HERE}.min_separation "
            f"plans for all rounds together: set {HERE}.private_metrics=false, or "
            f"{HERE}.min_separation=null"
        )
