"""Flower's processes and others, for opt-in tests."""

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

FLOWER = [
    pytest.mark.flower,
    pytest.mark.skipif(
        os.environ.get("SOTTOVOCE_FLOWER") != "1",
        reason="starts Flower's own processes for about a minute; SOTTOVOCE_FLOWER=1 runs it",
    ),
]

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TIMEOUT_S = 300
CONNECTION = """[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
{security}
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


def flower_environment(
    home: Path, port: int, security: str = "insecure = true"
) -> dict[str, str]:
    """Environment of Flower's commands, whose default connection is to a SuperLink on `port`."""
    home.mkdir()
    (home / "config.toml").write_text(CONNECTION.format(port=port, security=security))
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
