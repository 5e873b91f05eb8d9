"""Tokens are good once, secrets are for their owner alone, and a killed gateway loses no device."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from gateway_devices import RUN, Device, order_for, ready, serving

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.server.gateway import certificates
from sottovoce.server.gateway.certificates import Authority, device_of, expiry_line, operators_pair
from sottovoce.server.gateway.gateway import Gateway, GatewaySettings, Member
from sottovoce.server.gateway.limits import Buckets, caller_address
from sottovoce.server.gateway.registry import Registry
from sottovoce.server.gateway.sessions import MAX_NONCES, Challenges, Sessions


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry.sqlite")


def test_a_token_makes_one_device_however_many_ask_at_once(registry: Registry) -> None:
    token = registry.make_tokens(1, 60)[0]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: registry.enrol(token), range(64)))
    assert sum(device is not None for device in found) == 1
    assert registry.counts() == {"enrolled": 1, "revoked": 0, "tokens": 0}


def test_an_unknown_or_outdated_token_makes_none(registry: Registry) -> None:
    assert registry.enrol(registry.make_tokens(1, -1)[0]) is None
    assert registry.enrol("") is None
    assert registry.enrol("\udc80") is None


def test_tokens_are_not_in_the_file(registry: Registry) -> None:
    tokens = registry.make_tokens(20, 60)
    registry.enrol(tokens[0])
    held = b"".join(path.read_bytes() for path in registry.path.parent.iterdir())
    assert not any(token.encode() in held for token in tokens)


def test_secret_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    with serving(tmp_path / "g") as gateway:
        Device(gateway)
        secret = ["registry.sqlite", "registry.sqlite-wal", "control.json", "control/socket"]
        secret += ["certificates/ca.key", "certificates/server.key"]
        for name in secret:
            assert stat.S_IMODE((gateway.folder / name).stat().st_mode) == 0o600, name
        for name in ("", "control", "certificates"):
            assert stat.S_IMODE((gateway.folder / name).stat().st_mode) == 0o700, name


def test_a_level_is_declared_once_for_a_run(registry: Registry) -> None:
    first, second = (registry.enrol(token) for token in registry.make_tokens(2, 60))
    assert first and second
    assert registry.declare("a", first.device, 3) == 3
    assert registry.declare("a", first.device, 9) == 3
    assert registry.declare("b", first.device, 9) == 9
    registry.declare("a", second.device, 0)
    assert registry.roster("a") == sorted(
        [Member(first.device, 3), Member(second.device, 0)], key=lambda member: member.device
    )
    assert registry.revoke(second.device) and not registry.revoke(second.device)
    assert registry.roster("a") == [Member(first.device, 3)]
    assert registry.key(second.device) is None and registry.key(first.device) == first.key


def test_what_was_enrolled_is_there_after_the_file_is_opened_again(registry: Registry) -> None:
    made = [registry.enrol(token) for token in registry.make_tokens(50, 60)]
    registry.close()
    again = Registry(registry.path)
    assert all(device and again.key(device.device) == device.key for device in made)
    assert all(0 < device.device < 2**63 for device in made if device)


@pytest.mark.parametrize("content", [b"not a database, but quite long" * 40, b""])
def test_a_foreign_file_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(content)
    if not content:  # an empty file is a new registry; one of another version is not
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 7")
    with pytest.raises(RunError, match="registry.sqlite"):
        Registry(path)


def test_buckets_let_through_what_they_promise_and_do_not_grow() -> None:
    now = [0.0]
    buckets = Buckets(2.0, 5, clock=lambda: now[0])
    assert [buckets.take("a") for _ in range(6)] == [True] * 5 + [False]
    now[0] += 1.0
    assert [buckets.take("a") for _ in range(3)] == [True, True, False]
    for caller in range(50_000):
        buckets.take(caller)
    assert len(buckets) <= 20_000


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:52114", "10.0.0.7"), ("ipv6:%5B::1%5D:9", "::"),
        ("ipv6:[2001:db8:1:2:3::4]:9", "2001:db8:1:2::"), ("unix:", "unix:"), ("", ""),
        ("ipv6:[::ffff:10.0.0.7]:9", "10.0.0.7"),
    ],
)  # fmt: skip
def test_callers_are_told_apart_by_address(peer: str, address: str) -> None:
    assert caller_address(peer) == address


def test_challenges_are_used_once_in_time_and_in_bounded_memory() -> None:
    now = [0.0]
    challenges = Challenges(10, clock=lambda: now[0])
    nonce = challenges.new(1)
    assert not challenges.use(2, nonce)
    assert challenges.use(1, nonce) and not challenges.use(1, nonce)
    old = challenges.new(1)
    now[0] = 11
    assert not challenges.use(1, old)
    mine = [challenges.new(1) for _ in range(9)]
    assert [challenges.use(1, nonce) for nonce in mine] == [False] * 5 + [True] * 4
    for device in range(MAX_NONCES + 100):
        challenges.new(device)
    assert len(challenges) == MAX_NONCES


def test_sessions_end_by_time_by_number_and_by_revocation() -> None:
    now = [0.0]
    sessions = Sessions(10, per_device=2, clock=lambda: now[0])
    first, second, third = (sessions.open(1) for _ in range(3))
    other = sessions.open(2)
    assert [sessions.device(s) for s in (first, second, third, other)] == [None, 1, 1, 2]
    sessions.close(1)
    assert [sessions.device(s) for s in (second, third, other)] == [None, None, 2]
    now[0] = 11
    assert sessions.device(other) is None and len(sessions) == 0


def test_a_ca_is_kept_and_its_servers_certificate_renewed_in_time(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "here")
    first = authority.server(["127.0.0.1", "gateway.example"])
    again = Authority(tmp_path, "here")
    assert again.pair == authority.pair
    assert again.server(["127.0.0.1"]) == first
    assert again.server(["other.example"]) != first
    nearly_over = again._server_pair(["127.0.0.1"], days=20)
    certificates._store(tmp_path, "server", nearly_over)
    renewed = again.server(["127.0.0.1"])
    assert renewed != nearly_over and renewed.days_left > 300
    names = first.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gateway.example"]
    (tmp_path / "server.key").write_bytes(authority.pair.private_key)  # a crash between two files
    assert again.server(["127.0.0.1"]).days_left > 300


def test_certificates_about_to_end_are_said_in_one_line(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "here")
    soon = authority._server_pair(["127.0.0.1"], days=10)
    assert expiry_line("it", authority.pair) is None
    assert "in 10 days" in str(expiry_line("it", soon))
    past = authority._server_pair(["127.0.0.1"], days=-1e-4)
    assert "ended on" in str(expiry_line("it", past))
    certificates._store(tmp_path, "mine", past)
    with pytest.raises(ConfigError, match="ended on"):
        operators_pair(tmp_path / "mine.pem", tmp_path / "mine.key")
    with pytest.raises(ConfigError, match="is not the private key of"):
        operators_pair(tmp_path / "mine.pem", tmp_path / "ca.key")
    (tmp_path / "mine.key").write_text("no key")
    with pytest.raises(ConfigError, match="are no PEM"):
        operators_pair(tmp_path / "mine.pem", tmp_path / "mine.key")


def test_a_devices_certificate_names_it(tmp_path: Path) -> None:
    pair = Authority(tmp_path, "here").device(2**62)
    name = pair.leaf.subject.rfc4514_string().removeprefix("CN=")
    assert device_of(name) == 2**62
    assert device_of("device-") is None and device_of("gateway") is None
    assert pair.leaf.not_valid_after_utc > datetime.now(UTC) + timedelta(days=365)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"host": "0.0.0.0", "tls": False}, "TLS"), ({"mutual_tls": True}, "enrol_port"),
        ({"enrol_port": 9}, "mutual_tls"), ({"port": 70000}, "port=70000"),
        ({"hold_s": 0}, "hold_s"), ({"certificate": Path("a")}, "private_key"),
        ({"log_format": "xml"}, "log_format"), ({"port": 9, "metrics_port": 9}, "differ"),
        ({"host_names": ("grüße.example",)}, "host_names"),
        ({"tls": False, "mutual_tls": True, "enrol_port": 9}, "tls=true"),
    ],
)  # fmt: skip
def test_impossible_settings_are_said_in_one_line(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        GatewaySettings(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_what_stands_in_the_way_of_a_start_is_said_in_one_line(tmp_path: Path) -> None:
    with serving(tmp_path / "g") as gateway:
        with pytest.raises(RunError, match="another gateway serves"):
            Gateway(tmp_path / "g", GatewaySettings(port=0)).start()
        port = int(gateway.address.rpartition(":")[2])
        with pytest.raises(RunError, match=f"port={port} cannot be used"):
            Gateway(tmp_path / "h", GatewaySettings(port=port)).start()
        with pytest.raises(RunError, match=f"metrics_port={port}"):
            Gateway(tmp_path / "h", GatewaySettings(port=0, metrics_port=port)).start()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Gateway(tmp_path / "file" / "g", GatewaySettings(port=0)).start()


def test_a_gateway_does_nothing_before_its_start_and_after_its_end(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "g", GatewaySettings(port=0))
    with pytest.raises(RunError, match="start it first"):
        gateway.status()
    gateway.stop()
    gateway.start()
    gateway.stop()
    gateway.stop()
    with pytest.raises(RunError, match="start it first"):
        gateway.train(order_for([]))


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from gateway_devices import *
    gateway = Gateway(Path(sys.argv[1]), GatewaySettings(port=0, **LIMITS))
    gateway.start()
    device, = ready(gateway, 1)
    print(device.number, device.key.hex(), flush=True)
    Training(gateway, order_for([device.number], deadline_s=60))
    print(device.task().id, flush=True)
    time.sleep(60)
"""


def test_a_killed_gateway_comes_back_with_its_devices_and_without_its_round(
    tmp_path: Path,
) -> None:
    tests = str(Path(__file__).parent)
    killed = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "g"), tests],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert killed.stdout is not None
    number, key = killed.stdout.readline().split()
    lost = killed.stdout.readline().strip()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    with serving(tmp_path / "g") as gateway:
        other = ready(gateway, 1)[0]
        device = other
        device.number, device.key = int(number), bytes.fromhex(key)
        device.connect().open()
        assert gateway.roster(RUN)[0].level == 3
        assert len(gateway.roster(RUN)) == 2
        assert device.decline(lost).outcome == 3  # LATE
