"""A gateway's settings: where it listens, who may speak to it, and how much at once."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, fields
from pathlib import Path

from sottovoce.client.errors import ConfigError

LOG_FORMATS = ("text", "json")
HOST_NAME = re.compile(r"[A-Za-z0-9.:*_-]{1,253}")


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway serves its devices. None of it changes epsilon.

    `host`, `port`: where devices connect; port 0 takes a free one. `name`: shown to devices.
    `tls`: only a loopback address may go without. `host_names`: names and addresses, beside
    `host`, under which devices reach the gateway: they go into its certificate. `certificate`,
    `private_key`: PEM files of the operator's own certificate; None: the gateway makes a CA of its
    own. `mutual_tls`: devices need a certificate, which enrolment gives them at `enrol_port`.
    `metrics_host`, `metrics_port`: Prometheus over plain HTTP; None: no metrics are served.
    `reflection`: whether the protocol can be listed; None: on loopback alone.
    `log_format`: text or json lines.

    Times. `session_lifetime_s`, `challenge_lifetime_s`. `hold_s`: how long a check-in is held at
    most. `come_back_s`: when a device without a task comes again, about. `upload_stall_s`: an
    upload that sends nothing for so long is dropped. `grace_s`: for uploads when the gateway stops.

    Limits. `upload_mb_in_flight`: of all uploads being read at once (one is always read).
    `max_calls`: in progress at once, held check-ins included. `streams_per_connection`.
    `device_calls_per_s`, `device_burst`: of an enrolled device. `peer_calls_per_s`, `peer_burst`:
    of an address before it has a session. `enrolments_per_minute`, `enrolment_burst`: of an
    address. `sessions_per_device`. `max_downloads`: how often a device may fetch a task's blobs.
    """

    host: str = "127.0.0.1"
    port: int = 9400
    name: str = "sottovoce"
    tls: bool = True
    host_names: tuple[str, ...] = ()
    certificate: Path | None = None
    private_key: Path | None = None
    mutual_tls: bool = False
    enrol_port: int | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    reflection: bool | None = None
    log_format: str = "text"
    session_lifetime_s: float = 6 * 3600.0
    challenge_lifetime_s: float = 60.0
    hold_s: float = 30.0
    come_back_s: float = 5.0
    upload_stall_s: float = 20.0
    grace_s: float = 10.0
    upload_mb_in_flight: int = 256
    max_calls: int = 20_000
    streams_per_connection: int = 16
    device_calls_per_s: float = 20.0
    device_burst: int = 100
    peer_calls_per_s: float = 100.0
    peer_burst: int = 4_000
    enrolments_per_minute: float = 120.0
    enrolment_burst: int = 100
    sessions_per_device: int = 2
    max_downloads: int = 8

    def __post_init__(self) -> None:
        self._check_ports()
        self._check_tls()
        for item in fields(self):
            value = getattr(self, item.name)
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if numeric and not item.name.endswith("port") and not value > 0:
                raise ConfigError(f"gateway {item.name}={value} must be above 0")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"gateway log_format={self.log_format}: choose text or json")

    def _check_ports(self) -> None:
        for name in ("port", "enrol_port", "metrics_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 65536:
                raise ConfigError(f"gateway {name}={value} must lie in 0 to 65535")
        given = [p for p in (self.port, self.enrol_port, self.metrics_port) if p]
        if len(given) != len(set(given)):
            raise ConfigError(f"gateway ports {given} must differ")

    def _check_tls(self) -> None:
        if not self.tls and not is_loopback(self.host):
            raise ConfigError(
                f"gateway host={self.host} without TLS would show every device's update to the "
                "network: leave tls=true, or serve on 127.0.0.1"
            )
        for name in self.host_names:
            if not HOST_NAME.fullmatch(name):
                raise ConfigError(
                    f"gateway host_names: {name!r} is no host name or address: write "
                    "gateway.example.org or 10.0.0.5"
                )
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("gateway certificate and private_key go together: give both")
        if not self.tls and (self.mutual_tls or self.certificate is not None):
            raise ConfigError("gateway mutual_tls and certificate need tls=true")
        if self.mutual_tls and self.enrol_port is None:
            raise ConfigError(
                "gateway mutual_tls=true needs enrol_port: a device has no certificate before it "
                "is enrolled"
            )
        if not self.mutual_tls and self.enrol_port is not None:
            raise ConfigError(
                f"gateway enrol_port={self.enrol_port} is for mutual_tls=true: otherwise devices "
                "enrol where they connect"
            )

    @property
    def reflects(self) -> bool:
        """Whether the protocol can be listed at the devices' port."""
        return is_loopback(self.host) if self.reflection is None else self.reflection


def is_loopback(host: str) -> bool:
    """Whether `host` reaches this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
