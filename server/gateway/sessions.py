"""Who is calling: challenges that are answered once, and the sessions they open.

A device proves that it has its key without sending it: HMAC-SHA256 over a nonce that the gateway
chose and takes back at once. Sessions are kept as their SHA-256, in memory alone: a gateway that is
started again has none, and every device opens another.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

NONCE_BYTES = SESSION_BYTES = 32
MAX_NONCES = 20_000
NONCES_PER_DEVICE = 4


class Challenges:
    """Nonces that are waiting for an answer, in bounded memory.

    A device has at most `NONCES_PER_DEVICE` of them, all together `MAX_NONCES`: the oldest go
    first. A nonce is gone once it is answered, rightly or not.
    """

    def __init__(self, lifetime_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.lifetime_s, self.clock = lifetime_s, clock
        self._made: OrderedDict[tuple[int, bytes], float] = OrderedDict()
        self._of: dict[int, deque[bytes]] = {}

    def new(self, device: int) -> bytes:
        """A nonce for `device`, to be answered within the lifetime."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        mine = self._of.setdefault(device, deque())
        if len(mine) >= NONCES_PER_DEVICE:
            self._drop(device, mine[0])
        elif len(self._made) >= MAX_NONCES:
            self._drop(*next(iter(self._made)))
        self._of.setdefault(device, deque()).append(nonce)
        self._made[device, nonce] = self.clock()
        return nonce

    def use(self, device: int, nonce: bytes) -> bool:
        """Whether the nonce was made for `device` and is still good; it is none from now on."""
        made = self._made.get((device, nonce))
        if made is None:
            return False
        self._drop(device, nonce)
        return self.clock() - made <= self.lifetime_s

    def __len__(self) -> int:
        return len(self._made)

    def _drop(self, device: int, nonce: bytes) -> None:
        del self._made[device, nonce]
        mine = self._of[device]
        mine.remove(nonce)
        if not mine:
            del self._of[device]


@dataclass
class Session:
    """An open session of `device`. `expires`: by the sessions' clock."""

    device: int
    expires: float


class Sessions:
    """Open sessions. A device has at most `per_device`; another one closes its oldest."""

    def __init__(
        self, lifetime_s: float, per_device: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lifetime_s, self.per_device, self.clock = lifetime_s, per_device, clock
        self._open: dict[bytes, Session] = {}
        self._of: dict[int, deque[bytes]] = {}

    def open(self, device: int) -> bytes:
        """A new session's secret."""
        secret = secrets.token_bytes(SESSION_BYTES)
        name = hashlib.sha256(secret).digest()
        mine = self._of.setdefault(device, deque())
        while len(mine) >= self.per_device:
            self._open.pop(mine.popleft(), None)
        mine.append(name)
        self._open[name] = Session(device, self.clock() + self.lifetime_s)
        return secret

    def device(self, secret: bytes) -> int | None:
        """The device of a session that is open; None for any other secret.

        Secrets are looked up by their hash, so how long it takes says nothing of them.
        """
        session = self._open.get(hashlib.sha256(secret).digest())
        if session is None:
            return None
        if self.clock() > session.expires:
            self.close(session.device, expired_only=True)
            return None
        return session.device

    def close(self, device: int, expired_only: bool = False) -> None:
        """End the sessions of a device at once."""
        now, mine = self.clock(), self._of.pop(device, deque())
        kept = deque(name for name in mine if expired_only and self._open[name].expires >= now)
        for name in mine:
            if name not in kept:
                del self._open[name]
        if kept:
            self._of[device] = kept

    def devices(self) -> set[int]:
        """Devices that have a session, open or out of date."""
        return set(self._of)

    def prune(self) -> None:
        """Forget sessions that are out of date."""
        now = self.clock()
        for device in {s.device for s in self._open.values() if s.expires < now}:
            self.close(device, expired_only=True)

    def __len__(self) -> int:
        return len(self._open)
