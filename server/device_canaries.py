"""Canary devices in a run: their coins, and what is written of them.

`device_canaries.json` holds who is in, `device_canaries.jsonl` a line for every round. The coins
come from the run's noise secret, which is gone when the run ends; whoever may read these files
knows them.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sottovoce.privacy.audit.device_record import HEADER, ROUNDS
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.checkpoints import RunState, write_atomic
from sottovoce.simulations.canary_devices import canaries_of
from sottovoce.simulations.experiment import Experiment
from sottovoce.strategies.canary_watch import CanaryWatch
from sottovoce.strategies.levels import activity_levels
from sottovoce.strategies.samplers import Sampler

COINS = "device canary coins"


def canary_watch(
    experiment: Experiment, source: NoiseSource, divisor: float
) -> CanaryWatch | None:
    """Who watches the canary devices of a run, None where it has none."""
    canaries = canaries_of(experiment.population)
    if canaries is None:
        return None
    shapes = {
        name: p.shape for name, p in experiment.initial_model().named_parameters()
        if p.requires_grad
    }
    inside = source.generator(COINS).random(canaries.count) < 0.5
    return CanaryWatch(canaries, inside, canaries.directions(shapes), divisor)


@dataclass
class CanaryFiles:
    """The two files of canary devices, where a run has any."""

    folder: Path
    watch: CanaryWatch | None

    def begin(self, sampler: Sampler, last_round: int) -> None:
        """Write who is in, and drop the rounds after `last_round`, which a resumed run repeats."""
        if self.watch is None:
            return
        level = int(activity_levels(np.array([self.watch.canaries.activity]))[0])
        header = self.watch.header(level, sampler.rates.get(level, 0.0))
        path = self.folder / HEADER
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        write_atomic(path, json.dumps(header).encode())
        path.chmod(0o600)
        rounds = self.folder / ROUNDS
        os.close(os.open(rounds, os.O_CREAT | os.O_WRONLY, 0o600))
        lines = rounds.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _round_of(line) <= last_round]
        write_atomic(rounds, "".join(line + "\n" for line in kept).encode())
        rounds.chmod(0o600)

    def on_round(self, state: RunState, record: dict[str, Any]) -> None:
        """A line for the round that ended."""
        found = None if self.watch is None else self.watch.record
        if found is not None and found["round"] == state.round:
            with (self.folder / ROUNDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def _round_of(line: str) -> float:
    """The round of a line; inf for one that a run was killed in the middle of."""
    try:
        return float(json.loads(line)["round"])
    except ValueError:
        return math.inf
