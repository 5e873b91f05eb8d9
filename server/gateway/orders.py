"""What a coordinator asks of a gateway, and what it gets back.

A gateway never answers with single updates: only with their sum, as every fleet does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.client.wire import ENCODINGS
from sottovoce.strategies.levels import MAX_LEVEL

MAX_SPEC_BYTES = 64 * 2**20
"""A task's specification holds its vocabulary; anything beyond this is a mistake."""


@dataclass(frozen=True)
class Member:
    """A device on a run's roster. `device`: its number at the gateway. `level`: as it declared."""

    device: int
    level: int


@dataclass(frozen=True)
class RoundOrder:
    """A round of a run: which devices are asked to do what until when.

    `run`, `round` (1, 2, ...): whose round it is. `spec`: the task's specification, which devices
    keep by its hash. `parameters`: the global model's trained parameters, float32.
    `devices`: (asked,) numbers at the gateway. `numbers`: (asked,) their places in the run.
    `levels`: (asked,) under which the accountant counts them.
    `clip_norm`: bound on a device's signal in this round, None: the specification's.
    `norm_bounds`: largest norm of a whole update that is summed, by level; none where absent.
    `deadline_s`: after which an update is late. `enough`: the round ends once so many updates are
    in the sum; None: once every device has answered.
    `upload_encoding`, `download_encoding`: of updates and of differences to the model that devices
    hold: fp32, fp16 or int8. `counts_clipped`: whether devices say that their update was clipped.
    """

    run: str
    round: int
    spec: bytes
    parameters: dict[str, Tensor]
    devices: NDArray[np.int64]
    numbers: list[int]
    levels: NDArray[np.uint8]
    clip_norm: float | None = None
    norm_bounds: dict[int, float] = field(default_factory=dict)
    deadline_s: float = 600.0
    enough: int | None = None
    upload_encoding: str = "fp32"
    download_encoding: str = "fp32"
    counts_clipped: bool = False

    def check(self) -> None:
        """Raise RunError with the first thing about this order that cannot be."""
        for wrong, line in self._complaints():
            if wrong:
                raise RunError(f"round {self.round} of run {self.run!r}: {line}")
        for name, tensor in self.parameters.items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"round {self.round} of run {self.run!r}: the global {name!r} is not finite "
                    f"float32 but {tensor.dtype}"
                )

    def _complaints(self) -> list[tuple[bool, str]]:
        asked = len(self.devices)
        levels = np.asarray(self.levels)
        odd = [e for e in (self.upload_encoding, self.download_encoding) if e not in ENCODINGS]
        bounds = [bound for bound in self.norm_bounds.values() if not 0 < bound]
        return [
            (not self.run or len(self.run) > 200, "a run's name has 1 to 200 characters"),
            (self.round < 1, "rounds count from 1"),
            (not 0 < len(self.spec) <= MAX_SPEC_BYTES, f"its spec has {len(self.spec)} bytes"),
            (not self.parameters, "there are no parameters to train"),
            (len(self.numbers) != asked or len(levels) != asked,
             f"{asked} devices, {len(self.numbers)} numbers and {len(levels)} levels"),
            (len(np.unique(self.devices)) != asked, "a device is asked twice"),
            (asked > 0 and int(levels.max(initial=0)) > MAX_LEVEL, f"a level above {MAX_LEVEL}"),
            (not 0 < self.deadline_s < math.inf, f"deadline_s={self.deadline_s} must be positive"),
            (self.enough is not None and self.enough < 1, f"enough={self.enough} must be above 0"),
            (bool(odd), f"unknown encoding {odd}: choose {', '.join(ENCODINGS)}"),
            (bool(bounds), f"norm bounds must be positive, not {bounds}"),
            (self.clip_norm is not None and not 0 < self.clip_norm < math.inf,
             f"clip_norm={self.clip_norm} must be positive"),
        ]


@dataclass
class RoundResult:
    """How a round ended. Every asked device is in exactly one of the counts.

    `sums`: summed updates, float64. `accepted_by_level`: devices in the sum. `declined`: devices
    that would not. `late`: devices that took the task and had not answered when the round ended.
    `silent`: devices that never came for it. `refused`: devices whose update was not valid, by
    reason. `clipped`: devices in the sum that said that they were. `bytes_down`, `bytes_up`: of
    blobs and updates on the wire, repeated ones included.
    """

    sums: dict[str, Tensor]
    accepted_by_level: dict[int, int] = field(default_factory=dict)
    declined: int = 0
    late: int = 0
    silent: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    clipped: int = 0
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def accepted(self) -> int:
        """Devices in the sum."""
        return sum(self.accepted_by_level.values())
