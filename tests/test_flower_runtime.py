"""The same run over a real SuperLink and two SuperNodes, each a process of its own on loopback.

SOTTOVOCE_FLOWER=1 pytest tests/test_flower_runtime.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sottovoce.server.cli import main

pytestmark = [
    pytest.mark.flower,
    pytest.mark.skipif(
        os.environ.get("SOTTOVOCE_FLOWER") != "1",
        reason="starts four Flower processes for about a minute; SOTTOVOCE_FLOWER=1 runs it",
    ),
]

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TIMEOUT_S = 300
TINY = (
    "population.devices=200 population.held_out_devices=20 cohort_size=20 rounds=2 seed=7 "
    "strategy=fedavg privacy=device model.embedding_size=6 model.hidden_size=5 run.report=false "
    "run.progress=false"
)
CONNECTION = """[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def process(folder: Path, environment: dict[str, str], *command: str) -> Iterator[Path]:
    """A command in the background, in a folder of its own; the file that has its output."""
    folder.mkdir()
    log = folder / "output.log"
    with log.open("wb") as output:
        running = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], cwd=folder, env=environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )
    try:
        yield log
    finally:
        for deadly in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(running.pid, deadly)
                running.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)


def test_two_supernodes_train_the_model_that_one_process_trains(tmp_path: Path) -> None:
    link, *nodes = free_ports(3)
    home = tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(CONNECTION.format(port=link))
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    here = ("--insecure", "--host", "127.0.0.1", "--port")
    with ExitStack() as stack:
        logs = [
            stack.enter_context(
                process(tmp_path / "link", environment, "flower-superlink", *here, str(link))
            )
        ]
        for port in nodes:
            command = ("flower-supernode", "--superlink", f"127.0.0.1:{link}", *here, str(port))
            folder = tmp_path / f"node-{port}"
            logs.append(stack.enter_context(process(folder, environment, *command)))
        wait_until_open(link)
        settings = f'fleets=2 overrides="{TINY} run.dir=run"'
        done = subprocess.run(
            [BIN / "flwr", "run", ROOT, "here", "--stream", "--run-config", settings],
            env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )
        said = [done.stdout, done.stderr, *(log.read_text()[-3000:] for log in logs)]
    model = tmp_path / "link" / "run" / "model.safetensors"
    assert done.returncode == 0 and model.is_file(), "\n".join(said)
    assert main(["simulate", *TINY.split(), f"run.dir={tmp_path / 'alone'}"]) == 0
    alone, together = load_file(tmp_path / "alone" / "model.safetensors"), load_file(model)
    assert alone.keys() == together.keys()
    for name in alone:
        assert float((alone[name] - together[name]).abs().max()) < 1e-6, name
    assert all("Sent successfully" in log.read_text() for log in logs[1:]), "a node was not asked"
