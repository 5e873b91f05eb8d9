"""`MODEL_CARD.md`: what goes along with `model.safetensors` wherever the model is handed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sottovoce.server.account_tables import as_json
from sottovoce.server.wording import METRICS, count_text, evaluated_on, label, metric_text, words


def model_card_text(summary: Mapping[str, Any], statement: Mapping[str, Any], text: str) -> str:
    """The card as Markdown. `statement` and `text`: the facts of `disclosure`, and its paragraph.

    Metrics stand in it because a reader needs them; they are no part of what epsilon covers.
    """
    task = str(summary["task"])
    facts = [
        ("Task", words(task)),
        ("Model", f"{words(summary['model'])}, {count_text(summary['parameters'])} trained "
         "parameters"),
        ("Rounds", count_text(summary["rounds"])),
        ("Devices", count_text(summary["population"].get("devices"))),
        ("Data", str(summary["population"].get("source", "–"))),
        ("Vocabulary", str(summary["vocabulary"].get("description", "–"))),
    ]
    metrics = [(label(name, task), metric_text(name, value))
               for name, value in summary["metrics"].items() if name in METRICS]
    warnings = "".join(f"> **Warning.** {line}\n>\n" for line in summary["warnings"])
    return "\n".join([
        f"# {words(task).capitalize()} model trained with Sottovoce",
        "",
        _table(facts),
        *(["", warnings.rstrip(">\n")] if warnings else []),
        "",
        "## Privacy",
        "",
        text,
        "",
        f"## On {evaluated_on(summary)}",
        "",
        _table(metrics) if metrics else "Not evaluated.",
        "",
        "## The statement, for programs",
        "",
        "```json",
        as_json(statement, indent=1),
        "```",
        "",
    ])


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
