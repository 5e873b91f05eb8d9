"""Composing a simulation's settings without the command line."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig

from sottovoce.server.config import register


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The settings that `sottovoce simulate` would run with these overrides (`key=value`)."""
    register("simulate")
    with initialize_config_module("sottovoce.configs", version_base="1.3"):
        return hydra_compose("simulate", list(overrides))
