"""A device agent killed anywhere: never two updates for one task, and none that is not counted."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fake_gateway import FakeGateway, do
from test_device_agent import a_store, an_agent, declared, globals_, spec

from sottovoce.client.agent.agent import Agent
from sottovoce.client.agent.identity import Identity
from sottovoce.client.agent.journal import Journal

WATCHED = (
    "agent.py", "task_work.py", "update_spool.py", "residual.py", "files.py", "journal.py",
    "connection.py", "blob_cache.py", "preparation.py", "database.py",
)  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9: no handler of the agent's catches it."""


class Killer:
    """Counts lines of the agent's code; at line `at` it kills (None: never)."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "client/agent/" not in name or not name.endswith(WATCHED):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise Killed
        return self


async def lived(agent: Agent, killer: Killer, tasks: int) -> bool:
    """Run the agent under a killer; whether it came through."""
    sys.settrace(killer)
    try:
        await agent.run(lambda agent: sum(agent.counts.values()) >= tasks)
        return True
    except (Killed, asyncio.CancelledError):  # gRPC makes the one of the other
        return False
    finally:
        sys.settrace(None)


def check(gateway: FakeGateway, journal: Journal) -> None:
    """The laws: one update for a task, nothing sent that was not counted before."""
    for task, arrived in gateway.begun.items():
        whole = max(arrived, key=len)
        assert all(whole.startswith(data) for data in arrived), "two updates for one task"
        assert journal.state(task) is not None, "sent, and not counted"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> int:
    """About as many lines as a task takes."""
    with FakeGateway() as gateway:
        agent = declared(gateway, tmp_path_factory.mktemp("store"))
        gateway.add_task(spec(), globals_(), upload_encoding="int8")
        killer = Killer(None)
        do(lived(agent, killer, 1))
        return killer.lines


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_line_a_device_never_sends_two_updates_for_a_task(
    tmp_path: Path, lines: int, seed: int
) -> None:
    draw, kills = random.Random(seed), 0
    with FakeGateway() as gateway:
        declared(gateway, tmp_path).journal.close()
        tasks = [
            gateway.add_task(spec(), globals_(), upload_encoding="int8").id for _ in range(4)
        ]
        while set(tasks) - gateway.over or list((tmp_path / "spool").glob("*.update")):
            agent = an_agent(gateway, tmp_path)
            at = draw.randrange(1, lines) if kills < 12 else None
            kills += not do(lived(agent, Killer(at), 1))
            agent.journal.close()
        journal = Journal(tmp_path)
        check(gateway, journal)
        assert kills >= 4
        for task in tasks:
            assert len({data for _, data in gateway.uploads.get(task, [])}) == 1
            assert journal.state(task) == "accepted"
        assert sum(count for _, count in journal.costs()) == len(tasks)


# -- real processes --------------------------------------------------------------------------------

CHILD = """
import sys
from sottovoce.client.agent.join_cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        child.kill()
        child.wait()


def test_a_process_that_is_killed_in_a_call_ends_its_task_when_it_is_started_again(
    tmp_path: Path, children: list[subprocess.Popen[bytes]]
) -> None:
    a_store(tmp_path).close()
    with FakeGateway(tls=True) as gateway:
        token, ca = tmp_path.parent / "token", tmp_path.parent / "ca.pem"
        token.write_text("one-time\n")
        ca.write_bytes(gateway.pem)
        deaths = iter(["Chunk", "Part", "Receipt"])
        due = [next(deaths)]

        def start(*more: str) -> subprocess.Popen[bytes]:
            children.append(subprocess.Popen(
                [sys.executable, "-c", CHILD, *more, "--store", str(tmp_path), "--once"],
                stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
            ))  # fmt: skip
            return children[-1]

        def kill(call: str) -> None:
            if call == "CheckIn" and gateway.levels and not gateway.tasks:
                gateway.add_task(spec(), globals_(), upload_encoding="fp16")
            if due and call == due[0]:
                due[:] = [name for name in [next(deaths, "")] if name]
                children[-1].send_signal(signal.SIGKILL)
                raise RuntimeError("its device is gone")

        gateway.breaks = kill
        child = start(gateway.address, "--token-file", str(token), "--ca", str(ca))
        for _ in range(3):
            assert child.wait(120) == -signal.SIGKILL
            child = start()
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
        journal = Journal(tmp_path)
        check(gateway, journal)
        (task,) = gateway.tasks
        assert journal.state(task.id) == "accepted" and not due
        assert b"handed over" in errors and b"one-time" not in errors


def test_a_process_that_is_told_to_stop_leaves_at_once(
    tmp_path: Path, children: list[subprocess.Popen[bytes]]
) -> None:
    a_store(tmp_path).close()
    with FakeGateway(hold_s=30) as gateway:
        identity = Identity(gateway.address, 5, bytes(range(32)), insecure=True)
        gateway.keys[5] = identity.key
        identity.save(tmp_path / "identity")
        calls: list[str] = []

        def stop(call: str) -> None:
            calls.append(call)
            if calls.count("CheckIn") == 2:  # the one that is held
                children[-1].send_signal(signal.SIGTERM)

        gateway.breaks = stop
        children.append(subprocess.Popen(
            [sys.executable, "-c", CHILD, "--store", str(tmp_path)], stderr=subprocess.PIPE
        ))
        _, errors = children[-1].communicate(timeout=120)
        assert children[-1].returncode == 0, errors
        assert b"Traceback" not in errors and calls.count("CheckIn") == 2
