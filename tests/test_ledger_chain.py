"""The ledger's file: chained, append-only, never behind what was released, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sottovoce.client.errors import RunError
from sottovoce.privacy.accounting import chain
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import GaussianEvent, NonPrivateRelease
from sottovoce.privacy.accounting.ledger import Ledger

LEVELS = ((0, 0.01, 1), (3, 0.2, 1))


def event(number: int) -> GaussianEvent:
    return GaussianEvent(
        noise_multiplier=1.5, sampling="poisson", by_level=LEVELS, round=number
    )


def make_ledger(events: int) -> Ledger:
    found = Ledger(levels={0: 10, 3: 2}, deltas={"device": 1e-3}, claims={"sampler": "x"})
    for number in range(1, events + 1):
        found.append(event(number))
    return found


def saved(path: Path, events: int) -> Ledger:
    ledger = make_ledger(events)
    ledger.save(path)
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.json"


# -- the chain -------------------------------------------------------------------------------------


def test_the_file_is_one_json_object_with_an_event_a_line(path: Path) -> None:
    ledger = saved(path, 3)
    values = json.loads(path.read_text())
    assert values["schema"] == 2 and values == ledger.to_json()
    lines = path.read_text().splitlines()
    assert len(lines) == 3 + 2
    assert all(json.loads(line.rstrip(","))["round"] == n for n, line in enumerate(lines[1:4], 1))
    assert values["head"] == ledger.head
    assert [e["previous"] for e in values["events"][1:]] == [
        chain.digest(e) for e in values["events"][:-1]
    ]


def changed(values: dict[str, Any]) -> None:
    values["events"][1]["noise_multiplier"] = 15.0


def swapped(values: dict[str, Any]) -> None:
    values["events"][1:3] = values["events"][2:0:-1]


def cut_out(values: dict[str, Any]) -> None:
    del values["events"][1]


def cut_at_the_end(values: dict[str, Any]) -> None:
    del values["events"][-1]


def cut_at_the_start(values: dict[str, Any]) -> None:
    del values["events"][0]


def doubled(values: dict[str, Any]) -> None:
    values["events"].insert(1, values["events"][1])


def last_changed(values: dict[str, Any]) -> None:
    values["events"][-1]["by_level"] = [[0, 0.001, 1]]


def facts_changed(values: dict[str, Any]) -> None:
    values["levels"]["0"] = 10_000_000


def head_removed(values: dict[str, Any]) -> None:
    del values["head"]


def links_removed(values: dict[str, Any]) -> None:
    for fields in values["events"]:
        del fields["previous"]


@pytest.mark.parametrize(
    "tamper",
    [changed, swapped, cut_out, cut_at_the_end, cut_at_the_start, doubled, last_changed,
     facts_changed, head_removed, links_removed],
)  # fmt: skip
def test_a_ledger_that_was_tampered_with_is_refused_in_one_line(
    tamper: Callable[[dict[str, Any]], None], path: Path
) -> None:
    saved(path, 4)
    values = json.loads(path.read_text())
    tamper(values)
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match="is not a ledger") as caught:
        Ledger.load(path)
    assert "\n" not in str(caught.value)


def test_spelling_is_not_tampering(path: Path) -> None:
    ledger = saved(path, 3)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2, sort_keys=True))
    again = Ledger.load(path)
    assert again == ledger and again.head == ledger.head
    again.append(event(4))
    again.save(path)
    assert Ledger.load(path) == make_ledger(4)


def test_files_without_a_chain_can_still_be_read_and_go_on_with_one(path: Path) -> None:
    values = make_ledger(2).to_json()
    events = [{k: v for k, v in e.items() if k != "previous"} for e in values["events"]]
    path.write_text(json.dumps({**values, "schema": 1}))
    with pytest.raises(RunError, match="schema was changed"):
        Ledger.load(path)
    del values["head"]
    path.write_text(json.dumps({**values, "schema": 1, "events": events}))
    old = Ledger.load(path)
    assert old.events == make_ledger(2).events
    old.append(event(3))
    old.save(path)
    assert json.loads(path.read_text())["schema"] == 2
    assert Ledger.load(path) == make_ledger(3)


# -- appending -------------------------------------------------------------------------------------


def test_appending_writes_what_writing_at_once_does(path: Path, tmp_path: Path) -> None:
    ledger = saved(path, 0)
    for number in range(1, 6):
        ledger.append(event(number))
        if number != 3:
            ledger.save(path)
        at_once = tmp_path / f"at-once-{number}.json"
        make_ledger(number).save(at_once)
        if number != 3:
            assert path.read_bytes() == at_once.read_bytes()
    assert sorted(p.name for p in tmp_path.glob(".*")) == [], "no note is left behind"


def test_the_cost_of_an_append_does_not_grow_with_the_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    real = os.pwrite

    def counted(handle: int, data: bytes, at: int) -> int:
        written.append(len(data))
        return real(handle, data, at)

    for size in (2, 2000):
        ledger = saved(path.with_name(f"{size}.json"), size)
        monkeypatch.setattr(os, "pwrite", counted)
        ledger.append(event(7))
        ledger.save(path.with_name(f"{size}.json"))
        monkeypatch.undo()
    assert len(written) == 4
    assert max(written) < 2000


def test_a_ledger_read_back_is_continued_in_place(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(path, 50)
    again = Ledger.load(path)
    again.append(event(51))
    monkeypatch.setattr(chain, "replace_file", None)
    again.save(path)
    assert Ledger.load(path) == make_ledger(51)


def test_what_is_on_disk_is_never_forgotten(path: Path) -> None:
    """A run that goes on from a checkpoint repeats its rounds: those recorded already stay."""
    saved(path, 5)
    resumed = make_ledger(2)
    resumed.save(path)
    for number in range(3, 8):
        assert len(Ledger.load(path)) == max(5, number - 1)
        resumed.append(event(number))
        resumed.save(path)
    assert Ledger.load(path) == make_ledger(7)


def test_two_histories_of_one_run_are_refused(path: Path) -> None:
    saved(path, 5)
    other = make_ledger(3)
    other.append(event(99))
    with pytest.raises(RunError, match="other releases of this run"):
        other.save(path)
    assert Ledger.load(path) == make_ledger(5)


def test_a_change_by_somebody_else_is_noticed(path: Path) -> None:
    ledger = saved(path, 3)
    path.write_text("damaged")
    ledger.append(event(4))
    ledger.save(path)
    assert Ledger.load(path) == make_ledger(4)


# -- killed ----------------------------------------------------------------------------------------

CALLS = ("open", "write", "pwrite", "fsync", "replace", "unlink", "chmod")


def in_a_child_killed_at(call: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that kills itself with SIGKILL at its I/O call number `call`.

    A write gets half of its bytes out first. Returns whether the process came that far.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def dying(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    if name in ("write", "pwrite"):
                        real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return wrapped

        for name in CALLS:
            setattr(os, name, dying(name))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("start", [0, 2])
def test_killed_at_any_call_the_ledger_knows_of_every_release(start: int, tmp_path: Path) -> None:
    """Ledger first, release second: at no point is the second ahead of the first."""
    call = 0
    while True:
        call += 1
        folder = tmp_path / str(call)
        folder.mkdir()
        path, released = folder / "ledger.json", folder / "released"
        if start:
            saved(path, start)
        released.write_bytes(b"x" * start)

        def work(path: Path = path, released: Path = released) -> None:
            ledger = Ledger.load(path) if start else make_ledger(0)
            ledger.save(path)
            for number in range(start + 1, start + 4):
                ledger.append(event(number))
                ledger.save(path)
                with released.open("ab", buffering=0) as file:
                    file.write(b"x")

        killed = in_a_child_killed_at(call, work)
        count = len(released.read_bytes())
        if count or start:
            found = Ledger.load(path)
            assert found.events[:count] == make_ledger(count).events
            assert count <= len(found) <= count + 1
            spent = epsilon(make_ledger(count), 1e-3) if count else 0.0
            assert epsilon(found, 1e-3) >= spent
            whole = make_ledger(count)
            whole.save(path)
            whole.append(event(count + 1))
            whole.save(path)
            assert Ledger.load(path) == make_ledger(count + 1)
            assert [p.name for p in folder.glob(".ledger.json.append")] == []
        if not killed:
            break
    assert call > 20
    assert len(Ledger.load(path)) == start + 3 or count == start + 3


def test_a_torn_append_without_its_note_is_refused(path: Path) -> None:
    saved(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(RunError, match="is not a ledger"):
        Ledger.load(path)


def test_a_note_of_another_time_completes_nothing(path: Path) -> None:
    """An old note must not turn a damaged file into a whole, shorter ledger."""
    ledger = saved(path, 2)
    size = path.stat().st_size
    at = size - len(chain.closing(ledger.head))
    other = path.with_name("other.json")
    saved(other, 3)
    note = {"at": at, "size": size, "text": other.read_bytes()[at:].decode()}
    saved(path, 9)
    chain.Draft.path_of(path).write_text(json.dumps(note))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(RunError, match="is not a ledger"):
        Ledger.load(path)


# -- merging ---------------------------------------------------------------------------------------


def gateway(noise: float, rounds: int, rate: float = 0.1, **fields: Any) -> Ledger:
    found = Ledger(levels={0: 100}, deltas={"device": 1e-3}, **fields)
    found.append(NonPrivateRelease(purpose="sums before noise", observer="server"))
    for _ in range(rounds):
        found.append(GaussianEvent(
            noise_multiplier=noise, sampling="poisson", by_level=((0, rate, 1),)
        ))
    return found


def test_disjoint_gateways_cost_as_much_as_the_dearest() -> None:
    quiet, loud = gateway(2.0, 30), gateway(1.0, 10, rate=0.2)
    both = Ledger.merge([quiet, loud], devices="disjoint")
    alone = [epsilon(ledger, 1e-3) for ledger in (quiet, loud)]
    assert epsilon(both, 1e-3) == max(alone)
    assert epsilon(both, 1e-3, observer="server") == float("inf")
    assert both.levels == {0: 200} and both.deltas == {"device": 1e-3}
    assert Ledger.from_json(json.loads(json.dumps(both.to_json()))) == both


def test_overlapping_gateways_compose() -> None:
    quiet, loud = gateway(2.0, 30), gateway(1.0, 10, rate=0.2)
    both = Ledger.merge([quiet, loud], devices="overlapping")
    assert epsilon(both, 1e-3) == pytest.approx(epsilon([*quiet, *loud], 1e-3), rel=1e-9)
    assert epsilon(both, 1e-3) > epsilon(Ledger.merge([quiet, loud], devices="disjoint"), 1e-3)


def test_the_same_purpose_of_two_gateways_is_two_releases() -> None:
    """One ledger's event for `server` must not stand in for another's for `release`."""
    first = Ledger([GaussianEvent(noise_multiplier=1.0, purpose="p")], deltas={"device": 1e-3})
    twice = Ledger.merge([first, first], devices="overlapping")
    assert epsilon(twice, 1e-3) == epsilon(GaussianEvent(noise_multiplier=1.0, count=2), 1e-3)


def test_ledgers_of_different_kinds_are_not_merged() -> None:
    example = Ledger([GaussianEvent(noise_multiplier=1.0, unit="example")])
    with pytest.raises(ValueError, match="protects examples against release"):
        Ledger.merge([gateway(1.0, 2), example], devices="disjoint")
    with pytest.raises(ValueError, match="devices='some'"):
        Ledger.merge([gateway(1.0, 2)], devices="some")  # type: ignore[arg-type]
    merged = Ledger.merge([gateway(1.0, 2), gateway(1.0, 3)], devices="disjoint")
    with pytest.raises(ValueError, match="merged already"):
        Ledger.merge([merged, merged], devices="disjoint")


def test_reproducible_noise_at_one_gateway_marks_all() -> None:
    seeded = gateway(1.0, 2, claims={"noise": "reproducible noise: simulation only"})
    merged = Ledger.merge([gateway(1.0, 2), seeded], devices="disjoint")
    assert "reproducible" in merged.claims["noise"]
