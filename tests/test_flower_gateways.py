"""Two gateways under one SuperLink: Flower's own processes, TLS and node authentication between
them, real device agents behind each; then one gateway is killed in the middle of a round.

SOTTOVOCE_FLOWER=1 pytest tests/test_flower_gateways.py
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flower_processes import (
    BIN,
    FLOWER,
    ROOT,
    flower_environment,
    free_ports,
    process,
    wait_until_open,
)

from sottovoce.client.agent.store import DeviceStore

pytestmark = FLOWER

ROUNDS = 6
ROW = {"tokens": ["play", "some", "jazz"], "intent": "music", "slots": ["O", "O", "B-genre"]}
OTHER = {"tokens": ["wake", "me", "up"], "intent": "alarm", "slots": ["O", "O", "O"]}
SETTINGS = (
    f"population=live strategy=fedavg strategy.sampler=uniform cohort_size=4 rounds={ROUNDS} "
    "strategy.max_rate=1 privacy=example population.min_devices=4 population.wait_s=120 "
    "population.deadline_s=30 model.embedding_size=6 model.hidden_size=5 run.report=false "
    "run.progress=false run.dir=run"
)


def test_a_round_goes_on_when_one_of_two_gateways_is_killed(tmp_path: Path) -> None:
    public = tmp_path / "public.jsonl"
    public.write_text(json.dumps(ROW) + "\n" + json.dumps(OTHER) + "\n")
    link, *ports = free_ports(5)
    make_certificates(tmp_path)
    environment = flower_environment(
        tmp_path / "flower", link, f'root-certificates = "{tmp_path / "ca.pem"}"'
    )
    with ExitStack() as stack:
        log = stack.enter_context(process(
            tmp_path / "link", environment, "flower-superlink", "--host", "127.0.0.1",
            "--port", str(link), "--ssl-ca-certfile", str(tmp_path / "ca.pem"),
            "--ssl-certfile", str(tmp_path / "server.pem"),
            "--ssl-keyfile", str(tmp_path / "server.key"), "--enable-supernode-auth",
        ))
        wait_until_open(link)
        names = ("east", "west")
        for name, port, node_port in zip(names, ports[:2], ports[2:], strict=True):
            stack.enter_context(process(
                tmp_path / name, environment, "sottovoce", "gateway",
                f"gateway.folder={tmp_path / name / 'gateway'}", f"gateway.name={name}",
                f"gateway.port={port}", "gateway.metrics_port=null",
            ))
            wait_until_open(port)
            register(tmp_path, environment, name)
            stack.enter_context(process(
                tmp_path / f"node-{name}", environment, "flower-supernode",
                "--superlink", f"127.0.0.1:{link}", "--host", "127.0.0.1", "--port",
                str(node_port), "--root-certificates", str(tmp_path / "ca.pem"),
                "--auth-supernode-private-key", str(tmp_path / f"{name}.node"),
                "--node-config", f'gateway="{tmp_path / name / "gateway"}"',
            ))
            for device in ("1", "2"):
                stack.enter_context(joined(tmp_path, environment, name, port, device))
        stranger = subprocess.run(
            [BIN / "flower-supernode", "--superlink", f"127.0.0.1:{link}", "--host", "127.0.0.1",
             "--port", "0", "--root-certificates", str(tmp_path / "ca.pem"), "--max-retries", "1",
             "--auth-supernode-private-key", str(node_key(tmp_path / "stranger.node"))],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )
        assert stranger.returncode != 0, "a node that nobody registered was let in"
        settings = f'fleets=2 overrides="{SETTINGS} population.path={public}"'
        running = stack.enter_context(process(
            tmp_path / "run", environment, "flwr", "run", str(ROOT), "here", "--stream",
            "--run-config", settings,
        ))
        folder = tmp_path / "link" / "run"
        wait_for_rounds(folder, 2, running, log)
        kill_group("east", tmp_path)
        records = wait_for_rounds(folder, ROUNDS + 1, running, log)
        wait_for(folder / "summary.json")
    asked = [record["devices"] + record["dropped"] + absent(record) for record in records[1:]]
    assert asked == [4] * ROUNDS, "every sampled device is counted, reachable or not"
    assert records[1]["devices"] == 4, "both gateways' devices were in the first round"
    assert records[-1]["devices"] == 2, "the other gateway's devices carried the last round"
    ledger = json.loads((folder / "ledger.json").read_text())
    assert sum(event.get("unit") == "example" for event in ledger["events"]) == ROUNDS


def absent(record: dict[str, float]) -> int:
    return int(sum(record.get(name, 0) for name in ("unavailable", "failed", "late")))


def wait_for(path: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.2)


def wait_for_rounds(folder: Path, lines: int, *logs: Path) -> list[dict[str, float]]:
    """The run's records once there are so many."""
    deadline, path = time.monotonic() + 240, folder / "metrics.jsonl"
    while True:
        found = path.read_text().splitlines() if path.exists() else []
        if len(found) >= lines:
            return [json.loads(line) for line in found]
        said = "\n".join(log.read_text()[-3000:] for log in logs)
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def kill_group(name: str, folder: Path) -> None:
    """SIGKILL to a gateway: no goodbye to anybody."""
    lock = folder / name / "gateway"
    found = subprocess.run(
        ["pgrep", "-f", f"gateway.folder={lock}"], capture_output=True, text=True, check=True
    )
    for number in found.stdout.split():
        os.kill(int(number), signal.SIGKILL)


def joined(folder: Path, environment: dict[str, str], name: str, port: int, device: str):  # type: ignore[no-untyped-def]
    """A device agent that enrols at a gateway and stays."""
    store = DeviceStore(folder / f"{name}-{device}-store")
    store.add([ROW, OTHER] * 10)
    store.close()
    home, tokens = folder / name / "gateway", folder / f"{name}-{device}-token"
    subprocess.run(
        [BIN / "sottovoce", "tokens", f"gateway={home}", f"dir={tokens}"],
        check=True, env=environment, capture_output=True,
    )
    return process(
        folder / f"{name}-{device}", environment, "sottovoce", "join", f"127.0.0.1:{port}",
        "--store", str(folder / f"{name}-{device}-store"), "--ca",
        str(home / "certificates" / "ca.pem"), "--token-file", str(tokens / "token-1"),
    )


def register(folder: Path, environment: dict[str, str], name: str) -> None:
    """Tell the SuperLink the public key of a node."""
    public = node_key(folder / f"{name}.node").with_suffix(".pub")
    done = subprocess.run(
        [BIN / "flwr", "supernode", "register", str(public), "here"],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def node_key(path: Path) -> Path:
    """An EC key pair as Flower reads it: `path`, and the public half beside it."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    ))
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ))
    return path


def make_certificates(folder: Path) -> None:
    """A CA and a certificate of 127.0.0.1 for the SuperLink."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name)
            .public_key(public).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=2))
        )

    ca = builder(ca_name, ca_key.public_key()).add_extension(
        x509.BasicConstraints(True, None), True
    ).sign(ca_key, hashes.SHA256())
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    own = builder(name, key.public_key()).add_extension(
        x509.SubjectAlternativeName([address]), False
    ).sign(ca_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(own.public_bytes(pem))
    (folder / "server.key").write_bytes(key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))
