"""The tables of a run's report: plain rows of text, laid out by the template."""

from __future__ import annotations

import math
import platform
from typing import Any

from sottovoce.client import native
from sottovoce.server.claims import Claim, installed_version
from sottovoce.server.run_record import UNITS, Record, RunRecord, setting
from sottovoce.server.wording import (
    HELD_OUT_EXAMPLES,
    METRICS,
    OF_DEVICES,
    count_text,
    duration_text,
    epsilon_text,
    label,
    level_text,
    metric_text,
    number,
    plain_text,
    small_text,
    words,
)
from sottovoce.strategies.levels import row_text

MOST_ROWS = 40
RATES = {"device": "Probability a round", "example": "Batch rate"}
Row = list[tuple[str, bool]]


def environment() -> dict[str, str]:
    """Versions that a result depends on, and which kernels ran (`sottovoce.client.native`).

    A run stores them as `environment` in summary.json.
    """
    names = ("sottovoce", "torch", "flwr", "dp-accounting", "numpy")
    found = {"python": platform.python_version(), **{n: installed_version(n) for n in names}}
    return found | {"kernels": native.level()}


def versions(run: RunRecord) -> dict[str, str]:
    """The run's own environment, or this machine's (said so) where the run stored none."""
    stored = run.summary.get("environment")
    if isinstance(stored, dict):
        return {str(k): str(v) for k, v in stored.items()}
    return {**environment(), "recorded": "when this report was written, not by the run"}


def seconds(run: RunRecord) -> float:
    """Wall-clock seconds: the summary's, else the sum over rounds."""
    stated = number(run.summary.get("seconds"))
    return sum(number(r.get("seconds")) or 0.0 for r in run.metrics) if stated is None else stated


def level_table(run: RunRecord, claims: tuple[Claim, ...]) -> Record:
    """Epsilon per activity level: {columns, rows}; a cell is (text, whether it is the worst)."""
    found = [(c, {int(r["level"]): r for r in c.by_level}) for c in claims if c.by_level]
    columns = ["Level", "Examples on the device", "Devices", "Participations"]
    for made, _ in found:
        delta = f"δ = {small_text(made.delta)}".replace(" ", "\u00a0")
        columns += [RATES[made.unit], f"{made.unit.capitalize()}-level ε at {delta}"]
    levels = sorted({level for _, rows in found for level in rows})
    devices = {int(r["level"]): r.get("devices") for rows in
               (*(c.by_level for c, _ in reversed(found)), run.levels) for r in rows}
    return {"columns": columns, "rows": [_level_row(run, n, devices.get(n), found) for n in levels]}


def _level_row(
    run: RunRecord, level: int, devices: Any, found: list[tuple[Claim, dict[int, Record]]]
) -> Row:
    cells = (row_text(level), level_text(level), count_text(devices),
             count_text(run.participations.get(level, 0)))
    row = [(cell, False) for cell in cells]
    for _, rows in found:
        worst = max(number(r.get("epsilon")) or 0.0 for r in rows.values())
        at = rows.get(level, {})
        row += [(small_text(at.get("sampling_rate")), False),
                (epsilon_text(at.get("epsilon")), number(at.get("epsilon")) == worst)]
    return row


def evaluation_table(run: RunRecord) -> Record:
    """Every evaluation as text (at most `MOST_ROWS`, evenly spread): {columns, rows, left_out}."""
    records = run.evaluations
    step = max(1, math.ceil(len(records) / MOST_ROWS))
    kept = [r for i, r in enumerate(records) if i % step == 0 or i == len(records) - 1]
    names = [m + end for end in ("", HELD_OUT_EXAMPLES) for m in METRICS
             if any(m + end in r for r in kept)]
    names += [n for end in OF_DEVICES if any((n := run.headline + end) in r for r in kept)]
    units = [u for u in UNITS if any(number(r.get(f"epsilon_{u}")) for r in kept)]
    ends = {n: ", held-out examples" if n.endswith(HELD_OUT_EXAMPLES) else "" for n in names}
    return {
        "columns": ["Round", *(label(n, run.task) + ends[n] for n in names),
                    *(f"ε {u}" for u in units)],
        "rows": [[str(r["round"]), *(metric_text(n, r.get(n)) for n in names),
                  *(epsilon_text(r.get(f"epsilon_{u}")) for u in units)] for r in kept],
        "left_out": len(records) - len(kept),
    }


def audit_table(audit: Record) -> Record:
    """What an audit of this run found: {verdict, rows}; no rows where none was made."""
    rows = []
    for attack in audit.get("attacks") or []:
        interval = [number(v) for v in attack.get("auc_ci") or []]
        span = " – ".join(metric_text("auc", v) for v in interval)
        rate = (attack.get("tpr_at_fpr") or {}).get("0.01")
        rows.append([words(attack.get("name")), str(attack.get("unit") or "–"),
                     metric_text("auc", attack.get("auc")) + (f" ({span})" if span else ""),
                     metric_text("tpr", rate), epsilon_text(attack.get("epsilon_lower_bound"))])
    return {"verdict": words(audit.get("verdict")), "rows": rows}


def run_facts(run: RunRecord) -> list[tuple[str, str]]:
    """How the run was set up and what it took."""
    def at(path: str) -> Any:
        return setting(run.config, path)

    memory = number(run.summary.get("peak_memory_mb"))
    dropped = sum(int(number(r.get("dropped")) or 0) for r in run.metrics)
    found = [
        ("Task", words(run.task)),
        ("Model", words(at("model.name"))),
        ("Parameters", count_text(run.summary.get("parameters"))),
        ("Strategy", words(at("strategy.name"))),
        ("Sampler", words(at("strategy.sampler"))),
        ("Cohort", f"{count_text(run.config.get('cohort_size'))} devices a round, expected"),
        ("Dropped updates", count_text(dropped)),
        ("Noise", str(run.summary.get("noise") or "not stated")),
        ("Time", duration_text(seconds(run))),
        ("Peak memory", "–" if memory is None else f"{memory:,.0f} MB"),
    ]
    return [(name, value) for name, value in found if value not in ("–", "")]


def population_facts(run: RunRecord) -> list[tuple[str, str]]:
    """The population as it describes itself; nested descriptions on one line each."""
    described = run.summary.get("population")
    source = described if isinstance(described, dict) else run.config.get("population")
    rows = source.items() if isinstance(source, dict) else ()
    return [(words(k).capitalize(), plain_text(v)) for k, v in rows if v not in (None, "", [], {})]
