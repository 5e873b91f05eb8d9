"""A finished run, loaded back from its folder for those who examine it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sottovoce.client.errors import RunError
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.tasks import Task
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.audit.code_canaries import CodeCanary, load_canaries
from sottovoce.privacy.audit.device_record import DeviceRecord, load_record
from sottovoce.server.checkpoints import RunState, load_checkpoint, load_latest
from sottovoce.server.evaluation import load_parameters
from sottovoce.simulations.canaries import CanaryPopulation, canaries_in
from sottovoce.simulations.canary_devices import (
    CanaryDevices,
    canaries_of,
    without_canary_devices,
)
from sottovoce.simulations.code_population import CODES_FILE, codes_in, without_codes
from sottovoce.simulations.experiment import build_experiment
from sottovoce.simulations.population import Population


@dataclass(frozen=True)
class FinishedRun:
    """What a run trained on and what came of it.

    `initial_model`: the model before round 1, None where its checkpoint is gone. `participants`:
    ids of the devices that took part at least once, None where that is not known. `codes`: code
    canaries that were put into its data; `population` and `participants` leave their devices out,
    of which `codes_trained` took part. `training`, `engine`: what its devices do.
    `canaries`: the population as it was trained on where single examples were put in by coins
    (`audit.canaries`), None otherwise; `population` leaves them out.
    `device_canaries`: what the run noted of its canary devices, which `population` leaves out too.
    """

    population: Population
    task: Task
    model: nn.Module
    initial_model: nn.Module | None
    ledger: Ledger
    summary: dict[str, Any]
    participants: NDArray[np.int64] | None
    training: LocalTraining | None = None
    engine: str = "grouped"
    codes: tuple[CodeCanary, ...] = ()
    codes_trained: int | None = None
    canaries: CanaryPopulation | None = None
    device_canaries: DeviceRecord | None = None


def load_run(folder: Path) -> FinishedRun:
    """The run in `folder`; RunError where it is not one or has not finished."""
    for name in ("config.yaml", "model.safetensors", "ledger.json", "summary.json"):
        if not (folder / name).is_file():
            raise RunError(
                f"{folder} is not a finished run (no {name}): give a folder that "
                "`sottovoce simulate` finished"
            )
    experiment = build_experiment((folder / "config.yaml").read_text(encoding="utf-8"))
    tensors, latest = _tensors(folder / "model.safetensors"), _latest(folder)
    model = load_parameters(experiment.initial_model(), tensors)
    population, participants = experiment.population, _participants(latest)
    codes: list[CodeCanary] = []
    codes_trained = None
    canaries = canaries_in(population)
    if canaries is not None:
        population = canaries.base
    summary = _summary(folder)
    devices, record = canaries_of(population), load_record(folder)
    rounds = int(summary.get("rounds") or 0)
    if latest is not None and latest.round == rounds and not _same(latest.parameters, tensors):
        raise RunError(
            f"{folder / 'model.safetensors'} is not the model of the last checkpoint: put back the"
            " one that the run made"
        )
    if devices is not None and (record is None or not _is_of(record, devices, rounds)):
        raise RunError(
            f"{folder} had canary devices, and its device_canaries.json is gone or of another run,"
            f" or lacks some of the {rounds} rounds: put it back"
        )
    population, participants = without_canary_devices(population, participants)
    inserted = codes_in(population)
    if inserted is not None:
        codes = load_canaries(folder / CODES_FILE)
        population = without_codes(population)
        if participants is not None:
            first, last = inserted.devices.start, inserted.devices.stop
            theirs = (participants >= first) & (participants < last)
            codes_trained, participants = int(theirs.sum()), participants[~theirs]
    return FinishedRun(
        population=population,
        task=experiment.task,
        model=model,
        initial_model=_initial_model(folder, experiment.initial_model()),
        ledger=Ledger.load(folder / "ledger.json"),
        summary=summary,
        participants=participants,
        training=experiment.training,
        engine=experiment.config.privacy.example.get("engine", "grouped"),
        codes=tuple(codes),
        codes_trained=codes_trained,
        canaries=canaries,
        device_canaries=record,
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}): the run must be made again") from None


def _summary(folder: Path) -> dict[str, Any]:
    """The run's summary. RunError where it is not one, or its claims are no numbers."""
    path = folder / "summary.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for claim in (found.get("epsilon") or {}).values():
            for value in (claim.get("epsilon"), claim.get("delta")):
                if value is not None and not float(value) >= 0:
                    raise ValueError(f"{value} is no epsilon or delta")
        int(found.get("rounds") or 0)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}): the run must be made again") from None
    return found


def _is_of(record: DeviceRecord, canaries: CanaryDevices, rounds: int) -> bool:
    """Whether the record is about these canary devices, and all `rounds`."""
    said = (record.kind, len(record.inside), record.first, record.activity, record.seed)
    made = (canaries.kind, canaries.count, canaries.first, canaries.activity, canaries.seed)
    return said == made and bool(np.isin(np.arange(1, rounds + 1), record.rounds).all())


def _initial_model(folder: Path, model: nn.Module) -> nn.Module | None:
    try:
        state = load_checkpoint(folder / "checkpoints" / "round-000000")
    except RunError:
        return None
    return load_parameters(model, state.parameters)


def _latest(folder: Path) -> RunState | None:
    try:
        return load_latest(folder / "checkpoints")[0]
    except RunError:
        return None


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two models are, bit for bit."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first
    )


def _participants(state: RunState | None) -> NDArray[np.int64] | None:
    if state is None:
        return None
    found = state.participation.get("devices")
    return None if found is None else found.numpy().astype(np.int64)
