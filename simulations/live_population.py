"""The population of a live run: real devices, of which only public levels are known.

The coordinator holds none of their examples. What it needs beside them is public: a file of
held-out examples, which gives the label sets and what the model is evaluated on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import DataError
from sottovoce.client.examples import Examples
from sottovoce.simulations.jsonl import JsonlPopulation
from sottovoce.simulations.population import Population


@dataclass
class LiveConfig:
    """Settings of a population of real devices (`population=live population.path=FILE`).

    `path`: public held-out examples, JSONL; `labels`: a JSON file with the label sets, which are
    else read from them. `run`, `devices`, `roster`: of a run that has begun, set by the
    coordinator: its name, how many devices are in it, and which.

    `min_devices`: that must be there before a run begins, for which it waits `wait_s` at most.
    `deadline_s`: of a round, for its devices; a gateway with fewer than `min_cohort` updates by
    then hands over none. `reply_share`: of the devices asked that are expected to answer, a public
    guess by which sums are divided. `upload_encoding`, `download_encoding`: fp32, fp16 or int8, of
    updates and of what changed in the model.
    """

    name: str = "live"
    path: str = "???"
    labels: str | None = None
    run: str | None = None
    devices: int | None = None
    roster: str | None = None
    max_examples_per_round: int = 256
    max_held_out_examples: int = 2000
    min_devices: int = 2
    wait_s: float = 600.0
    deadline_s: float = 600.0
    min_cohort: int = 1
    reply_share: float = 1.0
    upload_encoding: str = "fp32"
    download_encoding: str = "fp32"


class LivePopulation(Population):
    """Real devices. `activity`: (devices,) the smallest number of examples of each one's level.

    `roster`: the run's file of devices with their `levels`; on a gateway's machine, where it is
    not, all count as level 0: only the coordinator samples. Raises DataError for malformed files.
    """

    public_words = False  # devices say words that the public file lacks
    held_out = 0
    at_hand = False

    def __init__(
        self, path: str, labels: str | None, devices: int | None, roster: str | None, limit: int
    ) -> None:
        self.name, self._limit = "live", limit
        # Every line of the file is evaluated on; the two devices only keep the reader content.
        self._public = JsonlPopulation(
            path, path, users="assigned", devices=2, held_out_fraction=0.0, labels=labels,
            index=None,
        )
        self.words, self.schema = self._public.words, self._public.schema
        self.activity = np.ones(devices or 1, dtype=np.uint32)
        if roster is not None and Path(roster).exists():
            levels = json.loads(Path(roster).read_bytes())["levels"]
            self.activity = np.left_shift(1, np.array(levels, dtype=np.uint32))

    def examples(
        self,
        devices: NDArray[np.int64],
        indices: Sequence[NDArray[np.int64]] | None = None,
    ) -> Examples:
        """DataError: real devices keep their examples."""
        raise DataError(
            "population=live has no training text: set task.vocabulary.source=hash or file"
        )

    def held_out_devices(self, limit: int | None = None) -> Examples:
        """Nobody: no real device gives its examples away."""
        nothing = np.zeros(0, dtype=np.int64)
        return self._public._first(nothing, nothing)

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        """The public examples."""
        return self._public.held_out_examples(min(limit or self._limit, self._limit))

    def describe(self) -> dict[str, Any]:
        """What the report says of this population."""
        return {
            "source": "real devices behind a gateway",
            "unit": "device",
            "devices": len(self),
            "evaluated_on": "public examples",
        }
