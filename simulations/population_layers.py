"""Populations on top of another: what an audit puts into a run.

A layer answers for everything as the population beneath does, but for what it says itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.examples import Examples
from sottovoce.privacy.audit.code_canaries import joined
from sottovoce.simulations.population import Population
from sottovoce.strategies.levels import MAX_LEVEL, activity_levels

Ids = NDArray[np.int64]


class PopulationLayer(Population):
    """A population whose words, labels, activity and held-out data are those of `base`."""

    def __init__(self, base: Population) -> None:
        self.base = base
        self.name, self.schema, self.words = base.name, base.schema, base.words
        self.held_out, self.public_words = base.held_out, base.public_words
        self.activity = base.activity

    def expect(self, devices: Ids) -> None:
        """As beneath, of its own devices."""
        self.base.expect(devices[devices < len(self.base)])

    def held_out_devices(self, limit: int | None = None) -> Examples:
        """Examples of held-out devices: nothing is put among them."""
        return self.base.held_out_devices(limit)

    def held_out_activity(self, limit: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """(devices,) examples that each held-out device has."""
        return self.base.held_out_activity(limit)

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        """Held-out examples of training devices: nothing is put among them."""
        return self.base.held_out_examples(limit)

    def expected_level_counts(self) -> NDArray[np.float64] | None:
        """As beneath: no device changes its level."""
        return self.base.expected_level_counts()


class AddedDevices(PopulationLayer):
    """`base`, and after its training devices `count` more with `each` examples.

    Their number and activity are settings, hence public.
    """

    def __init__(self, base: Population, count: int, each: int) -> None:
        super().__init__(base)
        if count:
            said = np.full(count, each, dtype=np.min_scalar_type(each))
            self.activity = np.concatenate([base.activity, said])

    @abstractmethod
    def say(self, added: Ids, indices: Sequence[Ids]) -> Examples:
        """Example numbers `indices[k]` of the added devices `added[k]`, counted from 0."""

    def examples(self, devices: Ids, indices: Sequence[Ids] | None = None) -> Examples:
        """Examples of training devices: all, or numbers `indices[k]` of `devices[k]`.

        Raises IndexError for an unknown device or example number.
        """
        devices = np.asarray(devices, dtype=np.int64)
        if len(devices) and not 0 <= devices.min() <= devices.max() < len(self):
            raise IndexError(f"a device is not among the {len(self)} training devices")
        is_added = devices >= len(self.base)
        others, added = np.flatnonzero(~is_added), np.flatnonzero(is_added)
        if not len(added):
            return self.base.examples(devices, indices)
        if indices is None:
            indices = [np.arange(n, dtype=np.int64) for n in self.activity[devices].tolist()]
        own = [np.asarray(indices[k], np.int64) for k in added.tolist()]
        for device, numbers in zip(devices[added].tolist(), own, strict=True):
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.activity[device]:
                raise IndexError("an example number is beyond its device's activity")
        said = self.say(devices[added] - len(self.base), own)
        if not len(others):
            return said
        theirs = self.base.examples(devices[others], [indices[k] for k in others.tolist()])
        return in_order(joined([theirs, said]), np.concatenate([others, added]))

    def expected_level_counts(self) -> NDArray[np.float64] | None:
        """Those beneath, and the added devices."""
        known = self.base.expected_level_counts()
        if known is None:
            return None
        counts = np.zeros(max(len(known), MAX_LEVEL + 1))
        counts[: len(known)] = known
        levels = activity_levels(self.activity[len(self.base) :])
        return counts + np.bincount(levels, minlength=len(counts))


def in_order(examples: Examples, places: Ids) -> Examples:
    """`examples` with device k at `places[k]`: a permutation."""
    order = np.argsort(places, kind="stable")
    if np.array_equal(order, np.arange(len(order))):
        return examples
    sizes = np.diff(examples.device_offsets)
    starts = examples.device_offsets[:-1]
    rows = np.concatenate([np.arange(starts[k], starts[k] + sizes[k]) for k in order])
    taken = examples.take(rows.astype(np.int64))
    offsets = np.append(0, np.cumsum(sizes[order])).astype(np.int64)
    return Examples(taken.tokens, taken.offsets, offsets, taken.intent, taken.slots)
