"""Canary devices: devices more that a run is given so that its device-level claim can be tested.

    sottovoce simulate audit.device_canaries=100 [audit.canary_kind=direction|text]

They come after all other devices, are counted, sampled, clipped and noised as those are, and have
the population's busiest activity level, unless `audit.canary_activity` says otherwise. A fair coin
decides which of them are in: the others are never asked. What they hand over:

`direction`  S times a unit vector of their own (`sottovoce.privacy.audit.directions`). Every second
             one hands over ten times as much, which clipping has to cut down to S.
`text`       what the devices' own training makes of one sentence of random words and labels, which
             nobody else says, over and over: real local steps, clipping and noise.

Source: Andrew et al. 2024, arXiv:2302.03098 (direction).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client import descents
from sottovoce.client.cohort import Draw
from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.groups import GroupData, LocalUpdates
from sottovoce.privacy.audit.device_record import KINDS
from sottovoce.privacy.audit.directions import Directions
from sottovoce.simulations.hashing import draws, integers_below, stream
from sottovoce.simulations.population import Population
from sottovoce.simulations.population_layers import AddedDevices
from sottovoce.strategies.levels import activity_levels

LOUD = 10.0  # clip norms that every second direction canary hands over before clipping
SENTENCES = 1  # of a text canary, said over and over: few are learned better than many
LENGTH = 6  # words of a sentence
MOST = 1 << 20  # examples that a canary may have

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class CanaryDevices:
    """`count` canary devices with ids from `first` on. `activity`: examples that each one has.

    `norm`: what a direction canary hands over where updates are not clipped.
    """

    kind: str
    count: int
    first: int
    activity: int
    seed: int
    norm: float = 1.0

    def are(self, devices: Ids) -> NDArray[np.bool_]:
        """(devices,) which of them are canaries."""
        return devices >= self.first

    def directions(self, shapes: Mapping[str, torch.Size]) -> Directions:
        """Their directions in the space of the trained parameters."""
        return Directions(self.seed, self.count, shapes)

    @staticmethod
    def loudness(canary: int) -> float:
        """Clip norms that a direction canary hands over before clipping."""
        return LOUD if canary % 2 else 1.0


class CanaryDevicePopulation(AddedDevices):
    """`base`, and after its training devices the `canaries`."""

    def __init__(self, base: Population, canaries: CanaryDevices) -> None:
        super().__init__(base, canaries.count, canaries.activity)
        self.canaries = canaries

    @property
    def natural(self) -> Population:
        """The population without canaries of any kind."""
        base: Population = getattr(self.base, "natural", self.base)
        return base

    def describe(self) -> dict[str, Any]:
        said = f"{self.canaries.count} of the devices are {self.canaries.kind} canaries"
        return self.base.describe() | {
            "devices": len(self), "device_canaries": f"{said}, about half of them in: for the audit"
        }

    def say(self, added: Ids, indices: Sequence[Ids]) -> Examples:
        """What canaries say, numbers modulo `SENTENCES`: random words with random labels."""
        sizes = np.array([len(some) for some in indices], dtype=np.int64)
        owner = np.repeat(added, sizes)
        number = np.concatenate([np.zeros(0, np.int64), *indices]).astype(np.int64) % SENTENCES
        key = stream(self.canaries.seed, "canary sentences")
        each = draws(draws(key, owner), number)
        bits = draws(each[:, None], np.arange(LENGTH))
        words, _ = integers_below(bits, len(self.words))
        intent = slots = None
        if self.schema.intents:
            labels = integers_below(draws(each, LENGTH), len(self.schema.intents))[0]
            intent = labels.astype(np.int32)
        if self.schema.slots:
            tags = integers_below(draws(bits, 1), len(self.schema.slots))[0]
            slots = tags.astype(np.int32).reshape(-1)
        return Examples(
            words.astype(np.int32).reshape(-1),
            np.arange(len(owner) + 1, dtype=np.int64) * LENGTH,
            np.append(0, np.cumsum(sizes)).astype(np.int64),
            intent, slots,
        )


def with_device_canaries(
    population: Population, settings: Mapping[str, Any] | None, norm: float = 1.0
) -> Population:
    """`population` with the canary devices that the group `audit` asks for, or as it is.

    Raises ConfigError for impossible settings.
    """
    count = 0 if settings is None else settings.get("device_canaries", 0)
    if settings is None or not count:
        return population
    kind, activity = settings["canary_kind"], settings["canary_activity"]
    if kind not in KINDS:
        raise ConfigError(f"audit.canary_kind={kind} is unknown: choose {' or '.join(KINDS)}")
    if count < 0:
        raise ConfigError(f"audit.device_canaries={count} must be at least 0")
    if activity is not None and not 1 <= activity <= MOST:
        raise ConfigError(f"audit.canary_activity={activity} must be from 1 to {MOST}")
    if activity is None:
        level = int(activity_levels(np.array([population.activity.max()]))[0])
        activity = 1 << level
    return CanaryDevicePopulation(population, CanaryDevices(
        kind, count, len(population), activity, settings.get("seed") or 0, norm
    ))


def canaries_of(population: Population) -> CanaryDevices | None:
    """The canary devices of a run, beneath other layers too; None where it has none."""
    layer: Population | None = population
    while layer is not None and not isinstance(layer, CanaryDevicePopulation):
        layer = getattr(layer, "base", None)
    return None if layer is None else layer.canaries


def without_canary_devices(
    population: Population, participants: Ids | None
) -> tuple[Population, Ids | None]:
    """A run's population and those of it that took part, both without the canary devices."""
    if not isinstance(population, CanaryDevicePopulation):
        return population, participants
    if participants is not None:
        participants = participants[~population.canaries.are(participants)]
    return population.base, participants


def direction_update(
    canaries: CanaryDevices, device: int, training: LocalTraining, shapes: Mapping[str, torch.Size],
    table: str | None, server_round: int,
) -> tuple[list[Draw], GroupData, LocalUpdates]:
    """What the direction canary `device` hands over, in the form of a trained group of one.

    Its loudness times S times its direction passes through the clipping of the run: the projection
    of the only local step where steps are projected, else the clipping of the finished update. The
    variance of the noise that a device of its level adds itself is owed, as that of a last step is.
    """
    training = training.at(server_round)
    canary, bound = device - canaries.first, training.update_clip_norm
    scale = canaries.norm if bound is None else bound * canaries.loudness(canary)
    unit = canaries.directions(shapes).unit(canary)
    signal = {name: tensor.unsqueeze(0) * scale for name, tensor in unit.items()}
    signal, norms, finite, clipped = _clipped(signal, training)
    level = int(activity_levels(np.array([canaries.activity]))[0])
    variance, nothing = training.noise_variance(level), torch.zeros(1, dtype=torch.float64)
    rows = shapes[table][0] if table else 1
    data = GroupData(
        batch={}, rows=[], touched=np.arange(rows, dtype=np.int64)[None],
        touched_counts=np.array([rows], dtype=np.int64), steps=np.ones(1, dtype=np.int64),
    )
    updates = LocalUpdates(
        signal, None, finite, norms, clipped, nothing, torch.zeros(1, dtype=torch.int64), 0,
        owed=nothing + variance if variance else None,
    )
    seen = np.arange(min(canaries.activity, training.plan.max_examples), dtype=np.int64)
    return [Draw(device, level, [seen])], data, updates


def _clipped(
    signal: dict[str, Tensor], training: LocalTraining
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """A signal, its norm, whether it is finite and whether it was clipped: all of one device."""
    if not training.projects_steps:
        norms, finite, clipped = descents.finished(signal, training.update_clip_norm)
        return signal, norms, finite, clipped
    norms = descents.stacked_norms(signal)
    origin = {name: torch.zeros_like(tensor) for name, tensor in signal.items()}
    way = descents.LocalDescent(training, origin, np.ones(1, dtype=np.int64), noised=False)
    way.step(0, {name: tensor / -training.learning_rate for name, tensor in signal.items()}, None)
    _, finite = way.finish()
    return way.signal, norms, finite, way.clipped
