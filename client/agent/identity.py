"""Who a device is at its gateway: number, key, certificates; a file that its owner alone reads."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sottovoce.client.agent.files import write_whole
from sottovoce.client.errors import RunError

FILE = "identity.json"
KEY_BYTES = 32


@dataclass(frozen=True, repr=False)
class Identity:
    """What enrolment gave.

    `address`: HOST:PORT. `ca`: PEM that the gateway's certificate must chain to, empty for the
    system's. `certificate`, `private_key`: PEM of mutual TLS, or empty. `insecure`: no TLS, on
    loopback.
    """

    address: str
    device: int
    key: bytes
    gateway: str = ""
    ca: bytes = b""
    certificate: bytes = b""
    private_key: bytes = b""
    insecure: bool = False

    def __repr__(self) -> str:  # never the key
        return f"Identity(address={self.address!r}, device={self.device})"

    def save(self, folder: Path) -> None:
        """Write it to `folder`, on the disk when this returns."""
        values = {
            name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in asdict(self).items()
        }
        try:
            write_whole(folder / FILE, [json.dumps(values, indent=1).encode()])
        except OSError as error:
            raise RunError(
                f"{folder / FILE} cannot be written ({error.strerror}): free some space and join "
                "with a new token"
            ) from None

    @classmethod
    def load(cls, folder: Path) -> Identity | None:
        """The identity in `folder`; None where there is none. RunError where it is damaged."""
        path = folder / FILE
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            for name in ("key", "ca", "certificate", "private_key"):
                values[name] = base64.b64decode(values[name], validate=True)
            found = cls(**values)
            if len(found.key) != KEY_BYTES or not isinstance(found.device, int):
                raise ValueError("no key")
            return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path} cannot be read ({type(error).__name__}): delete it and join with a new "
                "token"
            ) from None
