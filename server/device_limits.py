"""Which settings of `privacy.device` go together: schedules, correlated noise, clip norms."""

from __future__ import annotations

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.server.metrics_setup import check_private_metrics

HERE = "privacy.device"


def check_device_layer(cfg: DictConfig) -> None:
    """Raise ConfigError, in one line, where settings contradict each other.

    Settings that an older run does not have say nothing.
    """
    device = cfg.privacy.device
    if not device.enabled:
        _check_unused(cfg)
    _check_schedule(cfg)
    check_private_metrics(cfg)
    if device.get("clipping") == "adaptive":
        _check_adaptive(cfg)
    elif device.get("count_noise") is not None:
        raise ConfigError(
            f"{HERE}.count_noise={device.count_noise:g} is only used by {HERE}.clipping=adaptive: "
            "choose that, or set it to null"
        )


def _check_unused(cfg: DictConfig) -> None:
    device = cfg.privacy.device
    for key, usual in (("clipping", "fixed"), ("mechanism", "independent"),
                       ("min_separation", None)):
        value = device.get(key, usual)
        if value != usual:
            raise ConfigError(
                f"{HERE}.{key}={value} does nothing while {HERE}.enabled=false: choose "
                f"privacy=device or privacy=both, or set {HERE}.{key}={usual or 'null'}"
            )


def _check_schedule(cfg: DictConfig) -> None:
    device = cfg.privacy.device
    apart, kind = device.get("min_separation"), device.get("mechanism", "independent")
    most, bands = device.get("max_participations"), device.get("bands")
    if apart is None:
        if kind != "independent":
            raise ConfigError(
                f"{HERE}.mechanism={kind} rests on who takes part when: give "
                f"{HERE}.min_separation, the rounds that a device rests after it took part"
            )
        if most is not None:
            raise ConfigError(
                f"{HERE}.max_participations={most} is only used with {HERE}.min_separation: give "
                "that too (1: no rest), or set it to null"
            )
    elif apart > cfg.rounds:
        raise ConfigError(
            f"{HERE}.min_separation={apart} is more than rounds={cfg.rounds}: for one "
            f"participation at most set {HERE}.min_separation={cfg.rounds}"
        )
    if bands is not None:
        _check_bands(kind, bands, apart, cfg.rounds)
    for key in ("max_rate", "total_weight"):
        value = cfg.strategy.get(key)
        capless = key == "max_rate" and value == 1  # a cap that caps nothing
        if apart is not None and value is not None and not capless:
            raise ConfigError(
                f"strategy.{key}={value:g} sets sampling rates, of which {HERE}.min_separation "
                "claims none: set it to null"
            )


def _check_bands(kind: str, bands: int, apart: int | None, rounds: int) -> None:
    if kind not in ("banded", "bisr", "blt"):
        raise ConfigError(
            f"{HERE}.bands={bands} has no meaning with {HERE}.mechanism={kind}: set it to null, or "
            "choose banded, bisr or blt"
        )
    most = min(rounds, apart or rounds) if kind == "banded" else rounds
    if bands > most:
        limit = f"{HERE}.min_separation" if most == apart and kind == "banded" else "rounds"
        raise ConfigError(f"{HERE}.bands={bands} must be at most {limit}={most}: lower it")


def _check_adaptive(cfg: DictConfig) -> None:
    device = cfg.privacy.device
    if cfg.privacy.example.enabled:
        raise ConfigError(
            f"{HERE}.clipping=adaptive counts devices by norms that no example's noise covers: "
            f"choose privacy=device, or set {HERE}.clipping=fixed"
        )
    if device.get("min_separation") is not None:
        raise ConfigError(
            f"{HERE}.clipping=adaptive moves the scale that correlated noise was set for: set "
            f"{HERE}.clipping=fixed, or {HERE}.min_separation=null"
        )
    count_noise, noise = device.count_noise, device.noise_multiplier
    if count_noise is not None and noise is not None and count_noise <= noise / 2:
        raise ConfigError(
            f"{HERE}.count_noise={count_noise:g} must be above half of {HERE}.noise_multiplier="
            f"{noise:g}, or the count alone would spend more than a round may: raise it, or set it "
            "to null"
        )
