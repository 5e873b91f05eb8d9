"""The pictures of a run: utility, privacy spent, who took part, and how loud the noise was.

Every plot is drawn on a `Figure` of its own and returned as an inline SVG whose text stays text.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sottovoce.server import drawing
from sottovoce.server.run_record import RunRecord, read_run
from sottovoce.server.wording import HELD_OUT_EXAMPLES, evaluated_on, label, number

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sottovoce",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A8A8A",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}
WIDTH, HEIGHT = 6.4, 4.4
Draw = Callable[[Axes], None]


@dataclass(frozen=True)
class Plot:
    """A titled picture. `note`: what to read in it; `svg`: an inline SVG element."""

    title: str
    note: str
    svg: str


def plots(run: RunRecord) -> list[Plot]:
    """Every plot for which the run holds data, in reading order."""
    drawn = (_utility(run), _devices(run), _devices_by_level(run), _utility_against_epsilon(run),
             _budget(run), _participation(run), _clipping(run), _noise(run))
    return [plot for plot in drawn if plot is not None]


def picture(run_folder: Path) -> bytes:
    """A wide PNG of one run for a README: utility, epsilon and participation side by side."""
    run = read_run(run_folder)
    panels: list[tuple[str, Draw]] = []
    families = drawing.metric_families(run)
    if families:
        panels.append((f"Utility on {evaluated_on(run.summary)}",
                       partial(drawing.draw_metrics, run=run, metrics=families[0])))
    panels += [("Privacy spent", partial(drawing.draw_budget, run=run, unit=unit))
               for unit in drawing.protected_units(run)[:1]]
    if run.participations:
        panels.append(("Who takes part", partial(drawing.draw_shares, run=run)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * max(len(panels), 1), 4.0), layout="constrained",
                        facecolor="white")
        parts = figure.subfigures(1, max(len(panels), 1), squeeze=False, wspace=0.03)[0]
        for part, (title, draw) in zip(parts, panels, strict=False):
            part.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
            draw(part.add_subplot())
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _utility(run: RunRecord) -> Plot | None:
    families = drawing.metric_families(run)
    note = f"Solid: on {evaluated_on(run.summary)}, which never train."
    if any(run.series(m + HELD_OUT_EXAMPLES)[0] for family in families for m in family):
        note += " Dotted: on held-out examples of training devices."
    heights = [1.6 if run.headline in family else 1.0 for family in families]
    panels = [partial(drawing.draw_metrics, run=run, metrics=family) for family in families]
    return _plot("Utility over rounds", note, panels, heights) if panels else None


def _devices(run: RunRecord) -> Plot | None:
    if not run.series(f"{run.headline}_median")[0]:
        return None
    note = "Each held-out device has a metric of its own; the mean over examples hides the worst."
    return _plot("Who is served well", note, [partial(drawing.draw_devices, run=run)])


def _devices_by_level(run: RunRecord) -> Plot | None:
    if not run.by_level:
        return None
    note = "At the last evaluation, means over the held-out devices of a level."
    return _plot("Utility by activity level", note,
                 [partial(drawing.draw_devices_by_level, run=run)])


def _utility_against_epsilon(run: RunRecord) -> Plot | None:
    unit = next(iter(drawing.protected_units(run)), None)
    if unit is None or len(drawing.spent_points(run, unit)) < 2:
        return None
    note = (f"What spending ε bought: {label(run.headline, run.task)} on "
            f"{evaluated_on(run.summary)}.")
    return _plot("Utility against ε", note,
                 [partial(drawing.draw_utility_against_epsilon, run=run, unit=unit)])


def _budget(run: RunRecord) -> Plot | None:
    panels = [partial(drawing.draw_budget, run=run, unit=unit)
              for unit in drawing.protected_units(run)]
    note = "ε of the worst activity level after each round."
    return _plot("ε against the budget", note, panels) if panels else None


def _participation(run: RunRecord) -> Plot | None:
    if not run.participations:
        return None
    panels: list[Draw] = [partial(drawing.draw_shares, run=run)]
    note = "Who there is, and who takes part."
    if any(number(r.get("sampling_rate")) for r in run.levels):
        panels.append(partial(drawing.draw_rates, run=run))
        note += " Below: the probability with which a device joins a round."
    return _plot("Participation by activity level", note, panels, [1.6, 1.0][:len(panels)])


def _clipping(run: RunRecord) -> Plot | None:
    if not drawing.clipped_series(run):
        return None
    note = "Fraction of contributions that were scaled down to the clip norm."
    return _plot("Clipping", note, [partial(drawing.draw_clipping, run=run)])


def _noise(run: RunRecord) -> Plot | None:
    if not run.series("signal_to_noise")[0]:
        return None
    note = "Norm of the cohort's sum over the norm of the noise on it. Dashed: equal."
    return _plot("Signal to noise", note, [partial(drawing.draw_noise, run=run)])


def _plot(
    title: str, note: str, panels: Sequence[Draw], heights: list[float] | None = None
) -> Plot:
    """Panels one above the other, with one x axis."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, draw in zip(grid[:, 0], panels, strict=True):
            draw(axes)
            axes.label_outer()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return Plot(title, note, _inline(out.getvalue(), f"{title}. {note}"))


def _inline(svg: str, description: str) -> str:
    """matplotlib's SVG file as an element of a page: no prologue, metadata or repeated ids."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    size = re.search(r'viewBox="([^"]*)"', body)
    opening = (f'<svg viewBox="{size.group(1) if size else ""}" '
               'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
               f'role="img" aria-label="{html.escape(description)}">')
    return opening + body[body.index(">") + 1:].strip()
