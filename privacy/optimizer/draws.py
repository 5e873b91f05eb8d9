"""Randomness of one optimiser: noise and coins, none of which may ever come twice.

Noise used in two releases can be taken away by subtracting them. A keyed source gives every step
generators of its own; unless it is a seeded one, for simulation, a fresh nonce enters each key, so
that not even a run that goes back to a checkpoint repeats a draw.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import numpy as np

from sottovoce.privacy.mechanisms.noise import NoiseSource

Randomness = np.random.Generator | NoiseSource | None


class Draws:
    """Generators by purpose and step, from a source or from one generator for everything.

    `randomness`: None is the operating system's entropy; a `NoiseSource`, of which a seeded one
    draws the same in every run; or a numpy generator, drawn from in the order of use.
    """

    def __init__(self, randomness: Randomness) -> None:
        self._plain = randomness if isinstance(randomness, np.random.Generator) else None
        self._source = NoiseSource.from_system() if randomness is None else randomness
        self._nonce, self._process = 0, os.getpid()
        self.renew()

    def renew(self) -> None:
        """Make sure that steps counted anew draw anew, if they are not meant to repeat."""
        if isinstance(self._source, NoiseSource) and not self._source.reproducible:
            self._nonce = secrets.randbits(64)

    def __getstate__(self) -> Any:
        """Neither copied nor pickled: two copies would draw the same noise for two releases."""
        raise ValueError(
            "randomness of a private optimiser cannot be copied: its noise would be used twice; "
            "build a new EDPSGD on the copied model and load_state_dict into it"
        )

    def at(self, purpose: str, step: int) -> np.random.Generator:
        if self._process != os.getpid():
            self._forked()
        if isinstance(self._source, NoiseSource):
            return self._source.generator(purpose, self._nonce, step)
        return self._source

    def _forked(self) -> None:
        """In a forked process: what its parent draws too must not be drawn here."""
        if self._plain is not None:
            raise ValueError(
                "a plain generator would repeat its noise in a forked process: build the optimizer "
                "after the fork, or with generator=None"
            )
        self._process = os.getpid()
        self.renew()

    def check_resumable(self, steps: int) -> None:
        """Raise ValueError where going on after `steps` steps might draw the same noise again."""
        if steps and self._plain is not None:
            raise ValueError(
                f"a plain generator may repeat the noise of the first {steps} steps: resume with "
                "generator=None, or a NoiseSource, whose draws are keyed by step"
            )


def split(randomness: Randomness) -> Randomness:
    """Randomness for something beside: a generator seeded by the given one, or the same source."""
    if not isinstance(randomness, np.random.Generator):
        return randomness
    return np.random.default_rng(int.from_bytes(randomness.bytes(16), "little"))
