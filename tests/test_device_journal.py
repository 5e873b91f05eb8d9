"""The journal: nothing is sent that was not counted, and what was counted stays."""

from __future__ import annotations

import math
import random
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from sottovoce.client.agent.journal import Declared, Journal, StepCost
from sottovoce.client.agent.store import DAY_S, DeviceStore
from sottovoce.client.agent.stored_rows import EARLIEST
from sottovoce.client.errors import DataError, RunError

COST = StepCost(1.2, 0.25, 8)


def script(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def test_a_participation_is_counted_once_per_task(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.state("a") is None and journal.costs() == []
    for _ in range(3):
        journal.begin("a", "run", 1, COST)
    assert journal.state("a") == "begun"
    journal.finished("a", "accepted")
    journal.begin("a", "run", 1, COST)
    assert journal.state("a") == "accepted"
    journal.begin("b", "run", 2, COST)
    journal.begin("c", "run", 3, StepCost(None, 0.5, 4))
    assert journal.costs() == [(COST, 2), (StepCost(None, 0.5, 4), 1)]
    assert Journal(tmp_path).costs() == journal.costs()
    assert [line.round for line in journal.participations(2)] == [2, 3]


def test_costs_come_back_bit_for_bit(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    costs = [StepCost(math.nextafter(1.0, 2.0), 1 / 3, 7), StepCost(1.0, 1 / 3, 7)]
    for number, cost in enumerate(costs):
        journal.begin(str(number), "run", np.int64(1), cost)  # type: ignore[arg-type]
    assert journal.costs() == [(cost, 1) for cost in costs]


def test_one_task_id_stands_for_one_piece_of_work(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("a", "run", 1, COST)
    with pytest.raises(RunError, match="is not done twice"):
        journal.begin("a", "run", 1, StepCost(0.1, 0.25, 8))
    with pytest.raises(RunError, match="never begun"):
        journal.finished("z", "accepted")
    assert journal.costs() == [(COST, 1)]


def test_only_the_first_declaration_for_a_run_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.declared("run") is None
    assert journal.declare("run", np.uint8(3), np.int64(11)) == Declared(3, 11)  # type: ignore[arg-type]
    assert Journal(tmp_path).declare("run", 5, 60) == Declared(3, 11)
    assert journal.declare("next", 5, 60) == Declared(5, 60)
    assert journal.declared("run") == Declared(3, 11)


def test_a_clock_that_jumps_changes_neither_order_nor_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    for number, now in enumerate((2e9, 0.0, -5.0, 4e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        journal.begin(str(number), "run", number, COST)
    assert [line.task for line in journal.participations()] == ["0", "1", "2", "3"]
    assert journal.costs() == [(COST, 4)]


def test_retention_forgets_examples_and_never_participations(tmp_path: Path) -> None:
    store, journal = DeviceStore(tmp_path), Journal(tmp_path)
    store.add([{"text": "old", "time": 5.0}])
    journal.begin("a", "run", 1, COST)
    journal.declare("run", 0, store.last_id())
    assert store.purge(EARLIEST + 10_000 * DAY_S, retention_days=1) == 1
    store.forget()
    assert journal.costs() == [(COST, 1)]
    assert journal.declared("run") == Declared(0, 1)


def test_a_journal_that_vanished_or_is_damaged_is_not_taken_for_an_empty_one(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path)
    for number in range(200):
        journal.begin(str(number), "run", 1, COST)
    journal.close()
    file = tmp_path / "journal.sqlite"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(DataError, match=r"^[^\n]*is damaged[^\n]*restore it from a backup[^\n]*$"):
        Journal(tmp_path)
    for lost in (b"", None):
        file.unlink()
        if lost is not None:
            file.write_bytes(lost)
        with pytest.raises(RunError, match=r"^[^\n]*has vanished[^\n]*restore it[^\n]*$"):
            Journal(tmp_path)
        file.touch()
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE t (x)")
    (tmp_path / "other.sqlite").replace(file)
    with pytest.raises(DataError, match="database of another program"):
        Journal(tmp_path)


def test_a_full_disk_stops_the_participation_before_it_begins(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("a", "run", 1, COST)
    with journal._database.reading() as connection:
        connection.execute("PRAGMA max_page_count=1")
        with pytest.raises(RunError, match="the disk is full"):
            for number in range(500):
                journal.begin(f"{number:032}", "run", 1, COST)
    last = len(journal.participations()) - 1
    assert journal.state(f"{last:032}") is None
    journal.finished("a", "accepted")


SENDER = """
    import sys
    from sottovoce.client.agent.journal import Journal, StepCost
    from pathlib import Path
    journal = Journal(Path(sys.argv[1]))
    for number in range(100_000):
        journal.begin(str(number), "run", number, StepCost(1.0, 0.5, 2))
        print(number, flush=True)       # the first byte of the update leaves
        journal.finished(str(number), "accepted")
"""


def test_what_was_sent_was_counted_whenever_the_device_is_killed(tmp_path: Path) -> None:
    generator = random.Random(7)
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        device = script(SENDER, str(folder))
        assert device.stdout is not None
        sent = [device.stdout.readline()]
        time.sleep(generator.random() * 0.1)
        device.kill()
        sent += device.stdout.readlines()
        device.communicate()
        whole = [line for line in sent if line.endswith("\n")]
        journal = Journal(folder)
        states = {line.task: line.state for line in journal.participations()}
        assert {line.strip() for line in whole} <= states.keys()
        assert len(states) <= len(whole) + 1
        assert all(states[str(n)] == "accepted" for n in range(len(whole) - 1))


KILLED_AT_EVERY_LINE = """
    import os, signal, sys
    from pathlib import Path
    from sottovoce.client.agent import database, journal as journals
    from sottovoce.client.agent.journal import Journal, StepCost

    OURS = {database.__file__, journals.__file__}

    def device(folder, steps, sent):
        def trace(frame, event, _):
            nonlocal steps
            if frame.f_code.co_filename in OURS:
                steps -= 1
                if steps == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        journal = Journal(folder)
        journal.declare("run", 3, 17)
        for number in range(3):
            journal.begin(str(number), "run", number, StepCost(1.0, 0.5, 2))
            os.write(sent, b"%d" % number)
            journal.finished(str(number), "accepted")

    root, killed = Path(sys.argv[1]), 0
    for steps in range(1, 10_000, 7):
        folder = root / str(steps)
        folder.mkdir()
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            device(folder, steps, writing)
            os._exit(0)
        os.close(writing)
        status = os.waitpid(child, 0)[1]
        sent = [chr(byte) for byte in os.read(reading, 100)]
        os.close(reading)
        journal = Journal(folder)
        begun = [line.task for line in journal.participations()]
        assert sent == begun[:len(sent)] and len(begun) <= len(sent) + 1, (steps, sent, begun)
        assert not begun or journal.declared("run").level == 3, steps
        journal.begin("9", "run", 9, StepCost(1.0, 0.5, 2))
        journal.close()
        if status == 0:
            break
        assert status == signal.SIGKILL
        killed += 1
    assert status == 0 and sent == ["0", "1", "2"]
    print(killed)
"""


def test_a_device_killed_at_any_line_of_its_journal_has_counted_every_task_that_it_sent(
    tmp_path: Path,
) -> None:
    out, err = script(KILLED_AT_EVERY_LINE, str(tmp_path)).communicate(timeout=100)
    assert err == ""
    assert int(out) > 30
