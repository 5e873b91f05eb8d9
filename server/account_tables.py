"""What `sottovoce account` prints: rich tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from sottovoce.privacy.accountants import ACCOUNTANTS


def as_json(facts: Mapping[str, Any]) -> str:
    """One JSON object; infinity becomes "inf", as JSON has no number for it."""
    return json.dumps(_spelled_out(facts), allow_nan=False)


def print_tables(facts: Mapping[str, Any]) -> None:
    """The headline, the three accountants, every claim, every activity level."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"epsilon = [bold]{_text(facts['epsilon'])}[/bold] at delta = {_text(facts['delta'])} "
        f"({facts['unit']} level, {facts['relation'].replace('_', '/')}, observer "
        f"{facts['observer']}, {facts['accountant']}, dp-accounting "
        f"{metadata.version('dp-accounting')})",
        soft_wrap=True,
    )
    plain = Table("noise multiplier", "sampling rate", "steps", *ACCOUNTANTS)
    setting = (facts["noise_multiplier"], facts["sampling_rate"], facts["steps"])
    others = [_text(facts["by_accountant"][name]) for name in ACCOUNTANTS]
    plain.add_row(*(_text(value, "varies") for value in setting), *others)
    console.print(plain)
    for name in ("claims", "by_level"):
        rows = facts.get(name) or []
        if rows:
            table = Table(*(key.replace("_", " ") for key in rows[0]))
            for row in rows:
                table.add_row(*(_text(value, "") for value in row.values()))
            console.print(table)


def _text(value: Any, absent: str = "-") -> str:
    if value is None:
        return absent
    if isinstance(value, float):
        return "infinite" if math.isinf(value) else f"{value:.6g}"
    return str(value)


def _spelled_out(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spelled_out(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_spelled_out(entry) for entry in value]
    return "inf" if value == math.inf else value
