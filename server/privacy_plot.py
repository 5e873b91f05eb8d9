"""The figure of the study `privacy`: utility, theory and practice over epsilon, in four panels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sottovoce.server.audited import Row
from sottovoce.server.drawing import COLOURS, DOTTED, GREY, MARKERS
from sottovoce.server.plots import STYLE
from sottovoce.server.wording import label

Value = Callable[[Row], float | None]
BY_CHANCE = 1 / math.log(2)  # mean exposure of a code that was never met, in bits


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG of `rows` (`privacy_study.table`): a line for each population, seeds as dots."""
    asked = list(dict.fromkeys(row["asked"] for row in rows))
    names = list(dict.fromkeys(row["population"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.6, 3.9), layout="constrained", facecolor="white")
        utility, theory, attack, extraction = figure.subplots(1, 4)
        for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
            mine = [row for row in rows if row["population"] == name]
            style = {"color": colour, "marker": marker}
            _line(utility, asked, mine, _utility, **style, label=_measure(mine[0]))
            _line(theory, asked, mine, lambda r: r["epsilon"], **style, label=f"{name}: theory")
            _line(theory, asked, mine, lambda r: r["epsilon_lower_bound"], **style,
                  linestyle=DOTTED, label=f"{name}: proved by attack")
            _line(attack, asked, mine, lambda r: r["auc"], **style, label=name)
            _band(attack, asked, mine, colour)
            _line(extraction, asked, mine, lambda r: r["exposure"], **style, label=name)
        attack.axhline(0.5, color=GREY, linewidth=0.9)
        extraction.axhline(BY_CHANCE, color=GREY, linewidth=0.9)
        known = [r["exposure_possible"] for r in rows if r["exposure_possible"] is not None]
        extraction.set_ylim(0, 1.05 * max(known, default=14))
        titles = ("Utility", "ε per " + rows[0]["unit"], "Membership: AUC, best attack",
                  "Extraction: exposure, bits")
        for axes, title in zip((utility, theory, attack, extraction), titles, strict=True):
            axes.set_title(title, loc="left", fontsize=12)
            axes.set_xticks(range(len(asked)), asked)
            axes.set_xlabel("ε asked for")
            axes.legend(fontsize=8)
        utility.set_ylim(0, 1.05)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=144)
    return out.getvalue()


def _line(
    axes: Axes, asked: Sequence[str], rows: Sequence[Row], value: Value, *, color: str, marker: str,
    label: str, linestyle: Any = "-",
) -> None:
    points = [(asked.index(row["asked"]), value(row)) for row in rows]
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return
    places = sorted({x for x, _ in known})
    means = [_mean([y for x, y in known if x == place]) for place in places]
    axes.plot(places, means, color=color, linestyle=linestyle, label=label)
    axes.plot(*zip(*known, strict=True), color=color, marker=marker, linestyle="none")


def _band(axes: Axes, asked: Sequence[str], rows: Sequence[Row], colour: str) -> None:
    for row in rows:
        if row["auc"] is not None:
            place = asked.index(row["asked"])
            axes.vlines(place, row["auc_low"], row["auc_high"], color=colour, alpha=0.4)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _utility(row: Row) -> float | None:
    """Utility on a scale of one axis: 1 / perplexity's bits where that is what is measured."""
    value: float | None = row["utility"]
    if value is None or not row["metric"].startswith("perplexity"):
        return value
    return 1 / max(1.0, math.log2(value)) if value > 0 else None


def _measure(row: Row) -> str:
    name = label(row["metric"], row["task"])
    what = "1 / log₂ perplexity" if row["metric"].startswith("perplexity") else name
    return f"{row['population']}: {what}"
