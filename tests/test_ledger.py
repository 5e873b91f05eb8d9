"""Laws of events and of the ledger: what is written comes back, what is impossible is refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.client.errors import RunError
from sottovoce.privacy.accounting.events import (
    Event,
    GaussianEvent,
    NonPrivateRelease,
    RandomisedReport,
    event_from_json,
    event_to_json,
)
from sottovoce.privacy.accounting.ledger import Ledger

units = st.sampled_from(["device", "example"])
observers = st.sampled_from(["release", "server", "fleet"])
rounds = st.none() | st.integers(0, 10**6)
noises = st.floats(0, 1e6)
rates = st.floats(0, 1)
counts = st.integers(0, 10**9)
levels = st.dictionaries(st.integers(0, 15), st.tuples(rates, counts), max_size=5)


@st.composite
def gaussians(draw: st.DrawFn) -> GaussianEvent:
    by_level = draw(st.none() | levels)
    relation = draw(st.sampled_from(["add_remove", "zero_out", "replace_one"]))
    kinds = ["poisson", "fixed_size"] if relation == "replace_one" else ["poisson"]
    plain = {"sampling_rate": draw(rates), "count": draw(counts)}
    listed = {"by_level": [(lv, rate, n) for lv, (rate, n) in (by_level or {}).items()]}
    return GaussianEvent(
        noise_multiplier=draw(noises),
        sampling=draw(st.sampled_from(kinds)),
        unit=draw(units),
        relation=relation,
        observer=draw(observers),
        purpose=draw(st.text(max_size=20)),
        round=draw(rounds),
        group=draw(st.none() | st.text(max_size=3)),
        **(plain if by_level is None else listed),
    )


exposures = st.builds(
    NonPrivateRelease, purpose=st.text(max_size=20), unit=units, observer=observers, round=rounds
)
reports = st.builds(
    RandomisedReport, keep=rates, options=st.integers(2, 20), count=counts, unit=units,
    relation=st.sampled_from(["zero_out", "replace_one"]), observer=observers, round=rounds,
)
ledgers = st.builds(
    Ledger,
    st.lists(gaussians() | exposures | reports, max_size=6),
    levels=st.dictionaries(st.integers(0, 15), st.integers(0, 10**7)),
    deltas=st.dictionaries(units, st.floats(1e-12, 0.1)),
    claims=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5)),
)


@given(gaussians() | exposures | reports)
def test_an_event_survives_json(event: Event) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event), allow_nan=False))) == event


@given(ledgers)
def test_a_ledger_survives_json(ledger: Ledger) -> None:
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json(), allow_nan=False)))
    assert again == ledger
    assert again.events == ledger.events


def make_ledger() -> Ledger:
    ledger = Ledger(levels={0: 10, 3: 2}, deltas={"device": 1e-7}, claims={"noise": "os entropy"})
    ledger.append(NonPrivateRelease(purpose="sums", observer="server"))
    ledger.append(
        GaussianEvent(
            noise_multiplier=1.1, sampling="poisson", by_level=((0, 0.01, 1), (3, 0.2, 1)), round=1
        )
    )
    return ledger


def test_a_ledger_survives_its_file(tmp_path: Path) -> None:
    ledger = make_ledger()
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == ledger
    ledger.append(GaussianEvent(noise_multiplier=1.0))
    assert Ledger.load(tmp_path / "ledger.json") != ledger
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json") == ledger
    assert os.listdir(tmp_path) == ["ledger.json"], "nothing else is left behind"


def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.json"
    ledger = make_ledger()
    ledger.save(path)
    ledger.append(GaussianEvent(noise_multiplier=1.0))

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        ledger.save(path)
    monkeypatch.undo()
    assert Ledger.load(path) == make_ledger()
    assert os.listdir(tmp_path) == ["ledger.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '{"schema": 99}', '{"schema": 1}',
     '{"schema": 1, "levels": {}, "deltas": {}, "claims": {}, "events": [{"type": "laplace"}]}',
     '{"schema": 1, "levels": {}, "deltas": {}, "claims": {}, "events": [{"type": "gaussian"}]}',
     '{"schema": 1, "levels": {}, "deltas": {}, "claims": {}, "events": [7]}',
     '{"schema": 1, "levels": {}, "deltas": {}, "claims": {}, "events": '
     '[{"type": "gaussian", "noise_multiplier": -1}]}'],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(RunError, match="ledger") as caught:
        Ledger.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    make_ledger().save(path)
    whole = path.read_text()
    for length in range(0, len(whole) - 1, 7):
        path.write_text(whole[:length])
        with pytest.raises(RunError):
            Ledger.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no ledger at .*nowhere"):
        Ledger.load(tmp_path / "nowhere" / "ledger.json")


def test_a_ledger_only_grows() -> None:
    ledger = make_ledger()
    events = ledger.events
    assert isinstance(events, tuple)
    for event in ledger:
        ledger.append(event)
    assert ledger.events == events * 2
    assert len(ledger) == 2 * len(events)
    assert ledger, "an empty or full ledger is never mistaken for none"
    assert Ledger()


def test_a_ledger_knows_whom_it_is_about() -> None:
    ledger = make_ledger()
    ledger.append(GaussianEvent(noise_multiplier=1.0, unit="example", observer="fleet"))
    assert ledger.units == ("device", "example")
    assert ledger.observers == ("release", "server", "fleet")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
        ({"sampling": "poisson", "sampling_rate": 1.1}, "sampling_rate=1.1"),
        ({"sampling": "poisson", "sampling_rate": -0.1}, "sampling_rate=-0.1"),
        ({"sampling": "poisson", "sampling_rate": math.nan}, "sampling_rate=nan"),
        ({"sampling": "shuffle"}, "sampling='shuffle'"),
        ({"sampling_rate": 0.5}, "must be 1 with sampling=none"),
        ({"sampling": "fixed_size", "sampling_rate": 0.5}, "replace_one"),
        ({"count": -1}, "count=-1"),
        ({"count": 1.5}, "count=1.5"),
        ({"unit": "person"}, "unit='person'"),
        ({"relation": "neighbours"}, "relation='neighbours'"),
        ({"observer": "me"}, "observer='me'"),
        ({"sampling": "poisson", "by_level": ((0, 2.0, 1),)}, "at level 0"),
        ({"sampling": "poisson", "by_level": ((0, 0.1, -1),)}, "count=-1 at level 0"),
        ({"sampling": "poisson", "by_level": ((0, 0.1, 1), (0, 0.2, 1))}, "twice"),
        ({"sampling": "poisson", "by_level": ((0, 0.1, 1),), "count": 2}, "by_level"),
    ],
)
def test_impossible_events_are_refused_in_one_line(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        GaussianEvent(**({"noise_multiplier": 1.0} | fields))  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
