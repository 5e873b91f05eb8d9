"""The plot of the study `sampling`: the leading metric over rounds, a panel for each setting."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sottovoce.server.drawing import COLOURS, DOTTED, GREY, MARKERS
from sottovoce.server.plots import STYLE
from sottovoce.server.run_record import setting
from sottovoce.server.study import Result
from sottovoce.server.wording import label

TITLES = {
    "static": "Static: all examples throughout",
    "continual": "Continual: what people say now",
}


def picture(results: Sequence[Result]) -> bytes:
    """A PNG: lines are means over seeds, bands one standard deviation, dotted lines new periods."""
    run = results[0].run
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.2), layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(TITLES), sharey=True)
        for axes, (kind, title) in zip(panels, TITLES.items(), strict=True):
            _draw(axes, [r for r in results if r.arm.name.startswith(f"{kind}-")])
            axes.set_title(title, loc="left", fontsize=12)
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        panels[0].set_ylabel(label(run.headline, run.task))
        panels[0].legend()
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=144)
    return out.getvalue()


def _draw(axes: Axes, results: Sequence[Result]) -> None:
    names = list(dict.fromkeys(result.arm.name for result in results))
    for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        runs = [result.run for result in results if result.arm.name == name]
        rounds = runs[0].series(runs[0].headline)[0]
        by_round = [
            [dict(zip(*run.series(run.headline), strict=True)).get(n) for run in runs]
            for n in rounds
        ]
        known = [[v for v in values if v is not None] for values in by_round]
        means = [statistics.fmean(values) for values in known]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in known]
        low = [m - s for m, s in zip(means, spreads, strict=True)]
        high = [m + s for m, s in zip(means, spreads, strict=True)]
        axes.plot(rounds, means, color=colour, marker=marker, label=name.split("-")[1])
        axes.fill_between(rounds, low, high, color=colour, alpha=0.12, linewidth=0)
    for number in _new_periods(results):
        axes.axvline(number - 0.5, color=GREY, linewidth=0.8, linestyle=DOTTED)


def _new_periods(results: Sequence[Result]) -> list[int]:
    """The first round of each period but the first; none in the static setting."""
    run = results[0].run
    if setting(run.config, "timeline.name") != "continual":
        return []
    periods = [(int(r["round"]), int(r.get("period", 0))) for r in run.metrics if r["round"] > 0]
    return [b for (_, p), (b, q) in zip(periods, periods[1:], strict=False) if q != p]
