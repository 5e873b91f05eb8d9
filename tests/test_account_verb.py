"""`sottovoce account`: the JSON that programs read, the tables, and one line for bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sottovoce.client.errors import ConfigError, RunError, SottovoceError
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import GaussianEvent, NonPrivateRelease
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.correlated import CorrelatedMechanism
from sottovoce.privacy.mechanisms.optimised import make_factorisation
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.server.account import AccountConfig, account, run_account
from sottovoce.server.disclosure import disclosure

PLAN = {"noise_multiplier": 1.0, "sampling_rate": 0.01, "steps": 1000, "delta": 1e-5}
RATES = {0: 0.001, 3: 0.01, 6: 0.02}


def make_run(folder: Path, rounds: int = 10) -> Path:
    ledger = Ledger(levels={0: 900, 3: 90, 6: 10}, deltas={"device": 1e-6, "example": 1e-5})
    ledger.append(NonPrivateRelease(purpose="sums before central noise", observer="server"))
    ledger.append(GaussianEvent(noise_multiplier=10.0, purpose="activity histogram"))
    for at in range(rounds):
        entries = tuple((level, rate, 1) for level, rate in RATES.items())
        ledger.append(
            GaussianEvent(
                noise_multiplier=0.9, sampling="poisson", by_level=entries, round=at, purpose="sum"
            )
        )
    ledger.append(
        GaussianEvent(
            noise_multiplier=1.2,
            sampling="poisson",
            by_level=((0, 1.0, 2), (3, 0.5, 4)),
            unit="example",
            observer="server",
            purpose="local steps",
        )
    )
    ledger.save(folder / "ledger.json")
    return folder


def printed(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    assert run_account(AccountConfig(**options, format="json")) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    found: dict[str, Any] = json.loads(lines[0], parse_constant=pytest.fail)
    return found


def test_a_plan_is_printed_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    facts = printed(capsys, **PLAN)
    assert facts["epsilon"] == pytest.approx(1.8282, rel=1e-3)
    assert facts | PLAN == facts
    assert facts["accountant"] == "pld"
    assert (facts["unit"], facts["observer"]) == ("device", "release")
    assert set(facts["by_accountant"]) == {"pld", "rdp", "prv"}
    assert facts["by_accountant"]["pld"] == facts["epsilon"]
    assert facts["by_accountant"]["rdp"] == pytest.approx(2.1014, rel=1e-3)
    assert facts["by_accountant"]["prv"] == pytest.approx(1.8382, rel=1e-2)
    assert "by_level" not in facts


def test_the_accountant_asked_for_leads() -> None:
    facts = account(PLAN | {"accountant": "rdp", "unit": "example"})
    assert facts["epsilon"] == facts["by_accountant"]["rdp"]
    assert (facts["accountant"], facts["unit"]) == ("rdp", "example")


def test_a_target_epsilon_calibrates_the_noise() -> None:
    facts = account({"target_epsilon": 8, "sampling_rate": 0.01, "steps": 1000, "delta": 1e-5})
    assert 7.98 <= facts["epsilon"] <= 8.0
    event = GaussianEvent(
        noise_multiplier=facts["noise_multiplier"],
        sampling="poisson",
        sampling_rate=0.01,
        count=1000,
    )
    assert epsilon(event, 1e-5) == facts["epsilon"]


def test_no_noise_is_infinite_and_still_json(capsys: pytest.CaptureFixture[str]) -> None:
    facts = printed(capsys, **(PLAN | {"noise_multiplier": 0.0}))
    assert float(facts["epsilon"]) == float("inf")
    assert facts["by_accountant"]["prv"] is None


def test_a_run_is_read_from_its_ledger_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = printed(capsys, run=str(make_run(tmp_path)))
    ledger = Ledger.load(tmp_path / "ledger.json")
    assert facts["epsilon"] == epsilon(ledger, 1e-6, unit="device", observer="release")
    assert (facts["unit"], facts["observer"], facts["delta"]) == ("device", "release", 1e-6)
    assert (facts["level"], facts["noise_multiplier"]) == (6, 0.9)
    assert (facts["sampling_rate"], facts["steps"]) == (0.02, 10)
    rows = facts["by_level"]
    assert all(set(row) == {"level", "devices", "sampling_rate", "epsilon"} for row in rows)
    assert [(row["level"], row["devices"]) for row in rows] == [(0, 900), (3, 90), (6, 10)]
    assert [row["sampling_rate"] for row in rows] == list(RATES.values())
    assert rows[-1]["epsilon"] == facts["epsilon"]
    claims = {(row["unit"], row["observer"]): row["epsilon"] for row in facts["claims"]}
    assert len(claims) == 6
    assert claims["device", "release"] == facts["epsilon"]
    assert claims["device", "server"] == claims["example", "fleet"] == "inf"
    assert claims["example", "release"] == claims["example", "server"]


def test_another_claim_of_a_run_can_lead(tmp_path: Path) -> None:
    run = str(make_run(tmp_path))
    example = account({"run": run, "unit": "example", "observer": "release"})
    assert (example["unit"], example["observer"], example["delta"]) == ("example", "release", 1e-5)
    assert example["level"] == 0 and example["steps"] == 2
    stricter = account({"run": run, "delta": 1e-8})
    assert stricter["epsilon"] > account({"run": run})["epsilon"]
    assert account({"run": str(tmp_path / "ledger.json")})["epsilon"] == account({"run": run})[
        "epsilon"
    ]


def test_a_run_without_events_promises_nothing(tmp_path: Path) -> None:
    Ledger().save(tmp_path / "ledger.json")
    facts = account({"run": str(tmp_path)})
    assert facts["epsilon"] == float("inf")
    assert run_account(AccountConfig(run=str(tmp_path))) == 0


def test_a_run_of_no_rounds_has_spent_nothing_yet(tmp_path: Path) -> None:
    """As its summary says: what is promised was not begun."""
    ledger = Ledger(levels={0: 90}, deltas={"device": 1e-6, "example": 1e-5})
    ledger.append(NonPrivateRelease(purpose="sums before central noise", observer="server"))
    ledger.save(tmp_path / "ledger.json")
    facts = account({"run": str(tmp_path), "unit": "device", "observer": "release"})
    assert (facts["epsilon"], facts["steps"], facts["by_level"]) == (0.0, 0, [])
    table = {(row["unit"], row["observer"]): row["epsilon"] for row in facts["claims"]}
    assert table["device", "release"] == table["example", "server"] == 0.0
    assert table["device", "server"] == table["device", "fleet"] == float("inf")


def test_a_delta_that_would_publish_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1/devices=0.001"):
        account({"run": str(make_run(tmp_path)), "delta": 0.01})


def test_a_statement_is_a_paragraph_and_its_facts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_account(AccountConfig(run=str(make_run(tmp_path)), format="statement")) == 0
    paragraph, facts = capsys.readouterr().out.split("\n\n", 1)
    assert "\n" not in paragraph
    found = json.loads(facts, parse_constant=pytest.fail)
    ledger = Ledger.load(tmp_path / "ledger.json")
    device, example = found["guarantees"]
    assert device["epsilon"] == epsilon(ledger, 1e-6, unit="device", observer="release")
    assert (device["observer"], example["observer"]) == ("release", "server")
    assert device["trust"].startswith("central") and example["trust"].startswith("distributed")
    assert found["ledger"]["head"] == ledger.head
    assert len(found["table"]) == 6
    kinds = {kind["purpose"]: kind for kind in device["mechanisms"]}
    assert kinds["sum"]["events"] == 10 and kinds["sum"]["sampling_rate"] == [0.001, 0.02]
    assert kinds["activity histogram"]["sampling"] == ["none"]
    for words in ("Device-level (ε = ", "Example-level (ε = ", "add/remove", "worst of 3 activity",
                  "No guarantee (epsilon is infinite) holds for devices against fleet",
                  "sums before central noise, which server sees without noise", "Tuning: ",
                  "Activity levels, the powers of two that devices report, are taken as public",
                  "dp-accounting", "below 1/devices", "Poisson-sampled as run",
                  "busiest device: the ledger and the example-level epsilon tell them exactly"):
        assert words in paragraph, words


def test_a_statement_of_one_unit_has_no_other_units_participations_to_disclose() -> None:
    entries = ((3, 0.25, 4), (5, 0.125, 4))
    example = GaussianEvent(
        noise_multiplier=1.0, sampling="poisson", by_level=entries, unit="example",
        observer="server",
    )
    device = replace(example, unit="device", observer="release")
    for events, told in (([example], False), ([device], False), ([device, example], True)):
        facts = disclosure(Ledger(events, deltas={event.unit: 1e-5 for event in events}))
        assert any("busiest device" in line for line in facts["not_covered"]) == told


def test_a_statement_of_correlated_noise_names_its_schedule(tmp_path: Path) -> None:
    schedule = Schedule(8, min_separation=3, max_participations=2)
    mechanism = CorrelatedMechanism(1.0, 2.0, make_factorisation("banded", schedule), schedule)
    ledger = Ledger(deltas={"device": 1e-5}, claims={"correlated_noise": mechanism.claims()})
    ledger.append(mechanism.event(None))
    ledger.append(replace(mechanism.event(None), count=0, round=2))
    ledger.save(tmp_path / "ledger.json")
    facts = account({"run": str(tmp_path)})
    assert (facts["noise_multiplier"], facts["steps"]) == (2.0, 2)
    text = account({"run": str(tmp_path), "format": "statement"})["paragraph"]
    for words in ("no device takes part more than 2 times, at least 3 rounds apart, in 8 rounds",
                  "levels, by which devices may be preferred, are taken as public"):
        assert words in text, words


def test_a_statement_of_nothing_promises_nothing(tmp_path: Path) -> None:
    Ledger().save(tmp_path / "ledger.json")
    facts = account({"run": str(tmp_path), "format": "statement"})
    assert "no differential privacy guarantee" in facts["paragraph"]
    assert facts["statement"]["guarantees"] == []


def test_tables_show_every_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_account(AccountConfig(run=str(make_run(tmp_path)))) == 0
    text = capsys.readouterr().out
    for words in ("device level", "add/remove", "infinite", "sampling rate", "dp-accounting"):
        assert words in text
    assert run_account(AccountConfig(**PLAN)) == 0
    assert "1.82824" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "sampling_rate, steps, delta missing"),
        ({"noise_multiplier": 1.0}, "sampling_rate, steps, delta missing"),
        ({"sampling_rate": 0.1, "steps": 3, "delta": 1e-5}, "noise_multiplier"),
        (PLAN | {"target_epsilon": 2.0}, "contradict"),
        (PLAN | {"delta": 0.0}, "delta=0.0"),
        (PLAN | {"delta": 1.0}, "delta=1.0"),
        (PLAN | {"sampling_rate": 1.5}, "sampling_rate=1.5"),
        (PLAN | {"steps": 0}, "steps=0"),
        (PLAN | {"steps": 2.5}, "steps=2.5"),
        (PLAN | {"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        (PLAN | {"noise_multiplier": float("nan")}, "noise_multiplier=nan"),
        (PLAN | {"accountant": "gdp"}, "accountant=gdp"),
        (PLAN | {"unit": "person"}, "unit=person"),
        (PLAN | {"observer": "server"}, "observer=server needs run="),
        (PLAN | {"format": "xml"}, "format=xml"),
        (PLAN | {"epsilom": 1}, "epsilom is no option"),
        (PLAN | {"run": "somewhere"}, "contradicts run=somewhere"),
        ({"target_epsilon": -1, "sampling_rate": 0.1, "steps": 3, "delta": 1e-5}, "epsilon=-1"),
        ({"target_epsilon": 1e-9, "sampling_rate": 1, "steps": 10**9, "delta": 1e-9}, "reached"),
    ],
)
def test_bad_input_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        account(options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no ledger"):
        account({"run": str(tmp_path)})
    (tmp_path / "ledger.json").write_text("half a led")
    with pytest.raises(SottovoceError, match="is not a ledger"):
        account({"run": str(tmp_path)})
    nameless = Ledger([GaussianEvent(noise_multiplier=1.0)])
    nameless.save(tmp_path / "ledger.json")
    with pytest.raises(ConfigError, match="no delta"):
        account({"run": str(tmp_path)})
