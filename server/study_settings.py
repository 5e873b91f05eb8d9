"""The settings of a study's runs on several populations, each with the groups that go with it.

A population chooses its task and its strategy while Hydra composes (`configs/population/`). A study
that compares populations therefore composes once for each: its own defaults first, then what the
user gave on the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError
from sottovoce.server.study import OWN
from sottovoce.simulations.populations import POPULATIONS


def chosen_populations(config: DictConfig, usual: Sequence[str]) -> list[str | None]:
    """The populations of a study; None stands for the one that is composed already.

    Raises ConfigError for one that does not exist.
    """
    asked = usual if config.populations is None else config.populations
    names = [asked] if isinstance(asked, str) else [str(name) for name in asked]
    for name in names:
        if name not in POPULATIONS:
            raise ConfigError(
                f"populations={name} does not exist: choose from {', '.join(POPULATIONS)}, or "
                "populations=[] population=…"
            )
    return list(names) or [None]


def settings_on(
    config: DictConfig, population: str | None, defaults: Sequence[str]
) -> dict[str, Any]:
    """Settings of a run on `population` (None: the composed one), by top-level key.

    `defaults`: overrides of the study, which hold where the user said nothing else. Called outside
    the command line, `config` itself is all that the user said.
    """
    found = config
    if GlobalHydra.instance().is_initialized():
        found = _composed(list(HydraConfig.get().overrides.task), population, defaults)
    elif population is not None and population != config.population.get("name"):
        raise ConfigError(f"populations={population} needs the command line: compose with it")
    values = OmegaConf.to_container(found, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in OWN}


def _composed(words: Sequence[str], population: str | None, defaults: Sequence[str]) -> DictConfig:
    given = [word for word in words if population is None or _key(word) != "population"]
    said = {_key(word) for word in given}
    mine = [word for word in defaults if _key(word) not in said]
    chosen = [] if population is None else [f"population={population}"]
    return compose("study", [*chosen, *mine, *given])


def _key(word: str) -> str:
    return word.partition("=")[0]
