"""Worker processes: the same bits from any number of them, and no failure that hangs or lingers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_fleets import NOISED, SIZES, assert_same, fleet, parameters_of
from small_runs import metrics, model, run

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError, RunError
from sottovoce.client.fleet import ExampleClipping, FleetReply
from sottovoce.simulations import blocks as cut
from sottovoce.simulations import cores
from sottovoce.simulations.attendance import Attendance
from sottovoce.simulations.conditions import Conditions, ConditionsConfig, Work
from sottovoce.simulations.fleet import SimulatedFleet

COHORT = np.arange(0, 120, 3, dtype=np.int64)
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight devices, so that small cohorts have several."""
    monkeypatch.setattr(cut, "LEAST", 8)
    monkeypatch.setattr(cut, "LARGEST", 1)


def reply(fast: SimulatedFleet, workers: int, server_round: int = 3, **more: Any) -> FleetReply:
    fast.workers = workers
    try:
        return fast.train(parameters_of(fast.model), COHORT, server_round, **more)
    finally:
        fast.close()


def assert_equal(a: FleetReply, b: FleetReply) -> None:
    """The same bits."""
    assert a.sums.keys() == b.sums.keys()
    assert all(torch.equal(a.sums[name], b.sums[name]) for name in a.sums)
    assert (a.totals, a.devices_by_level, a.dropped) == (b.totals, b.devices_by_level, b.dropped)


@pytest.mark.parametrize(
    ("name", "example", "update_clip"),
    [*((name, NOISED, 0.05) for name in SIZES), ("bilstm", None, None), ("lstm", None, 0.05)],
)
def test_any_number_of_workers_gives_the_same_bits(
    name: str, example: ExampleClipping | None, update_clip: float | None
) -> None:
    alone, *others = (
        reply(fleet(name, example, update_clip), workers) for workers in (1, 2, 3)
    )
    assert sum(alone.devices_by_level.values()) == len(COHORT)
    for other in others:
        assert_equal(other, alone)


def test_blocks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    many = reply(fleet("bilstm", NOISED, 0.05), 1)
    monkeypatch.setattr(cut, "LEAST", 1000)
    assert_same(reply(fleet("bilstm", NOISED, 0.05), 1).sums, many.sums)


def test_workers_count_devices_by_what_they_reported() -> None:
    reported = np.arange(len(COHORT), dtype=np.uint8) % 5
    alone, two = (reply(fleet("lstm", None, 0.05), w, levels=reported) for w in (1, 2))
    assert alone.devices_by_level == dict.fromkeys(range(5), len(COHORT) // 5)
    assert_equal(two, alone)


def test_workers_follow_a_clip_norm_that_moves() -> None:
    found = []
    for workers in (1, 2):
        fast = fleet("lstm", None, 0.05)
        fast.workers = workers
        replies = []
        for number, clip_norm in enumerate((0.05, 0.01, 0.2)):
            fast.set_clip_norm(clip_norm)
            replies.append(fast.train(parameters_of(fast.model), COHORT, number))
        fast.close()
        found.append(replies)
    for alone, two in zip(*found, strict=True):
        assert_equal(two, alone)


def test_devices_that_conditions_keep_away_are_counted_once() -> None:
    settings = ConditionsConfig(dropout=0.3)
    replies = []
    for workers in (1, 2):
        fast = fleet("lstm", None, 0.05)
        fast.attendance = Attendance(Conditions(settings), Work(fast.training.plan, 1e4, 1e4))
        replies.append(reply(fast, workers))
    assert_equal(*replies)
    missing = replies[0].totals["failed"]
    assert 0 < missing < len(COHORT)
    assert sum(replies[0].devices_by_level.values()) == len(COHORT) - missing


def test_a_whole_run_gives_the_same_files_from_any_number_of_workers(tmp_path: Path) -> None:
    settings = ("seed=3", "cohort_size=40", "rounds=2", "privacy=both")
    for workers in (1, 2):
        assert run(tmp_path / str(workers), f"run.workers={workers}", *settings) == 0
    assert model(tmp_path / "1") == model(tmp_path / "2")
    timed = ("seconds",)
    first, second = (
        [{k: v for k, v in record.items() if k not in timed} for record in metrics(tmp_path / n)]
        for n in ("1", "2")
    )
    assert first == second


# -- failures --------------------------------------------------------------------------------------


def breaking(fast: SimulatedFleet, at: int, fail: Callable[[], None]) -> None:
    """Let `fail` happen in the worker that trains device `at`, before it trains it."""
    trained, parent = fast._train_group, os.getpid()

    def train_group(parameters: Any, chunk: Any, first: int, *others: Any) -> Any:
        if os.getpid() != parent and at in [draw.device for draw in chunk.draws[first:]]:
            fail()
        return trained(parameters, chunk, first, *others)

    fast._train_group = train_group  # type: ignore[method-assign]


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_an_error_in_a_worker_is_raised_as_it_was() -> None:
    fast = fleet("lstm", None, 0.05)
    breaking(fast, 42, raising(ConfigError("size=0: set size to 1 or more")))
    with pytest.raises(ConfigError, match="^size=0") as caught:
        reply(fast, 2)
    assert str(caught.value) == "size=0: set size to 1 or more"
    assert "train_group" in caught.value.__notes__[0], "where it was raised"


def test_an_error_that_cannot_travel_arrives_as_text() -> None:
    class Odd(Exception):
        pass

    fast = fleet("lstm", None, 0.05)
    breaking(fast, 42, raising(Odd("out of luck")))
    with pytest.raises(RunError, match="Odd: out of luck"):
        reply(fast, 2)


def test_a_killed_worker_is_replaced_and_the_sum_is_whole(tmp_path: Path) -> None:
    died = tmp_path / "died"

    def fail() -> None:
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    fast = fleet("bilstm", NOISED, 0.05)
    breaking(fast, 42, fail)
    broken = reply(fast, 2)
    assert died.exists()
    assert_equal(broken, reply(fleet("bilstm", NOISED, 0.05), 1))


def test_workers_killed_between_rounds_are_replaced() -> None:
    fast, usual = (fleet("lstm", None, 0.05) for _ in range(2))
    fast.workers = 2
    fast.train(parameters_of(fast.model), COHORT, 1)
    assert fast._processes is not None
    for process in fast._processes.processes:
        os.kill(process, signal.SIGKILL)
    assert_equal(reply(fast, 2), reply(usual, 1))


def test_workers_that_keep_dying_end_the_round_with_one_line() -> None:
    fast = fleet("lstm", None, 0.05)
    breaking(fast, 42, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match=r"run.workers=2: .*SIGKILL.*set run.workers lower"):
        reply(fast, 2)


def test_a_failed_round_leaves_no_process_and_the_next_one_works() -> None:
    fast = fleet("lstm", None, 0.05)
    usual = fast._train_group
    breaking(fast, 42, raising(ConfigError("no")))
    fast.workers = 2
    with pytest.raises(ConfigError):
        fast.train(parameters_of(fast.model), COHORT, 3)
    assert fast._processes is not None and not fast._processes.processes
    fast._train_group = usual  # type: ignore[method-assign]
    assert_equal(reply(fast, 2), reply(fleet("lstm", None, 0.05), 1))


SLEEPER = """
import os, sys, time
import numpy as np
from small_fleets import fleet, parameters_of
fast = fleet("lstm", None, 0.05)
def sleep(*arguments):
    print(os.getpid(), flush=True)
    time.sleep(600)
fast._train_group = sleep
fast.workers = 2
fast.train(parameters_of(fast.model), np.arange(100), 1)
"""


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(deadly: signal.Signals) -> None:
    """Both by kill -9, which nobody can handle, and by Ctrl-C, which reaches all of them."""
    sleeper = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], cwd=Path(__file__).parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    assert sleeper.stdout is not None
    workers = [int(sleeper.stdout.readline()) for _ in range(2)]
    if deadly == signal.SIGINT:
        os.killpg(sleeper.pid, deadly)
    else:
        os.kill(sleeper.pid, deadly)
    sleeper.stdout.close()
    assert sleeper.wait(PATIENCE_S) != 0
    deadline = time.monotonic() + PATIENCE_S
    while any(alive(process) for process in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# -- blocks ----------------------------------------------------------------------------------------


PLAN = BatchPlan(4, local_epochs=1, max_examples=12, poisson=False)


def test_blocks_hold_every_device_once_and_most_work_first() -> None:
    generator = np.random.default_rng(0)
    devices = generator.permutation(1000)[:173]
    activity = generator.integers(1, 40, size=1000)
    steps, rows = cut.expected_work(activity[devices], PLAN)
    found = cut.cut_blocks(devices, None, (steps, rows), 16)
    assert [len(block) for block in found] == [16] * 10 + [13]
    ids, _ = cut.join(found)
    assert sorted(ids) == sorted(devices)
    ordered = np.minimum(activity[ids], 12)
    assert np.all(np.diff(ordered) <= 0)


def test_expected_work_is_what_batches_ask_for() -> None:
    activity = np.array([1, 4, 5, 12, 100], dtype=np.uint16)
    steps, rows = cut.expected_work(activity, PLAN)
    assert steps.tolist() == [1, 1, 2, 3, 3] and rows.tolist() == [1, 4, 5, 12, 12]
    poisson = BatchPlan(4, local_epochs=2, max_examples=12, poisson=True)
    steps, rows = cut.expected_work(activity, poisson)
    for count, number, expected in zip(activity.tolist(), steps, rows, strict=True):
        level = count.bit_length() - 1
        assert number == poisson.steps(level, count)
        assert expected == pytest.approx(number * poisson.rate(level) * count)


def test_a_device_drawn_twice_stays_in_one_block() -> None:
    devices = np.array([5, 5, 3, 3, 3, 8, 8, 1])
    work = np.ones(8, dtype=np.int64), np.ones(8)
    found = cut.cut_blocks(devices, None, work, 2)
    assert [block.devices.tolist() for block in found] == [[1, 3, 3, 3], [5, 5], [8, 8]]


@pytest.mark.parametrize("group", [1, 7, 16, 32])
@pytest.mark.parametrize("cohort", [1, 50, 1000, 100_000])
def test_a_block_holds_whole_groups(cohort: int, group: int) -> None:
    for heavy in (False, True):
        assert cut.block_devices(cohort, group, heavy=heavy) % group == 0


# -- cores -----------------------------------------------------------------------------------------


def test_auto_keeps_to_a_containers_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert cores.worker_count("auto") == 64, "no limit is known"
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.worker_count("auto") == 3
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.worker_count("auto") == 64
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores.worker_count("auto") == 2


def test_processes_that_cannot_be_forked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cores.worker_count("auto") == cores.worker_count(1) == 1
    with pytest.raises(ConfigError, match="run.workers=2 .*set run.workers=1"):
        cores.worker_count(2)
