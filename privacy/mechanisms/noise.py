"""Where noise comes from: generators keyed by (secret, purpose, round, …), never a global one.

A draw belongs to one purpose of one round, so no noise is used twice, and a run that resumes
draws what it would have drawn. The secret is 32 bytes from the operating system unless a seed is
given; each key is hashed (BLAKE2b) into the 128-bit key of a counter-based Philox generator
(Salmon et al. 2011). torch's CPU generator is not used: it keeps 32 bits of its seed.

*Assumes*: Gaussian noise in float32 is treated as real-valued; attacks on floating-point samplers
(Mironov 2012; Jin et al., arXiv:2112.05307) are out of scope.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sottovoce.client.errors import RunError

SECRET_BYTES = 32
SECRET_FILE = "secret.key"


class NoiseSource:
    """Keyed random generators under one secret.

    `reproducible`: whether the secret came from a seed; such noise protects nobody and a report
    must say so.
    """

    def __init__(self, secret: bytes, *, reproducible: bool = False) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a noise secret has {SECRET_BYTES} bytes, not {len(secret)}")
        self.secret, self.reproducible = secret, reproducible

    @classmethod
    def from_system(cls) -> NoiseSource:
        """A fresh secret from the operating system's entropy."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def from_seed(cls, seed: int) -> NoiseSource:
        """The secret of a seed: the same noise every time, for simulation only."""
        digest = hashlib.blake2b(f"sottovoce seed {seed}".encode(), digest_size=SECRET_BYTES)
        return cls(digest.digest(), reproducible=True)

    def save(self, folder: Path) -> None:
        """Keep the secret in `folder` while the run may resume; only its owner may read it."""
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / SECRET_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(file.fileno(), 0o600)  # for a file that was there before
            json.dump({"secret": self.secret.hex(), "reproducible": self.reproducible}, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, folder: Path) -> NoiseSource:
        """The secret that `save` kept; RunError where it is gone or damaged."""
        try:
            kept = json.loads((folder / SECRET_FILE).read_text())
            return cls(bytes.fromhex(kept["secret"]), reproducible=bool(kept["reproducible"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{folder / SECRET_FILE} cannot be read ({error}): without its noise secret a run "
                "cannot resume; start a new run"
            ) from None

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete a kept secret: with it, whoever holds the run could take the noise away."""
        (folder / SECRET_FILE).unlink(missing_ok=True)

    def generator(self, purpose: str, *key: int) -> np.random.Generator:
        """The generator of one purpose and key, always in its first state."""
        digest = self.digest(purpose, *key, size=16)
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def key(self, purpose: str, *key: int) -> tuple[int, int]:
        """Two words of 64 bits for `philox`, which draws for many devices at once."""
        digest = self.digest(purpose, *key, size=16)
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")

    def digests(self, purpose: str, *key: int, numbers: Iterable[int], size: int) -> list[bytes]:
        """`digest` of (*key, number) for each of `numbers`; what they share is hashed once."""
        text = "\x00".join([purpose, *map(str, key), ""]).encode()
        shared, found = hashlib.blake2b(text, key=self.secret, digest_size=size), []
        for number in numbers:
            own = shared.copy()
            own.update(b"%d" % number)
            found.append(own.digest())
        return found

    def digest(self, purpose: str, *key: int, size: int) -> bytes:
        """`size` bytes that nobody without the secret can tell from random ones."""
        text = "\x00".join([purpose, *map(str, key)]).encode()
        return hashlib.blake2b(text, key=self.secret, digest_size=size).digest()
