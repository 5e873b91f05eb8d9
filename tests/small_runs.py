"""Runs small enough for a test: a hundred devices, a model of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sottovoce.server import callbacks, cli
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate

SMALL = (
    "population=assistant",
    "population.devices=100",
    "population.held_out_devices=5",
    "cohort_size=10",
    "rounds=3",
    "model.embedding_size=8",
    "model.hidden_size=8",
    "strategy.max_rate=1",
    "strategy.learning_rate=0.5",
    "strategy.batch_size=8",
    "run.evaluation_devices=5",
    "run.report=false",
    "run.progress=false",
)
FIXED_NOISE = (
    "privacy.device.epsilon=null",
    "privacy.device.noise_multiplier=1.5",
    "privacy.example.noise_multiplier=2",
)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def run(folder: Path, *overrides: str) -> int:
    """A new run in `folder`; its exit code."""
    folder.mkdir(parents=True)
    return simulate(compose([*SMALL, *overrides]), folder)


def run_until_killed(folder: Path, *overrides: str, at: int) -> None:
    """A new run in `folder` that dies in round `at`, its ledger and metrics written, unsaved."""
    told = callbacks.Checkpoints.on_round

    def killing(self: Any, state: Any, record: Any) -> None:
        if state.round == at:
            raise Killed
        told(self, state, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.Checkpoints, "on_round", killing)
        with pytest.raises(Killed):
            run(folder, *overrides)


def resume(folder: Path) -> int:
    """The rest of a run, as from the command line; its exit code."""
    return cli.main(["simulate", f"resume={folder}"])


def _refuse(literal: str) -> NoReturn:
    raise AssertionError(f"{literal} is not JSON")


def strict(text: str) -> Any:
    """JSON without the NaN and Infinity that Python would accept."""
    return json.loads(text, parse_constant=_refuse)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, one a line."""
    return [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    """The summary of a run that ended."""
    found: dict[str, Any] = strict((folder / "summary.json").read_text())
    return found


def model(folder: Path) -> bytes:
    """The model's file."""
    return (folder / "model.safetensors").read_bytes()
