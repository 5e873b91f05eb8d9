"""The device protocol: `device.proto` and the code that `make protocol` generates from it."""

from __future__ import annotations

import hmac

PROTOCOL = 1
"""Version that devices and gateways must share."""

REASONS = ("policy", "budget", "memory", "busy", "model", "failed")
"""Why a device declines a task: its policy on privacy, its own budget, too little memory, no longer
eligible, a model that it does not have, or training that failed."""

SESSION = "session-bin"
"""Metadata key of a session."""

CHUNK_BYTES = 256 * 1024
"""Data in one message of a stream."""

_PURPOSE = b"sottovoce session v1"


def session_proof(key: bytes, nonce: bytes, device: int) -> bytes:
    """What a device answers to a challenge: HMAC-SHA256 under its key, for a session alone."""
    return hmac.digest(key, _PURPOSE + nonce + device.to_bytes(8, "big"), "sha256")
