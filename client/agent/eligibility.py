"""When a device may work: while it charges, rests, pays nothing for data, at certain hours.

`[eligibility]` in policy.toml; without a key there is no such condition:

    charging = true
    idle = true                       # load of the last minute per core below max_load
    max_load = 0.5
    unmetered = true                  # needs unmetered_command
    unmetered_command = ["sh", "-c", "nmcli -g GENERAL.METERED device show wlan0 | grep -q ^no"]
    hours = ["22:00-06:00"]           # local time; past midnight is fine

What cannot be found out counts as not so: a device that must charge and has no battery that tells
stays away, and says why once.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sottovoce.client.agent.toml_fields import Kinds, checked_fields
from sottovoce.client.errors import ConfigError

POWER = Path("/sys/class/power_supply")
_SPAN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probes:
    """What is known of the machine; each answers None where it cannot tell.

    `charging`: whether it has power from outside. `load`: of the last minute, per core.
    `unmetered`: whether the connection costs nothing, by a command (its words).
    """

    charging: Callable[[], bool | None]
    load: Callable[[], float | None]
    unmetered: Callable[[tuple[str, ...]], bool | None]


def machine(power: Path = POWER) -> Probes:
    """Probes of this machine (Linux)."""
    return Probes(lambda: _charging(power), _load, _unmetered)


@dataclass(frozen=True)
class Conditions:
    """When a device takes part; see the module."""

    charging: bool = False
    idle: bool = False
    max_load: float = 0.5
    unmetered: bool = False
    unmetered_command: tuple[str, ...] = ()
    hours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for span in self.hours:
            if not _SPAN.fullmatch(span) or span[6:] > "24:00":
                raise ConfigError(
                    f"eligibility.hours has {span!r}: write it as \"22:00-06:00\", local time"
                )
        if not self.max_load > 0:
            raise ConfigError(f"eligibility.max_load={self.max_load} must be above 0: 0.5 is usual")
        if self.unmetered and not self.unmetered_command:
            raise ConfigError(
                "eligibility.unmetered=true needs unmetered_command: a command that succeeds where "
                "the connection costs nothing"
            )

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Conditions:
        """The conditions of a parsed TOML table. Raises ConfigError, one line."""
        return cls(**checked_fields(values, _KINDS, "eligibility."))

    def eligible(self, now: float, probes: Probes) -> str | None:
        """Why the device may not work at `now` (seconds since 1970), or None: it may."""
        if self.hours and not any(_within(span, now) for span in self.hours):
            return f"outside of hours {', '.join(self.hours)}"
        if self.charging and not _known("charging", probes.charging()):
            return "not charging"
        if self.idle:
            load = probes.load()
            if not _known("load", None if load is None else load < self.max_load):
                return "not idle"
        if self.unmetered and not _known("unmetered", probes.unmetered(self.unmetered_command)):
            return "on a metered connection"
        return None


_KINDS: Kinds = {
    "charging": bool, "idle": bool, "max_load": float, "unmetered": bool,
    "unmetered_command": list, "hours": list,
}


def _known(name: str, answer: bool | None) -> bool:
    if answer is None:
        _say_once(f"{name} cannot be found out on this machine: the condition counts as not met")
    return bool(answer)


@lru_cache(maxsize=16)
def _say_once(sentence: str) -> None:
    _logger.warning(sentence)


def _within(span: str, now: float) -> bool:
    """Whether `now` lies in a span of local time, its end left out."""
    local = time.localtime(now)
    minute, (start, end) = local.tm_hour * 60 + local.tm_min, map(_minute, span.split("-"))
    return start <= minute < end if start < end else minute >= start or minute < end


def _minute(text: str) -> int:
    hour, minute = text.split(":")
    return int(hour) * 60 + int(minute)


# -- this machine ----------------------------------------------------------------------------------


def _charging(power: Path) -> bool | None:
    """Whether a mains supply is on, or a battery charges or is full; None where none tells."""
    kinds = {path.parent: _line(path) for path in power.glob("*/type")}
    mains = [_line(path / "online") for path, kind in kinds.items() if kind in ("Mains", "USB")]
    if "1" in mains:
        return True
    batteries = [_line(path / "status") for path, kind in kinds.items() if kind == "Battery"]
    known = [status for status in batteries if status not in ("", "Unknown")]
    if known:
        return any(status in ("Charging", "Full", "Not charging") for status in known)
    return False if "0" in mains else None


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _load() -> float | None:
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def _unmetered(command: tuple[str, ...]) -> bool | None:
    """Whether the command succeeds; None where it cannot be run or takes over 10 s."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=10, check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.returncode == 0
