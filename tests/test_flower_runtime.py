"""The same run on Flower's own runtimes: a real SuperLink with two SuperNodes, each a process of
its own on loopback, and Flower's simulation on Ray, where it is installed.

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
from importlib.util import find_spec
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
TOLERANCE = 1e-6  # of a parameter: each node's sum is rounded to float32 before they are added
TINY = (
    "population.devices=1000 population.held_out_devices=20 cohort_size=150 rounds=2 seed=7 "
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


def flower_environment(home: Path, port: int) -> dict[str, str]:
    """Environment of Flower's commands, whose default connection is to a SuperLink on `port`."""
    home.mkdir()
    (home / "config.toml").write_text(CONNECTION.format(port=port))
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


def flower_run(environment: dict[str, str], *federation: str) -> str:
    """What `flwr run` of the tiny run over two fleets said; it must end well."""
    settings = f'fleets=2 overrides="{TINY} run.dir=run"'
    done = subprocess.run(
        [BIN / "flwr", "run", ROOT, "here", "--stream", "--run-config", settings, *federation],
        env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_like_alone(folder: Path, model: Path) -> None:
    """Compare with `sottovoce simulate`: only the order in which float32 sums are added differs."""
    assert main(["simulate", *TINY.split(), f"run.dir={folder / 'alone'}"]) == 0
    alone, together = load_file(folder / "alone" / "model.safetensors"), load_file(model)
    assert alone.keys() == together.keys()
    furthest = max(float((alone[name] - together[name]).abs().max()) for name in alone)
    print(f"furthest parameter: {furthest:.2g}")
    assert furthest < TOLERANCE


def test_two_supernodes_train_the_model_that_one_process_trains(tmp_path: Path) -> None:
    link, *nodes = free_ports(3)
    environment = flower_environment(tmp_path / "flower", link)
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
        said = [flower_run(environment), *(log.read_text()[-3000:] for log in logs)]
    model = tmp_path / "link" / "run" / "model.safetensors"
    assert model.is_file(), "\n".join(said)
    assert_like_alone(tmp_path, model)
    assert all("Sent successfully" in log.read_text() for log in logs[1:]), "a node was not asked"


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: sottovoce[simulation]")
def test_two_nodes_on_ray_train_the_model_that_one_process_trains(tmp_path: Path) -> None:
    (link,) = free_ports(1)
    environment = flower_environment(tmp_path / "flower", link)
    command = ("flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1")
    with process(tmp_path / "link", environment, *command, "--port", str(link)) as log:
        wait_until_open(link)
        said = flower_run(environment, "--federation-config", "num-supernodes=2")
        said += log.read_text()[-3000:]
    model = tmp_path / "link" / "run" / "model.safetensors"
    assert model.is_file(), said
    assert_like_alone(tmp_path, model)
