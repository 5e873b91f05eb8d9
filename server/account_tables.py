"""What `sottovoce account` prints: rich tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from sottovoce.privacy.accounting.accountants import ACCOUNTANTS
from sottovoce.strategies.levels import row_text


def as_json(facts: Mapping[str, Any], indent: int | None = None) -> str:
    """One JSON object; infinity becomes "inf", as JSON has no number for it."""
    return json.dumps(_spelled_out(facts), allow_nan=False, indent=indent)


def print_tables(facts: Mapping[str, Any]) -> None:
    """The headline, the three accountants, every claim, every activity level."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if "epsilon" not in facts:
        print_sweep(facts)
        return
    console.print(
        f"epsilon = [bold]{_text(facts['epsilon'])}[/bold] at delta = {_text(facts['delta'])} "
        f"({facts['unit']} level, {facts['relation'].replace('_', '/')}, observer "
        f"{facts['observer']}, {facts['accountant']}, dp-accounting "
        f"{metadata.version('dp-accounting')})",
        soft_wrap=True,
    )
    if "projection" in facts:
        console.print(facts["projection"], style="bold red", soft_wrap=True)
    plain = Table("noise multiplier", "sampling rate", "steps", *ACCOUNTANTS)
    setting = (facts["noise_multiplier"], facts["sampling_rate"], facts["steps"])
    others = [_text(facts["by_accountant"][name]) for name in ACCOUNTANTS]
    plain.add_row(*(_text(value, "varies") for value in setting), *others)
    console.print(plain)
    if "schedule" in facts:
        _print_rows(console, [{"schedule": k.replace("_", " "), "": v}
                              for k, v in facts["schedule"].items()])
    if "example" in facts:
        _print_rows(console, [facts["example"]])
    if facts.get("solve") in ("cohort", "population"):
        console.print(f"cohort size {facts['cohort_size']:g} of {facts['devices']:,} devices")
    for name in ("claims", "by_level", "participations"):
        _print_rows(console, facts.get(name) or [])
    if "sweep" in facts:
        _print_sweep(console, facts["sweep"])


def print_sweep(facts: Mapping[str, Any]) -> None:
    """What each value of a lever costs: of a plan, which has no table of its own."""
    from rich.console import Console

    _print_sweep(Console(highlight=False), facts["sweep"])


def _print_rows(console: Any, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not rows:
        return
    table = Table(*(key.replace("_", " ") for key in rows[0]))
    for row in rows:
        if isinstance(row.get("level"), int):
            row = {**row, "level": row_text(row["level"])}
        table.add_row(*(_text(value, "") for value in row.values()))
    console.print(table)


def _print_sweep(console: Any, sweep: Mapping[str, Any]) -> None:
    """A row for each activity level, a column for each value of the lever."""
    from rich.table import Table

    lever, rows = sweep["lever"].replace("_", " "), sweep["rows"]
    console.print(
        f"epsilon of devices by activity level and {lever}, at delta = {_text(sweep['delta'])}: "
        f"noise multiplier {_text(sweep['noise_multiplier'])}, {sweep['steps']} rounds, expected "
        f"cohort {_text(sweep['cohort_size'])}",
        soft_wrap=True,
    )
    marks = ["*" if row["as_run"] else "" for row in rows]
    table = Table("level", "devices", *(
        f"{lever} {_short(row['value'])}{mark}" for row, mark in zip(rows, marks, strict=True)
    ))
    for costs in zip(*(row["by_level"] for row in rows), strict=True):
        first = costs[0]
        table.add_row(
            str(first["level"]), str(first["devices"]), *(_short(c["epsilon"]) for c in costs)
        )
    table.add_section()
    table.add_row("worst", "", *(_short(row["epsilon"]) for row in rows))
    console.print(table)
    if any(marks):
        console.print("* as run")


def _short(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.3g}"


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
