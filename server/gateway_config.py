"""Settings of the verbs that deal with a gateway: serve, gateway, status, tokens, revoke."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig

from sottovoce.server.config import SimulateConfig
from sottovoce.server.gateway.settings import GatewaySettings

METRICS_PORT = 9401  # of the verbs; a gateway that a program starts serves no metrics unasked
_TYPES = get_type_hints(GatewaySettings)
_DEFAULTS = {item.name: item.default for item in fields(GatewaySettings)}

# The settings of a gateway as Hydra composes them: `GatewaySettings`, and the folder where its
# devices, keys and socket stay for good.
GatewayConfig = make_dataclass("GatewayConfig", [
    ("folder", str, field(default="gateway")),
    *((name, _TYPES[name], field(default=value))
      for name, value in (_DEFAULTS | {"metrics_port": METRICS_PORT}).items()),
])


@dataclass
class ServeConfig(SimulateConfig):
    """A run over real devices: the settings of a simulation, and the gateway's."""

    gateway: Any = field(default_factory=GatewayConfig)


@dataclass
class GatewayVerb:
    """`sottovoce gateway`: a gateway alone, as the node of a coordinator elsewhere."""

    gateway: Any = field(default_factory=GatewayConfig)


@dataclass
class StatusConfig:
    """`gateway`: folder of a gateway that runs. `run`: a run folder to show beside it. `devices`:
    whether to list every device that ever enrolled."""

    gateway: str | None = "gateway"
    run: str | None = None
    devices: bool = False
    format: str = "text"


@dataclass
class TokensConfig:
    """`number` new one-time tokens, good for `hours`, each in a file of its own in `dir`."""

    gateway: str = "gateway"
    number: int = 1
    hours: float = 24.0
    dir: str = "tokens"


@dataclass
class RevokeConfig:
    """`device`: number of the device that may not come back."""

    gateway: str = "gateway"
    device: int | None = None


def nodes(verb: str) -> list[tuple[str | None, str, Any]]:
    """(group, name, dataclass) of a verb for Hydra."""
    kinds = {
        "gateway": GatewayVerb, "status": StatusConfig, "tokens": TokensConfig,
        "revoke": RevokeConfig,
    }
    return [(None, f"base_{verb}", kinds[verb])]


def gateway_settings(config: DictConfig) -> GatewaySettings:
    """The settings of a gateway from the group `gateway`. ConfigError where they cannot be."""
    known = {item.name for item in fields(GatewaySettings)}
    values = {str(key): config[key] for key in config if str(key) in known}
    for key in ("certificate", "private_key"):
        values[key] = None if values[key] is None else Path(values[key]).expanduser()
    values["host_names"] = tuple(values["host_names"])
    return GatewaySettings(**values)
