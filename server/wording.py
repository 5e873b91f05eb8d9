"""How figures are worded wherever a person reads them: progress, tables, report, statement.

An epsilon is rounded up, never down: a claim may not look better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sottovoce.strategies.levels import MAX_LEVEL, level_size, levels_of_row

HELD_OUT_EXAMPLES = "_held_out_examples"
FRACTIONS = ("accuracy", "slot_f1", "exact_match", "top1_accuracy", "top3_accuracy")
METRICS = (*FRACTIONS, "perplexity", "loss")
OF_DEVICES = {
    "_median": "median device",
    "_p10": "reached by 90 % of devices",
    "_worst_decile": "worst tenth of devices",
}
LABELS = {
    "slot_f1": "slot F1",
    "top1_accuracy": "top-1 accuracy",
    "top3_accuracy": "top-3 accuracy",
    "train_loss": "training loss",
}


def number(value: Any) -> float | None:
    """`value` as a float, or None where it is missing, not a number or NaN."""
    if value is None or isinstance(value, bool):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(result) else result


def label(metric: str, task: str = "") -> str:
    """A metric's name for people: `slot_f1` is "slot F1"."""
    for suffix, words_of in OF_DEVICES.items():
        if metric.endswith(suffix):
            return f"{label(metric.removesuffix(suffix), task)}, {words_of}"
    name = metric.removesuffix(HELD_OUT_EXAMPLES)
    if name == "accuracy" and task == "intent_slots":
        return "intent accuracy"
    return LABELS.get(name, name.replace("_", " "))


def metric_text(metric: str, value: Any) -> str:
    """A metric's value with the digits that mean something."""
    figure = number(value)
    if figure is None:
        return "–"
    if math.isinf(figure):
        return "∞"
    if metric.startswith("perplexity"):
        return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.1f}"
    return f"{figure:.3f}"


def epsilon_text(value: Any) -> str:
    """An epsilon, rounded up to two decimals (below 0.1: to two digits)."""
    figure = number(value)
    if figure is None:
        return "–"
    if math.isinf(figure):
        return "∞"
    if figure <= 0:
        return "0"
    digits = 2 if figure >= 0.1 else 1 - math.floor(math.log10(figure))
    scale = 10**digits
    return f"{math.ceil(figure * scale - 1e-6) / scale:.{digits}f}"


def projection_text(said: Any) -> str | None:
    """What no reader of an epsilon may miss. `said`: the ledger's claim `projection`, None or
    False where a run is what it says.
    """
    if not said:
        return None
    whose = "a larger cohort than was simulated"
    if isinstance(said, dict):
        whose = (f"cohorts of {count_text(said['noise_cohort_size'])} devices, of which "
                 f"{count_text(said['cohort_size'])} were simulated")
    return (f"projection: noise and epsilon are those of {whose}; this run itself does not have "
            "this ε")


def small_text(value: Any) -> str:
    """A delta or a rate: two digits, powers of ten as in `1e-7`."""
    figure = number(value)
    if figure is None:
        return "–"
    if figure == 0 or figure >= 1e-3:
        return f"{figure:.2g}" if figure < 1 else f"{figure:g}"
    mantissa, exponent = f"{figure:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def count_text(value: Any) -> str:
    """A count with thousands separated."""
    figure = number(value)
    return "–" if figure is None else f"{round(figure):,}"


def duration_text(seconds: Any) -> str:
    """Seconds as a person says them: `0.8 s`, `2 min 05 s`, `3 h 10 min`."""
    figure = number(seconds)
    if figure is None:
        return "–"
    if figure < 60:
        return f"{figure:.1f} s"
    minutes, rest = divmod(round(figure), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def level_text(level: int) -> str:
    """The examples that a device at activity level `level` has: `4–7`; of a row of devices that
    moved between levels, `4–7 to 16–31`.
    """
    if level > MAX_LEVEL:
        return " to ".join(level_text(end) for end in levels_of_row(level))
    low = level_size(level)
    if level >= MAX_LEVEL:
        return f"{low:,}+"
    high = level_size(level + 1) - 1
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def words(name: Any) -> str:
    """A configured name as words: `intent_slots` is "intent slots"."""
    return "–" if name is None else str(name).replace("_", " ")


def plain_text(value: Any) -> str:
    """Any plain data on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{words(k)} {plain_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain_text(v) for v in value)
    return str(value)


def evaluated_on(summary: Mapping[str, Any]) -> str:
    """What a run's metrics were measured on, in words."""
    population = summary.get("population") or {}
    return str(population.get("evaluated_on", "held-out devices"))
