"""Laws of the live display and of the table that a run prints at its end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sottovoce.server.progress import Progress, final_table, progress_text

RECORDS: list[dict[str, Any]] = [
    {"round": 0, "accuracy": 0.03},
    {"round": 1, "train_loss": 3.5, "seconds": 1.25, "epsilon_device": 0.711},
    {"round": 2, "train_loss": 2.5, "seconds": 1.5, "epsilon_device": 0.92, "accuracy": 0.5},
    {"round": 3, "train_loss": 2.0, "seconds": 1.0, "epsilon_device": 1.1},
]
SUMMARY: dict[str, Any] = {
    "status": "budget_spent", "rounds": 3, "headline": "accuracy", "task": "intent_slots",
    "metrics": {"loss": 1.9, "accuracy": 0.5, "slot_f1": 0.4}, "seconds": 75.2,
    "epsilon": {
        "device": {"epsilon": 1.1, "delta": 1e-7, "by_level": [
            {"level": 3, "devices": 900_000, "sampling_rate": 1e-4, "epsilon": 0.31},
            {"level": 10, "devices": 1_200, "sampling_rate": 0.012, "epsilon": 1.1}]},
        "example": {"epsilon": 7.2, "delta": 1e-5},
    },
    "noise": "os entropy", "warnings": [],
}


def shown(terminal: bool, enabled: bool = True, records: list[dict[str, Any]] = RECORDS) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    with Progress(3, 0, "accuracy", enabled, console) as progress:
        progress.message("[noise] found")
        for record in records:
            progress.update(record)
    return out.getvalue()


def printed(summary: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(final_table(summary, Path("runs/a/report.html")))
    return out.getvalue()


def test_a_pipe_gets_one_plain_line_per_evaluation_and_for_the_last_round() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines == [
        "[noise] found",
        "round 0/3  accuracy 0.030",
        "round 2/3  loss 2.500  accuracy 0.500  ε 0.92  1.5 s/round",
        "round 3/3  loss 2.000  ε 1.10  1.0 s/round",
    ]


def test_a_terminal_gets_a_bar_that_ends_complete_with_the_latest_figures() -> None:
    text = shown(terminal=True)
    last = [line for line in text.replace("\r", "\n").splitlines() if "3/3" in line][-1]
    assert "loss 2.000  accuracy 0.500  ε 1.10  1.0 s/round" in last
    assert "[noise] found" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_disabled_display_is_silent(terminal: bool) -> None:
    assert shown(terminal, enabled=False) == ""


def test_an_error_passes_through_the_display() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt), Progress(3, 1, "accuracy", True, console):
        raise KeyboardInterrupt


def test_units_are_named_where_both_are_protected() -> None:
    record = {"epsilon_device": 1.0, "epsilon_example": float("inf"), "perplexity": 143.26}
    assert progress_text(record, "perplexity") == (
        "perplexity 143.3  ε 1.00 (device)  ε ∞ (example)")


def test_the_final_table_states_utility_every_level_and_where_the_report_is() -> None:
    text = printed(SUMMARY)
    for found in ("budget spent, 3 rounds, 1 min 15 s", "intent accuracy", "slot F1",
                  "device-level ε = 1.10 at δ = 1e-7 (observer: release)",
                  "example-level ε = 7.20 at δ = 1e-5 (observer: fleet)",
                  "1,024–2,047    1,200", "900,000", "runs/a/report.html"):
        assert found in text, found
    assert text.index("intent accuracy") < text.index("slot F1") < text.index("loss")


def test_the_final_table_fits_a_narrow_terminal() -> None:
    both = {**SUMMARY, "epsilon": {u: SUMMARY["epsilon"]["device"] for u in ("device", "example")}}
    assert all(len(line.rstrip()) <= 80 for line in printed(both).splitlines())
    assert "900,000" in printed(both) and "…" not in printed(both)


def test_the_final_table_says_no_privacy_and_reproducible_noise() -> None:
    text = printed({"status": "finished", "noise": "reproducible noise: simulation only",
                    "warnings": ["delta=1e-3 must be below 1/devices"]})
    assert "no privacy guarantee" in text
    assert "reproducible noise: simulation only" in text and "delta=1e-3" in text
