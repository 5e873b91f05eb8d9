"""A run folder read back: what report, plots and README picture are made from.

Only `config.yaml` and `metrics.jsonl` must be there, so a run that was killed can be reported too.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sottovoce.client.errors import RunError
from sottovoce.server.wording import METRICS, number

Record = dict[str, Any]
UNITS = ("device", "example")
OBSERVER = {"device": "release", "example": "fleet"}  # for whom a claim holds unless it says so


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind. `metrics`: one object a round, by round, each round once."""

    folder: Path
    config_text: str
    config: Record
    metrics: list[Record]
    summary: Record = field(default_factory=dict)
    ledger: Record = field(default_factory=dict)
    audit: Record = field(default_factory=dict)

    @property
    def task(self) -> str:
        return str(setting(self.config, "task.name") or "")

    @property
    def headline(self) -> str:
        """The metric that leads: the summary's `headline`, else the best-known one measured."""
        named = self.summary.get("headline")
        if isinstance(named, str):
            return named
        leading = ("perplexity", *METRICS) if self.task == "next_word" else METRICS
        return next((m for m in leading if any(m in r for r in self.metrics)), "loss")

    @property
    def planned_rounds(self) -> int:
        last = self.metrics[-1]["round"] if self.metrics else 0
        return max(int(number(self.config.get("rounds")) or 0), int(last))

    @property
    def evaluations(self) -> list[Record]:
        """The records that hold the headline metric."""
        return [r for r in self.metrics if number(r.get(self.headline)) is not None]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Rounds and finite values of `key`."""
        pairs = [(int(r["round"]), number(r.get(key))) for r in self.metrics]
        kept = [(i, v) for i, v in pairs if v is not None and math.isfinite(v)]
        return [i for i, _ in kept], [v for _, v in kept]

    def final(self, metric: str) -> float | None:
        """The last value of `metric`: the summary's, else the last evaluation's."""
        measured = [number(r.get(metric)) for r in self.metrics]
        last = next((v for v in reversed(measured) if v is not None), None)
        summary = final_metrics(self.summary).get(metric)
        return last if summary is None else summary

    @property
    def by_level(self) -> Record:
        """Activity level -> the leading metric of its held-out devices, at the last evaluation."""
        found = [r[key] for r in self.metrics if (key := f"{self.headline}_by_level") in r]
        return found[-1] if found else {}

    @property
    def participations(self) -> dict[int, int]:
        """Activity level -> times that a device of that level took part, over all rounds."""
        total: Counter[int] = Counter()
        for record in self.metrics:
            for level, count in (record.get("devices_by_level") or {}).items():
                total[int(level)] += int(count)
        return dict(sorted(total.items()))

    @property
    def levels(self) -> list[Record]:
        """Rows {level, devices, sampling_rate} of the population, by level."""
        stated = self.summary.get("levels") or claim(self.summary, "device").get("by_level")
        return level_rows(stated) if stated else ledger_levels(self.ledger)


def read_run(folder: Path) -> RunRecord:
    """The run in `folder`. Raises RunError naming the folder where it is not a run."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise RunError(f"{folder} is not a run folder (no {name}): give a folder that "
                           "`sottovoce simulate` wrote")
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    config = _config(folder, text)
    metrics = read_metrics(folder / "metrics.jsonl")
    summary, ledger = _object(folder / "summary.json"), _object(folder / "ledger.json")
    return RunRecord(
        folder=folder,
        config_text=text,
        config=config,
        metrics=metrics,
        summary=summary if "epsilon" in summary else {**summary, **_spent(config, metrics)},
        ledger=ledger,
        audit=_object(folder / "audit.json"),
    )


def read_metrics(path: Path) -> list[Record]:
    """The records of metrics.jsonl by round; a last line cut short by a kill is left out.

    A round written twice (before and after a resume) counts once, as written last.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    by_round: dict[int, Record] = {}
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            by_round[int(record["round"])] = record
        except (ValueError, TypeError, KeyError) as error:
            if index == len(lines) - 1:
                break
            raise RunError(f"{path} line {index + 1} is not a round's JSON object: delete that "
                           "line, then run `sottovoce report` again") from error
    return [by_round[i] for i in sorted(by_round)]


def setting(config: Record, path: str) -> Any:
    """The value at a dotted `path` of a nested mapping, None where it is missing."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def claim(summary: Record, unit: str) -> Record:
    """`summary["epsilon"][unit]`, empty where it is missing."""
    found = setting(summary, f"epsilon.{unit}")
    return found if isinstance(found, dict) else {}


def final_metrics(summary: Record) -> dict[str, float]:
    """Metric values of a summary: under "metrics", or beside its other keys."""
    source = summary.get("metrics")
    rows = source if isinstance(source, dict) else {m: summary.get(m) for m in METRICS}
    return {name: v for name, value in rows.items() if (v := number(value)) is not None}


def level_rows(rows: Any) -> list[Record]:
    """Rows of activity levels (a list, or an object with `by_level`), sorted by level."""
    found = rows.get("by_level") if isinstance(rows, dict) else rows
    return sorted((dict(row) for row in found or []), key=lambda row: int(row["level"]))


def private_events(ledger: Record, unit: str) -> list[Record]:
    """The ledger's noised releases that protect `unit`, as plain objects."""
    return [e for e in _events(ledger) if e.get("unit", unit) == unit
            and e.get("type", "gaussian") == "gaussian"]


def bare_releases(ledger: Record) -> list[str]:
    """What every reader of the models sees without noise, by the ledger: each purpose once."""
    found = (str(e.get("purpose")) for e in _events(ledger)
             if e.get("type") == "non_private" and e.get("observer", "release") == "release")
    return list(dict.fromkeys(found))


def _events(ledger: Record) -> list[Record]:
    events = ledger.get("events")
    return [e for e in events if isinstance(e, dict)] if isinstance(events, list) else []


def ledger_levels(ledger: Record) -> list[Record]:
    """Devices per level and their sampling rates, from a ledger's facts and device events."""
    rates = {int(level): rate for event in private_events(ledger, "device")
             for level, rate, _ in event.get("by_level") or ()}
    devices = {int(level): n for level, n in (ledger.get("levels") or {}).items()}
    return [{"level": level, "devices": devices.get(level), "sampling_rate": rates.get(level)}
            for level in sorted({*rates, *devices})]


def _spent(config: Record, metrics: list[Record]) -> Record:
    """The `epsilon` of a run that did not come to write its summary: its last round's."""
    spent = {}
    for unit in UNITS:
        if setting(config, f"privacy.{unit}.enabled"):
            values = [number(r.get(f"epsilon_{unit}")) for r in metrics if r["round"] > 0]
            spent[unit] = {"epsilon": values[-1] if values else 0.0}
    return {"epsilon": spent}


def _config(folder: Path, text: str) -> Record:
    try:
        config = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # YAML and OmegaConf raise unrelated classes
        raise RunError(f"{folder}/config.yaml is not readable as YAML: restore it from the "
                       "run's backup or start a new run") from error
    return {str(k): v for k, v in config.items()} if isinstance(config, dict) else {}


def _object(path: Path) -> Record:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not JSON: delete it, then run `sottovoce report` again") \
            from error
    return value if isinstance(value, dict) else {"events": value}
