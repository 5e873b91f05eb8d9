"""The population: all devices, as one activity array and a function from ids to examples.

Nothing is stored or allocated for a device until it is sampled; a source implements `examples`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.examples import Examples, Schema


class Population(ABC):
    """All devices that could take part, held-out ones apart.

    `activity`: (devices,) unsigned integers, training examples of each training device, all >= 1.
    `words`: the word table that example tokens index; it never leaves the simulator.
    `public_words`: whether that table is public (a grammar's) or was read from private text.
    `held_out`: number of evaluation devices, which are never sampled for training.
    `at_hand`: whether training examples can be read here; real devices keep theirs.
    """

    name: str
    words: Sequence[str]
    schema: Schema
    activity: NDArray[np.unsignedinteger[Any]]
    held_out: int
    public_words: bool
    at_hand: bool = True

    def __len__(self) -> int:
        return len(self.activity)

    @abstractmethod
    def examples(
        self,
        devices: NDArray[np.int64],
        indices: Sequence[NDArray[np.int64]] | None = None,
    ) -> Examples:
        """Training examples of `devices`: all, or example numbers `indices[k]` of `devices[k]`.

        Always the same examples for the same (device, number), whatever else is asked for.
        """

    def expect(self, devices: NDArray[np.int64]) -> None:
        """Get ready, without waiting, to be asked for the examples of training `devices`."""
        return  # who makes examples, or has them in memory, need not

    @abstractmethod
    def held_out_devices(self, limit: int | None = None) -> Examples:
        """Examples of (at most `limit`) held-out devices."""

    def held_out_activity(self, limit: int | None = None) -> NDArray[np.unsignedinteger[Any]]:
        """(devices,) examples that each of the `held_out_devices` has, evaluated or not.

        Those that are evaluated, where a source knows no more.
        """
        return np.diff(self.held_out_devices(limit).device_offsets).astype(np.uint32)

    @abstractmethod
    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        """Held-out examples of training devices, or None where the source has none."""

    def at_round(self, server_round: int) -> Population:
        """What devices hold in a round: always the same, unless there is a timeline."""
        return self

    def expected_level_counts(self) -> NDArray[np.float64] | None:
        """(levels,) expected devices per activity level under the *public* activity model.

        None where activity is known from private data only; the sampler then asks for a declared
        total weight or spends privacy on a noised histogram.
        """
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the report says of this source: unit, devices, activity, provenance, licence."""
