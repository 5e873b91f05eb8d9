"""Who is a canary candidate, and which of them are in: functions of a seed and the activity alone.

A candidate takes the place of one training example of a device. It is put there or nothing is, by
a fair coin of its own. A device gives up no more examples than its activity level can spare, so
that its level, and with it sampling, local steps and Poisson rates, is the same whatever the coins.
Where that is too few, candidates also come after a device's examples, as many as its level bears.
Steinke, Nasr, Jagielski 2023, arXiv:2305.08846.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.simulations.hashing import draws, integers_below, stream
from sottovoce.strategies.levels import activity_levels

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Slots:
    """The candidates, by device: number `numbers[i]` of device `devices[i]` gives way to i.

    `devices`, `numbers`: (candidates,) int64, sorted by both; a number that the device has no
    example for is after them. `seed`: of the coins.
    """

    devices: Ints
    numbers: Ints
    seed: int

    def __len__(self) -> int:
        return len(self.devices)

    @cached_property
    def coins(self) -> NDArray[np.bool_]:
        """(candidates,) whether each one is in the training data.

        A coin is a bit of a keyed hash of the candidate's number, and of nothing else: neither of
        its text nor of its device.
        """
        return np.array([coin(self.seed, i) for i in range(len(self))], dtype=bool)


def coin(seed: int, candidate: int) -> bool:
    """The fair coin of a candidate, by BLAKE2b under the key `seed`."""
    name = f"canary {candidate}".encode()
    key = hashlib.blake2b(str(seed).encode()).digest()
    return bool(hashlib.blake2b(name, key=key, digest_size=1).digest()[0] & 1)


def choose_slots(
    activity: NDArray[np.unsignedinteger[Any]], number: int, seed: int, *, append: bool = False
) -> Slots:
    """`number` slots, any that a level has room for as likely as any other.

    `append`: also after a device's examples, where they can give up too few. Raises ConfigError
    where there is room for fewer.
    """
    least = np.int64(1) << activity_levels(activity).astype(np.int64)
    spare = activity - least
    free = np.maximum(2 * least - 1 - activity, 0)
    ends = np.cumsum(spare + free if append and number > spare.sum() else spare)
    room = int(ends[-1]) if len(ends) else 0
    if number > room:
        raise ConfigError(
            f"audit.number={number} is more than the {room} that devices have room for within "
            f"their activity levels: lower it{'' if append else ', or choose mislabelled'}"
        )
    chosen = np.sort(_distinct(stream(seed, "canary devices"), number, room))
    owner = np.searchsorted(ends, chosen, side="right")
    devices, counts = np.unique(owner, return_counts=True)
    keys = draws(stream(seed, "canary places"), devices)
    numbers = []
    for device, count, key in zip(devices.tolist(), counts.tolist(), keys, strict=True):
        size, given = int(activity[device]), min(count, int(spare[device]))
        order = np.argsort(draws(key, np.arange(size)), kind="stable")
        numbers.append(np.append(np.sort(order[:given]), size + np.arange(count - given)))
    return Slots(owner.astype(np.int64), np.concatenate(numbers).astype(np.int64), seed)


def _distinct(key: np.uint64, count: int, below: int) -> Ints:
    """`count` different integers below `below`, uniformly."""
    if below <= 4 * count:
        return np.argsort(draws(key, np.arange(below)), kind="stable")[:count]
    tried = count
    while True:
        found, first = np.unique(
            integers_below(draws(key, np.arange(tried)), below)[0], return_index=True
        )
        if len(found) >= count:
            return found[np.argsort(first)][:count]
        tried *= 2
