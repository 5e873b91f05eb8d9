"""What a run leaves behind when it ends: the model, what describes it, the summary, the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import save

from sottovoce.client.fleet import ABSENCES, PARTIAL
from sottovoce.privacy.accounting.accountants import by_level, epsilon
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.server.budget import OBSERVER, touched
from sottovoce.server.checkpoints import RunState, write_atomic
from sottovoce.server.cost import cost
from sottovoce.server.disclosure import disclosure, paragraph
from sottovoce.server.model_card import model_card_text
from sottovoce.server.report import write_report
from sottovoce.server.report_tables import environment
from sottovoce.server.run_record import read_metrics
from sottovoce.server.setup import Setup
from sottovoce.simulations.experiment import Experiment
from sottovoce.strategies.samplers import Sampler

NOT_METRICS = {"round", "period", "projection", "devices", "dropped", "examples", "seconds",
               "devices_by_level", PARTIAL, *ABSENCES}


def write_results(
    folder: Path,
    experiment: Experiment,
    setup: Setup,
    state: RunState,
    status: str,
    *,
    seconds: float,
    peak_memory_mb: float,
) -> dict[str, Any]:
    """Write ledger, model, model card, summary and report; the summary.

    Epsilon is that of the ledger on disk, which may know of releases after an interrupted run's
    last checkpoint.
    """
    state.ledger.save(folder / "ledger.json")
    ledger = Ledger.load(folder / "ledger.json")
    tensors = {name: tensor.contiguous() for name, tensor in state.parameters.items()}
    write_atomic(folder / "model.safetensors", save(tensors))
    _write_json(folder / "model.json", model_card(experiment, state))
    records = read_metrics(folder / "metrics.jsonl")
    before = sum(record.get("seconds") or 0.0 for record in records)
    summary = {
        "status": status,
        "rounds": state.round,
        "headline": experiment.task.headline,
        "metrics": last_evaluation(records, experiment.task.headline),
        "epsilon": claims(setup, ledger),
        "projection": ledger.claims.get("projection"),
        "levels": levels(setup.sampler),
        "population": experiment.population.describe(),
        "vocabulary": {
            "source": experiment.vocabulary.source,
            "description": experiment.vocabulary.description,
        },
        "task": experiment.task.name,
        "model": experiment.config.model.name,
        "parameters": sum(tensor.numel() for tensor in state.parameters.values()),
        "seconds": max(seconds, before),
        "peak_memory_mb": peak_memory_mb,
        "noise": noise_of(experiment),
        "cost": cost(experiment, setup, state, records),
        "warnings": setup.warnings + trouble(records, state.round),
        "environment": environment(),
    }
    statement = disclosure(ledger)
    summary["statement"] = paragraph(statement)
    card = model_card_text(summary, statement, summary["statement"])
    write_atomic(folder / "MODEL_CARD.md", card.encode())
    _write_json(folder / "summary.json", summary)
    if experiment.config.run.report:
        write_report(folder)
    return summary


def trouble(records: list[dict[str, Any]], rounds: int) -> list[str]:
    """Lines about what went wrong in training but did not stop it."""
    lines = []
    dropped = sum(record.get("dropped", 0) for record in records)
    if dropped:
        asked = dropped + sum(record.get("devices", 0) for record in records)
        lines.append(
            f"{dropped} of {asked} updates were dropped, not finite or never answered: if training "
            "diverges, lower strategy.learning_rate"
        )
    if any(r["round"] == rounds and "loss" in r and r["loss"] is None for r in records):
        lines.append(
            "the model's loss is not finite: training diverged; lower strategy.learning_rate or "
            "strategy.server_learning_rate"
        )
    return lines


def levels(sampler: Sampler) -> list[dict[str, Any]]:
    """Devices (None where unknown) and sampling rate of each level, as far as levels have any."""
    known = sampler.devices_by_level
    return [
        {"level": level, "devices": known.get(level), "sampling_rate": rate}
        for level, rate in sorted(sampler.rates.items())
        if level in known or not known
    ]


def claims(setup: Setup, ledger: Ledger) -> dict[str, Any]:
    """Epsilon of each protected unit by the reference accountant, in all and by level."""
    found = {}
    for unit, delta in setup.budget.deltas.items():
        observer = OBSERVER[unit]
        spent = touched(ledger, unit)
        found[unit] = {
            "epsilon": epsilon(ledger, delta, unit=unit, observer=observer) if spent else 0.0,
            "delta": delta,
            "observer": observer,
            "by_level": by_level(ledger, delta, unit=unit, observer=observer) if spent else [],
        }
    return found


def last_evaluation(records: list[dict[str, Any]], headline: str) -> dict[str, float]:
    """The metrics of the last round that was evaluated."""
    evaluated = [record for record in records if headline in record]
    if not evaluated:
        return {}
    return {
        name: value
        for name, value in evaluated[-1].items()
        if name not in NOT_METRICS and isinstance(value, int | float)
    }


def model_card(experiment: Experiment, state: RunState) -> dict[str, Any]:
    """What is needed to use the weights again: task, sizes, vocabulary and label sets."""
    schema = experiment.population.schema
    return {
        "task": experiment.task.name,
        "max_length": experiment.task.max_length,
        "model": OmegaConf.to_container(experiment.config.model),
        "vocabulary": experiment.vocabulary.to_json(),
        "intents": list(schema.intents),
        "slots": list(schema.slots),
        "rounds": state.round,
    }


def noise_of(experiment: Experiment) -> str:
    """How the run's noise came about."""
    privacy = experiment.config.privacy
    if not (privacy.device.enabled or privacy.example.enabled):
        return "none"
    if experiment.config.seed is None:
        return "os entropy"
    return "reproducible noise: simulation only"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(_finite(values), indent=1) + "\n").encode())


def _finite(value: Any) -> Any:
    """The value with infinite numbers spelled out: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else str(value)
    return value
