"""The study `sampling`: who is sampled, in the static and in the continual setting.

    samplers   uniform, and by activity n: linear (n), power (n^beta), log (log(1 + n))
    settings   static, all examples there throughout; continual, the study's timeline

The comparison of Dupuy et al. 2022, arXiv:2202.03925, on this project's populations and with the
epsilon of each arm beside its utility. Writes sampling.csv, sampling.md and sampling.png.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.server.checkpoints import write_atomic
from sottovoce.server.run_record import claim, setting
from sottovoce.server.study import Arm, Result
from sottovoce.server.timeline_setup import OVER_TIME
from sottovoce.server.wording import epsilon_text, label, metric_text, number

SETTINGS = ("static", "continual")
SAMPLERS: dict[str, dict[str, Any]] = {
    "uniform": {"strategy.sampler": "uniform"},
    "linear": {"strategy.sampler": "activity", "strategy.activity_weight": "linear"},
    "power": {"strategy.sampler": "activity", "strategy.activity_weight": "power"},
    "log": {"strategy.sampler": "activity", "strategy.activity_weight": "log"},
}
Row = dict[str, Any]


def arms(config: DictConfig) -> list[Arm]:
    """Every sampler in both settings. ConfigError where the study's timeline is no timeline."""
    if config.timeline.name != "continual" or config.timeline.periods < 2:
        raise ConfigError(
            "study=sampling compares with a continual setting: set timeline=continual and "
            "timeline.periods of at least 2"
        )
    return [
        Arm(f"{kind}-{sampler}", {"timeline.name": kind, **changes})
        for kind in SETTINGS
        for sampler, changes in SAMPLERS.items()
    ]


def write(folder: Path, results: Sequence[Result]) -> list[Path]:
    """sampling.csv, sampling.md and sampling.png in `folder`; their paths."""
    from sottovoce.server.sampling_plot import picture

    rows = table(results)
    files = {
        "md": markdown(rows, results).encode(),
        "csv": as_csv(rows).encode(),
        "png": picture(results),
    }
    for end, data in files.items():
        write_atomic(folder / f"sampling.{end}", data)
    return [folder / f"sampling.{end}" for end in files]


def table(results: Sequence[Result]) -> list[Row]:
    """One row for each arm; means and standard deviations over its seeds.

    `final`: the leading metric after the last round. `course`: its mean over all evaluations but
    that before training. `all_periods`: as `final`, on what held-out devices say over the whole
    timeline; None in the static setting. Epsilons are those of the worst level and seed.
    """
    found = []
    for name in dict.fromkeys(result.arm.name for result in results):
        mine = [result for result in results if result.arm.name == name]
        runs = [result.run for result in mine]
        metric = runs[0].headline
        row: Row = dict(zip(("setting", "sampler"), name.split("-"), strict=True))
        row |= {"seeds": len(runs), "metric": metric}
        row |= _spread("final", [run.final(metric) for run in runs])
        row |= _spread("course", [_mean(run.series(metric)[1][1:]) for run in runs])
        row |= _spread("all_periods", [run.final(metric + OVER_TIME) for run in runs])
        for unit in ("device", "example"):
            spent = [number(claim(run.summary, unit).get("epsilon")) for run in runs]
            row[f"epsilon_{unit}"] = max((e for e in spent if e is not None), default=None)
        for figure in ("devices", "examples"):
            row[f"{figure}_a_round"] = _mean([v for run in runs for v in run.series(figure)[1]])
        row["rounds"] = min(int(run.metrics[-1]["round"]) for run in runs)
        found.append(row)
    return found


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV; what is not known is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """The rows as a table for people, and what was run."""
    run, metric = results[0].run, rows[0]["metric"]
    name = label(metric, run.task)
    units = [unit for unit in ("device", "example") if any(
        row[f"epsilon_{unit}"] is not None for row in rows)]
    head = ["setting", "sampler", f"{name}, last round", "mean over the run", "on all periods",
            *(f"worst {unit}-level ε" for unit in units), "devices a round", "examples a round"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [row["setting"], row["sampler"],
                 *(_text(metric, row, part) for part in ("final", "course", "all_periods")),
                 *(epsilon_text(row[f"epsilon_{unit}"]) for unit in units),
                 *(_count(row[f"{part}_a_round"]) for part in ("devices", "examples"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _what(results)]) + "\n"


def _what(results: Sequence[Result]) -> str:
    """A sentence on the settings that all runs share."""
    config = results[0].run.config
    plan = setting(config, "timeline") or {}
    seeds = sorted({result.seed for result in results})
    population = setting(config, "population") or {}
    each = plan.get("rounds_per_period") or math.ceil(config["rounds"] / plan["periods"])
    return (
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}. Population "
        f"{population.get('name')}, expected cohort {config['cohort_size']}, {config['rounds']} "
        f"rounds. Continual: {plan['periods']} periods of {each} rounds, retention "
        f"{plan['retention']}, measured on what held-out devices say in the period of the round."
    )


def _spread(name: str, values: Sequence[float | None]) -> Row:
    known = [value for value in values if value is not None]
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {f"{name}_mean": _mean(known), f"{name}_sd": deviation if known else None}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _text(metric: str, row: Row, part: str) -> str:
    mean, deviation = row[f"{part}_mean"], row[f"{part}_sd"]
    spread = "" if deviation is None else f" ± {metric_text(metric, deviation)}"
    return metric_text(metric, mean) + spread


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
