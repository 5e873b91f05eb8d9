"""Every population by name: adding one is a class, its config and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from sottovoce.client.errors import ConfigError
from sottovoce.simulations.assistant import AssistantConfig, AssistantPopulation
from sottovoce.simulations.jsonl import JsonlConfig, JsonlPopulation
from sottovoce.simulations.live_population import LiveConfig, LivePopulation
from sottovoce.simulations.parquet import ParquetConfig, ParquetPopulation
from sottovoce.simulations.population import Population

NOT_OF_THE_SOURCE = {"name", "max_examples_per_round"}  # read by others from the same settings

Kind = type[AssistantConfig] | type[JsonlConfig] | type[ParquetConfig] | type[LiveConfig]

POPULATIONS: dict[str, Kind] = {
    "assistant": AssistantConfig,
    "jsonl": JsonlConfig,
    "snips": JsonlConfig,
    "hwu": JsonlConfig,
    "shakespeare": JsonlConfig,
    "chitchat": JsonlConfig,
    "parquet": ParquetConfig,
    "live": LiveConfig,
}


def make_population(config: Any, progress: bool = False) -> Population:
    """The population that `config` (a mapping or a dataclass instance) describes.

    `progress`: whether building an index shows a bar, on a terminal. Raises ConfigError for an
    unknown name or setting, DataError for malformed files.
    """
    settings = _settings(config)
    name = settings.get("name")
    if name not in POPULATIONS:
        raise ConfigError(
            f"population.name={name} does not exist: choose {', '.join(POPULATIONS)}"
        )
    kind = POPULATIONS[name]
    known = [field.name for field in fields(kind)]
    for setting in settings:
        if setting not in known:
            raise ConfigError(
                f"population.{setting} is no setting of population {name}: it has"
                f" {', '.join(known)}"
            )
    values = asdict(kind(**settings))
    own = {key: value for key, value in values.items() if key not in NOT_OF_THE_SOURCE}
    if kind is AssistantConfig:
        return AssistantPopulation(**own)
    if own["path"] == "???":
        raise ConfigError("population.path is missing: set it to a JSONL file")
    if kind is LiveConfig:
        return LivePopulation(
            own["path"], own["labels"], own["devices"], own["roster"], own["max_held_out_examples"]
        )
    source = ParquetPopulation if kind is ParquetConfig else JsonlPopulation
    return source(name=name, progress=progress, **own)


def _settings(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if isinstance(config, Mapping):
        return {str(key): value for key, value in config.items()}
    raise ConfigError(f"population={config!r} is no group of settings: give a mapping")
