"""Which device an example is on and which devices are held out: pure functions of names and seed.

Shared by the population in memory and the one on disk, which must agree on every example.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import DataError
from sottovoce.simulations.activity import LogNormalActivity
from sottovoce.simulations.corpus import CorpusSettings
from sottovoce.simulations.hashing import draws, stream
from sottovoce.simulations.jsonl_reader import place
from sottovoce.simulations.partition import assign_devices


def is_natural(users: str, without_user: str | None, any_user: bool) -> bool:
    """Whether a device is a user. Raises DataError where some rows lack the user they need.

    `without_user`: where the first row without a user stands. `any_user`: whether a row has one.
    """
    if users == "natural" and without_user:
        raise DataError(
            f"{without_user}: no user_id, which users=natural needs: give every line one, or"
            " set population.users=assigned"
        )
    if users == "auto" and without_user and any_user:
        raise DataError(
            f"{without_user}: no user_id where other lines have one: give every line one, or"
            " set population.users=assigned"
        )
    return users == "natural" or (users == "auto" and without_user is None)


def user_keys(users: Iterable[str], seed: int) -> NDArray[np.uint64]:
    """(users,) keys whose order decides who is held out."""
    keys = (stream(seed, f"held-out user {user}") for user in users)
    return np.fromiter(keys, dtype=np.uint64)


def assigned_keys(devices: int, seed: int) -> NDArray[np.uint64]:
    """(devices,) the same for devices that are no users."""
    return draws(stream(seed, "held-out devices"), np.arange(devices))


def assigned(settings: CorpusSettings, labels: NDArray[np.int32]) -> NDArray[np.int64]:
    """(examples,) device of each example; `labels`: (examples,) all 0 where there are none."""
    model = LogNormalActivity(settings.mu, settings.sigma)
    return assign_devices(
        labels, settings.devices, alpha=settings.alpha, model=model, seed=settings.seed
    )


def numbered(keys: NDArray[np.uint64], fraction: float) -> tuple[NDArray[np.int64], int]:
    """(devices,) number of each device, the training devices first, and how many those are."""
    devices = len(keys)
    out = min(max(round(fraction * devices), 1), devices - 1) if fraction > 0 else 0
    held_out = np.zeros(devices, dtype=bool)
    if out:
        last = np.partition(keys, out - 1)[out - 1]
        held_out[keys < last] = True
        held_out[np.flatnonzero(keys == last)[: out - int(held_out.sum())]] = True
    number = np.empty(devices, dtype=np.int64)
    number[~held_out] = np.arange(devices - out)
    number[held_out] = np.arange(devices - out, devices)
    return number, devices - out


def test_places(
    user: NDArray[np.int32], left_out: NDArray[np.bool_], seed: int
) -> NDArray[np.int64]:
    """(test examples,) place of each in the random order, -1 for those of held-out users.

    `user`: number of each example's user, -1 for none. `left_out`: (known users,) who is held out.
    """
    kept = np.ones(len(user), dtype=bool)
    known = np.flatnonzero((user >= 0) & (user < len(left_out)))
    kept[known] = ~left_out[user[known]]
    order = np.argsort(draws(stream(seed, "test order"), np.arange(len(user))))
    places = np.full(len(user), -1, dtype=np.int64)
    order = order[kept[order]]
    places[order] = np.arange(len(order))
    return places


def silent(user: str, path: Path, number: int, unit: str) -> DataError:
    """The error of a user who stands at some rows and has no word in any."""
    return DataError(
        f"{place(path, number, unit)}: device '{user}' has no examples, all its lines are without"
        " words: fill 'text' or remove the user"
    )
