"""Settings of the verbs that deal with a gateway: serve, gateway, status, tokens, revoke."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sottovoce.server.config import SimulateConfig
from sottovoce.server.gateway.settings import GatewaySettings


@dataclass
class GatewayConfig:
    """Where a gateway listens and what it keeps. `folder`: its devices, keys and socket, for good.

    The rest is described by `GatewaySettings`.
    """

    folder: str = "gateway"
    host: str = "127.0.0.1"
    port: int = 9400
    name: str = "sottovoce"
    tls: bool = True
    host_names: list[str] = field(default_factory=list)
    certificate: str | None = None
    private_key: str | None = None
    mutual_tls: bool = False
    enrol_port: int | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 9401
    reflection: bool | None = None
    log_format: str = "text"
    session_lifetime_s: float = 6 * 3600.0
    hold_s: float = 30.0
    come_back_s: float = 5.0
    grace_s: float = 10.0
    upload_stall_s: float = 20.0
    upload_mb_in_flight: int = 256
    device_calls_per_s: float = 20.0
    peer_calls_per_s: float = 100.0
    enrolments_per_minute: float = 120.0


@dataclass
class ServeConfig(SimulateConfig):
    """A run over real devices: the settings of a simulation, and the gateway's."""

    gateway: GatewayConfig = field(default_factory=GatewayConfig)


@dataclass
class GatewayVerb:
    """`sottovoce gateway`: a gateway alone, as the node of a coordinator elsewhere."""

    gateway: GatewayConfig = field(default_factory=GatewayConfig)


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
