"""What an operator asks of a gateway: its status, tokens for new devices, the end of one."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.server.gateway.control import GatewayClient
from sottovoce.server.gateway.registry import Registry
from sottovoce.server.gateway_config import RevokeConfig, StatusConfig, TokensConfig
from sottovoce.server.run_record import read_metrics

FORMATS = ("text", "json")
HOUR = 3600.0
MOST_TOKENS, MOST_HOURS = 100_000, 366 * 24.0
REGISTRY = "registry.sqlite"


def show_status(config: StatusConfig) -> int:
    """Print what a running gateway and a run's folder say; 1 where the gateway does not answer."""
    if config.format not in FORMATS:
        raise ConfigError(f"format={config.format} does not exist: choose text or json")
    found: dict[str, Any] = {}
    if config.run is not None:
        found["run"] = run_status(Path(config.run).expanduser())
    if config.gateway is not None:
        client = GatewayClient(_folder(config.gateway))
        found["gateway"] = client.status()
        if config.devices:
            found["devices"] = client.devices()
    if config.format == "json":
        print(json.dumps(found))
        return 0
    listed = found.pop("devices", [])
    for title, facts in found.items():
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in facts.items():
            shown = json.dumps(value) if isinstance(value, dict | list) else str(value)
            table.add_row(name.replace("_", " "), shown)
        Console(soft_wrap=True).print(table)
    for row in listed:
        print(_device_line(row))
    return 0


def run_status(folder: Path) -> dict[str, Any]:
    """Last round, its figures, and how the run ended if it did. RunError where there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise RunError(f"{folder} has no metrics.jsonl: give the folder of a run that has begun")
    records = read_metrics(path)
    shown: dict[str, Any] = {"folder": str(folder)}
    if records:
        shown |= {
            key: value for key, value in records[-1].items()
            if isinstance(value, int | float | str) and not isinstance(value, bool)
        }
    summary = folder / "summary.json"
    shown["status"] = (
        json.loads(summary.read_bytes())["status"] if summary.exists() else "running, or stopped"
    )
    return shown


def make_tokens(config: TokensConfig) -> int:
    """Write one-time tokens, a file each that only its owner may read.

    The gateway may run or not; its folder is made where there is none yet.
    """
    if not 0 < config.number <= MOST_TOKENS or not 0 < config.hours <= MOST_HOURS:
        raise ConfigError(
            f"number={config.number} hours={config.hours:g}: ask for 1 to {MOST_TOKENS} tokens "
            "that last up to a year"
        )
    folder = Path(config.dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    home = Path(config.gateway).expanduser()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with closing(Registry(home / REGISTRY)) as registry:
        tokens = registry.make_tokens(config.number, config.hours * HOUR)
    first = 1 + max((_number(path) for path in folder.glob("token-*")), default=0)
    for number, token in enumerate(tokens, first):
        path = folder / f"token-{number}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(token + "\n")
        print(path)
    return 0


def revoke_device(config: RevokeConfig) -> int:
    """End a device's membership, at once where the gateway runs."""
    if config.device is None:
        raise ConfigError("device is missing: give its number, as status devices=true shows it")
    if not 0 < config.device < 1 << 63:
        raise ConfigError(
            f"device={config.device} is no number of a device: sottovoce status devices=true shows "
            "them"
        )
    folder = _folder(config.gateway)
    try:
        known = GatewayClient(folder).revoke(config.device)
    except RunError:  # it does not run, or is another user's, and then looks by itself
        with closing(Registry(folder / REGISTRY)) as registry:
            known = registry.revoke(config.device)
    if not known:
        raise ConfigError(f"device={config.device} is not enrolled at {folder}")
    print(f"device {config.device} is revoked")
    return 0


def _device_line(row: dict[str, Any]) -> str:
    """A device of the operator's list."""
    state = "revoked" if row["revoked"] else f"last seen {_time(row['last_seen'])}"
    name = f"  {row['name']}" if row["name"] else ""
    return f"{row['device']:<19}  enrolled {_time(row['enrolled'])}  {state}{name}"


def _time(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"gateway={given} is no folder: give that of sottovoce serve (gateway.folder)"
        )
    return folder


def _number(path: Path) -> int:
    end = path.name.rpartition("-")[2]
    return int(end) if end.isdigit() else 0
