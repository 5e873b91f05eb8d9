"""The cost of a run in words: the last line of `simulate`, and a section of the report."""

from __future__ import annotations

from typing import Any

from sottovoce.server.run_record import Record, RunRecord
from sottovoce.server.wording import (
    METRICS,
    count_text,
    duration_text,
    label,
    metric_text,
    number,
)

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
PART = "90 % of the final"


def bytes_text(value: Any) -> str:
    """Bytes in the decimal unit that fits: `48.2 kB`."""
    figure = number(value)
    if figure is None:
        return "–"
    unit = 0
    while figure >= 999.5 and unit < len(UNITS) - 1:
        figure, unit = figure / 1000, unit + 1
    return f"{figure:.0f} {UNITS[unit]}" if figure >= 100 or unit == 0 else (
        f"{figure:.3g} {UNITS[unit]}")


def cost_line(cost: Record) -> str:
    """The cost as one line for a terminal; empty where there is none."""
    if not cost.get("rounds"):
        return ""
    message, taken = cost["message"], cost["participations"]
    line = (
        f"for real: {bytes_text(message['down'])} down and {bytes_text(message['up'])} up a device "
        f"and round, {bytes_text(cost['down_bytes'] + cost['up_bytes'])} in all; a device is asked "
        f"{taken['mean']:.2g} times, the busiest {_times(taken['worst'])}"
    )
    reached = next((t for t in cost["targets"] if t["target"] == PART), None)
    if reached and reached["round"]:
        line += (f"; 90 % of the final metric after {reached['round']} rounds "
                 f"({bytes_text(reached['bytes'])})")
    return line


def cost_table(run: RunRecord) -> Record:
    """The report's section: {facts, classes, targets}, rows of text; empty where not recorded."""
    cost = run.summary.get("cost") or {}
    if not cost.get("rounds"):
        return {"facts": [], "columns": [], "classes": [], "targets": []}
    return {
        "facts": _facts(cost),
        "columns": ["Device class", "Share", "Computing, as simulated", "Computing, as measured",
                    "Network"],
        "classes": [_class_row(kind) for kind in cost["time"]["classes"]],
        "targets": [_target_row(run, target) for target in cost["targets"]],
    }


def _facts(cost: Record) -> list[tuple[str, str]]:
    message, taken, time = cost["message"], cost["participations"], cost["time"]
    expected = " (expected, not counted)" if cost["basis"] == "expected" else ""
    overhead = message["down"] + message["up"] - 2 * message["payload"]
    found = [
        ("A device and round", f"{bytes_text(message['down'])} down, {bytes_text(message['up'])} up"
         f", of which parameters {bytes_text(message['payload'])} each way and "
         f"{bytes_text(overhead)} around them; nothing is compressed"),
        ("A round", f"{cost['asked_a_round']:,.0f} devices asked, "
         f"{cost['answers_a_round']:,.0f} answers{expected}"),
        ("All rounds", f"{bytes_text(cost['down_bytes'])} down, "
         f"{bytes_text(cost['up_bytes'])} up{expected}"),
        ("A device", f"asked {taken['mean']:.2g} times on average, the busiest "
         f"{_times(taken['worst'])} times{expected}"),
        ("Work", f"{time['examples']:,.0f} examples a device and round, by public level sizes"),
    ]
    pace = number(time.get("measured_examples_per_second"))
    if pace:
        found.append(("Measured here", f"{count_text(pace)} examples a second and worker, whole "
                      f"rounds included: {duration_text(time['computing_s_as_measured'])} for a "
                      "device of that pace"))
    return found


def _class_row(kind: Record) -> list[str]:
    return [str(kind["class"]), f"{100 * kind['share']:.0f} %", _seconds(kind["computing_s"]),
            _seconds(kind["computing_s_as_measured"]), _seconds(kind["network_s"])]


def _target_row(run: RunRecord, target: Record) -> list[str]:
    name = label(run.headline, run.task)
    text = metric_text(run.headline if run.headline in METRICS else "loss", target["value"])
    if target["round"] is None:
        return [target["target"], f"{name} {text}", "not reached", "–"]
    return [target["target"], f"{name} {text}", f"{target['round']:,}",
            bytes_text(target["bytes"])]


def _seconds(value: Any) -> str:
    figure = number(value)
    if figure is None or figure >= 1:
        return duration_text(figure)
    return f"{figure:.2g} s"


def _times(value: Any) -> str:
    figure = number(value)
    if figure is None:
        return "–"
    return f"{figure:,.0f}" if figure == round(figure) else f"{figure:.2g}"
