"""The study `privacy`: theory against practice, from no privacy to epsilon 1.

Every arm trains at one epsilon, with code canaries in its data, and is audited: utility, epsilon by
theory, the largest epsilon that an attack proved, the best attack's AUC, and what extraction read.
The question of Parikh et al. 2022 (arXiv:2203.13920), with bounds beside it. Writes
privacy.csv, privacy.md and privacy.png.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.server.audited import HEAD, Row, audited, cells, check_codes, figures
from sottovoce.server.checkpoints import write_atomic
from sottovoce.server.run_record import setting
from sottovoce.server.sampling_study import as_csv
from sottovoce.server.study import Arm, Result
from sottovoce.server.study_settings import chosen_populations, settings_on
from sottovoce.server.wording import label

SEEDS = 1
POPULATIONS = ("snips", "chitchat")
UNITS = ("device", "example")
DEFAULTS = (
    "timeline=static", "cohort_size=200", "strategy.max_rate=0.6", "strategy.local_epochs=1",
    "strategy.server_learning_rate=0.05",
)
CANARIES = 500  # single examples that are in or out by coins, where the unit is the example


def arms(config: DictConfig) -> list[Arm]:
    """Every epsilon on every population. ConfigError where a setting of the study is impossible."""
    epsilons = _epsilons(config.epsilons)
    if config.unit not in UNITS:
        raise ConfigError(f"unit={config.unit} is unknown: choose {' or '.join(UNITS)}")
    found = []
    for population in chosen_populations(config, POPULATIONS):
        shared = settings_on(config, population, (f"privacy={config.unit}", *DEFAULTS))
        shared["timeline"]["name"] = "static"
        name = shared["population"]["name"]
        shared["audit"] |= _canaries(config, shared)
        for epsilon in epsilons:
            changes = {**shared, **privacy_at(epsilon, config.unit, shared["rounds"])}
            found.append(Arm(f"{name}-{_word(epsilon)}", changes))
    return found


def privacy_at(epsilon: float | None, unit: str, rounds: int) -> dict[str, Any]:
    """Settings of a run of that epsilon for `unit`; without privacy where it is None."""
    off = {"enabled": False, "noise_multiplier": None, "epsilon": None, "max_epsilon": None}
    changes: dict[str, Any] = {f"privacy.{u}.{key}": off[key] for u in UNITS for key in off}
    if epsilon is None:
        return changes
    changes |= {f"privacy.{unit}.enabled": True, f"privacy.{unit}.epsilon": epsilon}
    if unit == "example":
        changes["privacy.example.max_participations"] = rounds
    return changes


def write(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Audits what was not audited yet, then privacy.md, .csv and .png in `folder`; their paths."""
    from sottovoce.server.privacy_plot import picture

    rows = table(results)
    files = {
        "md": markdown(rows, results).encode(),
        "csv": as_csv(rows).encode(),
        "png": picture(rows),
    }
    for end, data in files.items():
        write_atomic(folder / f"privacy.{end}", data)
    return [folder / f"privacy.{end}" for end in files]


def table(results: Sequence[Result]) -> list[Row]:
    """One row for each run: population, the epsilon asked for, seed, and `figures`."""
    found, unit = [], _unit(results)
    for result in results:
        run = audited(result)
        name, _, asked = result.arm.name.rpartition("-")
        row: Row = {"population": name, "asked": asked, "seed": result.seed, "task": run.task}
        found.append({**row, "unit": unit, **figures(run, unit)})
    return found


def markdown(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """The rows as a table for people, and what was run."""
    head = ["population", "ε asked for", *HEAD]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        name = f"{row['population']}, {label(row['metric'], row['task'])}"
        asked = row["asked"] if len({r["seed"] for r in rows}) == 1 else (
            f"{row['asked']}, seed {row['seed']}"
        )
        lines.append(f"| {' | '.join([name, asked, *cells(row)])} |")
    return "\n".join([*lines, "", _what(results)]) + "\n"


def _what(results: Sequence[Result]) -> str:
    """What all runs share, and how to read the columns."""
    config = results[0].run.config
    codes, copies = setting(config, "audit.codes"), setting(config, "audit.code_copies")
    return (
        f"Unit: {_unit(results)}. {config['rounds']} rounds, expected cohort "
        f"{config['cohort_size']}; {codes} code canaries, each said {copies} times by a device of "
        "its own. ε at least: the strongest lower bound by membership attacks that may be compared "
        "(95 %, all of a run together), and in brackets the most that a perfect attack on as many "
        "candidates proves. Digits: model inversion (tasks with labels). Exposure estimates "
        "memorisation; p: of so much by chance. Absence of a finding is not proof."
    )


def _unit(results: Sequence[Result]) -> str:
    """The unit that the study's epsilons are for: that of its private runs."""
    private = [r for r in results if setting(r.run.config, "privacy.example.enabled")]
    return "example" if private else "device"


def _canaries(config: DictConfig, shared: dict[str, Any]) -> dict[str, Any]:
    """The canaries of every run: codes, and for the unit example candidates with coins."""
    chosen: dict[str, Any] = {"codes": check_codes(config)}
    if config.unit == "example" and shared["audit"].get("canaries") == "none":
        chosen |= {"canaries": "mislabelled", "number": CANARIES}
    return chosen


def _epsilons(asked: Any) -> list[float | None]:
    values = [asked] if isinstance(asked, str | int | float) or asked is None else list(asked)
    try:
        found = [None if v in (None, "none") else float(v) for v in values]
    except (TypeError, ValueError):
        found = []
    known = [value for value in found if value is not None]
    if not found or any(not (math.isfinite(v) and v > 0) for v in known):
        raise ConfigError(f"epsilons={asked} must be numbers above 0, or null for no privacy")
    return list(dict.fromkeys(found))


def _word(epsilon: float | None) -> str:
    return "none" if epsilon is None else f"{epsilon:g}"
