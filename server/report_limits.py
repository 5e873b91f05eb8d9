"""Which settings go together with levels that devices report by randomised response."""

from __future__ import annotations

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError


def check_level_reports(cfg: DictConfig) -> None:
    """Raise ConfigError, in one line, where `strategy.level_epsilon` contradicts other settings.

    With example-level privacy a device's batches follow from its level, which must not be below
    its true one: a report may be.
    """
    epsilon = cfg.strategy.get("level_epsilon")
    if epsilon is None:
        return
    here = f"strategy.level_epsilon={epsilon:g}"
    if not cfg.privacy.device.enabled:
        raise ConfigError(
            f"{here} protects nothing while privacy.device.enabled=false: choose privacy=device, "
            "or set strategy.level_epsilon=null"
        )
    target = cfg.privacy.device.epsilon
    if target is not None and target <= epsilon:
        raise ConfigError(
            f"{here} alone spends all of privacy.device.epsilon={target:g}, which covers reports "
            "and rounds together: lower the one or raise the other"
        )
    if cfg.privacy.example.enabled:
        raise ConfigError(
            f"{here} may report less than a device has, and its noised steps are counted by its "
            "level: choose privacy=device, or set strategy.level_epsilon=null"
        )
    if cfg.strategy.sampler != "activity":
        raise ConfigError(
            f"{here} is only used by strategy.sampler=activity: choose that, or set "
            "strategy.level_epsilon=null"
        )
    if cfg.strategy.total_weight is not None:
        raise ConfigError(
            f"{here} changes what strategy.total_weight={cfg.strategy.total_weight:g} adds up: set "
            "one of them to null"
        )
    if cfg.privacy.device.get("min_separation") is not None:
        raise ConfigError(
            f"{here} is not used with privacy.device.min_separation, whose cohorts read levels as "
            "public: set one of them to null"
        )
