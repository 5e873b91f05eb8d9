"""The study `mitigations`: what is said to prevent memorisation, beside noise that does.

Dropout, early stopping (Parikh et al. 2022, arXiv:2203.13920) and device-level privacy, on the same
data with the same code canaries, every run attacked alike. Writes mitigations.csv and
mitigations.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sottovoce.client.errors import ConfigError
from sottovoce.server.audited import HEAD, Row, audited, cells, check_codes, figures
from sottovoce.server.checkpoints import write_atomic
from sottovoce.server.privacy_study import DEFAULTS, privacy_at
from sottovoce.server.run_record import setting
from sottovoce.server.sampling_study import as_csv
from sottovoce.server.study import Arm, Result
from sottovoce.server.study_settings import chosen_populations, settings_on
from sottovoce.server.wording import label

SEEDS = 1
POPULATION = ("snips",)
DROPOUT = (0.3, 0.6)
EPSILONS = (100.0, 8.0)
STOPPED = 4  # early stopping: so many times fewer rounds


def arms(config: DictConfig) -> list[Arm]:
    """No mitigation, and each of them alone. ConfigError where the model has no dropout."""
    (population, *more) = chosen_populations(config, POPULATION)
    if more:
        raise ConfigError("populations names several: study=mitigations compares on one")
    shared = settings_on(config, population, ("privacy=device", *DEFAULTS))
    shared["timeline"]["name"] = "static"
    shared["audit"]["codes"] = check_codes(config)
    if "dropout" not in shared["model"]:
        raise ConfigError(f"model={shared['model']['name']} has no dropout: choose another model")
    off, rounds = privacy_at(None, "device", shared["rounds"]), shared["rounds"]
    few = max(1, rounds // STOPPED)
    changes: dict[str, dict[str, Any]] = {"none": off}
    changes |= {f"dropout {rate:g}": {**off, "model.dropout": rate} for rate in DROPOUT}
    changes[f"stopped after {few} rounds"] = {**off, "rounds": few}
    changes |= {f"device-level ε = {e:g}": privacy_at(e, "device", rounds) for e in EPSILONS}
    return [Arm(name.replace(" ", "-"), {**shared, **change}) for name, change in changes.items()]


def write(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Audits what was not audited yet, then mitigations.md and mitigations.csv; their paths."""
    rows: list[Row] = []
    for result in results:
        run = audited(result)
        name = result.arm.name.replace("-", " ").replace("device level", "device-level")
        row: Row = {"mitigation": name, "seed": result.seed, "task": run.task}
        rows.append(row | figures(run, "device"))
    files = {"md": markdown(rows, results).encode(), "csv": as_csv(rows).encode()}
    for end, data in files.items():
        write_atomic(folder / f"mitigations.{end}", data)
    return [folder / f"mitigations.{end}" for end in files]


def markdown(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """The rows as a table for people, and what was run."""
    head = ["mitigation", label(rows[0]["metric"], rows[0]["task"]), *HEAD[1:]]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    seeds = {row["seed"] for row in rows}
    for row in rows:
        name = row["mitigation"] + (f", seed {row['seed']}" if len(seeds) > 1 else "")
        lines.append(f"| {' | '.join([name, *cells(row)])} |")
    config = results[0].run.config
    said = (
        f"Population {setting(config, 'population.name')}, expected cohort "
        f"{config['cohort_size']}, {setting(config, 'audit.codes')} code canaries, each said "
        f"{setting(config, 'audit.code_copies')} times by a device of its own. A mitigation "
        "without an ε promises nothing for sentences that are said more often. Absence of a "
        "finding is not proof."
    )
    return "\n".join([*lines, "", said]) + "\n"
