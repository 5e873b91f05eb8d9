"""The audit's pictures as inline SVG: ROC curves on log axes, and score histograms.

Drawn on `Figure` objects of their own, without pyplot and its global state. Text stays text.
Colours: Okabe and Ito, told apart by colour-blind readers.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from sottovoce.privacy.audit.membership import Membership
from sottovoce.privacy.audit.outcome import AttackResult, Audit
from sottovoce.privacy.audit.roc import Roc

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5A5A5A"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sottovoce audit",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A8A8A",
    "axes.axisbelow": True,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
ROW = 2  # panels side by side


def roc_curves(audit: Audit) -> str:
    """A log-log ROC panel per attack: band, chance line, claimed limit, unresolved region grey."""
    return _panels(audit, lambda axes, result, found: _draw_roc(axes, audit, result, found), 4.1)


def histograms(audit: Audit) -> str:
    """A panel per attack: how members and non-members score."""
    return _panels(audit, lambda axes, _, found: _draw_histogram(axes, found), 2.8)


def _panels(audit: Audit, draw: Any, height: float) -> str:
    measured = [(r, r.membership) for r in audit.results if r.membership is not None]
    rows = math.ceil(len(measured) / ROW)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, height * rows))
        gap = 0.55 / (height * rows)  # inches for axis labels; a layout engine would take seconds
        figure.subplots_adjust(left=0.06, right=0.99, bottom=gap, top=1 - 0.6 * gap,
                               wspace=0.18, hspace=0.9 / (height - 0.9))
        grid = figure.subplots(rows, ROW, squeeze=False).ravel()
        for axes, (result, found) in zip(grid, measured, strict=False):
            draw(axes, result, found)
            axes.set_title(result.attack.name.replace("_", " "))
        for axes in grid[len(measured):]:
            axes.set_axis_off()
        return _svg(figure)


def _draw_roc(axes: Axes, audit: Audit, result: AttackResult, found: Membership) -> None:
    curve = found.curve
    resolved = 1 / curve.non_members
    floor = min(resolved, 1 / curve.members) / 3
    line = np.geomspace(floor, 1, 200)
    axes.axvspan(floor, resolved, color="#EFEFEF", lw=0)
    axes.plot(line, line, color=GREY, ls=":", lw=1.2, label="chance")
    claim = next(c for c in audit.claims if c.unit == result.attack.unit)
    if claim.finite and claim.delta is not None and result.invalid is None:
        limit = _claimed(line, claim.epsilon, claim.delta)
        axes.plot(line, limit, color=ORANGE, ls="--", lw=1.4, label="most the claim allows")
    fpr, tpr, low, high = _band(curve, audit.confidence)
    axes.fill_between(fpr, low, high, step="post", color=BLUE, alpha=0.18, lw=0,
                      label=f"{100 * audit.confidence:g} % band")
    axes.step(fpr, np.maximum(tpr, floor), where="post", color=BLUE, lw=1.8,
              label=f"attack, AUC {found.auc:.3f}")
    axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.1),
             xlabel="false positive rate", ylabel="true positive rate")
    axes.minorticks_off()
    axes.grid(True, color="#E3E3E3", lw=0.8)
    axes.legend(loc="lower right")


def _claimed(fpr: Any, epsilon: float, delta: float) -> Any:
    """Highest true positive rate under (epsilon, delta)-DP, from both directions."""
    forward = np.exp(np.minimum(epsilon, 700)) * fpr + delta
    backward = 1 - np.exp(-epsilon) * (1 - fpr - delta)
    return np.clip(np.minimum(forward, backward), 0, 1)


def _band(curve: Roc, confidence: float) -> tuple[Any, Any, Any, Any]:
    """False positive rates, true positive rates and their pointwise Clopper-Pearson interval.

    One point for each false positive count: the best true positive rate there.
    """
    last = np.flatnonzero(np.diff(curve.false_positives, append=np.iinfo(np.int64).max))
    false, hits, n = curve.false_positives[last], curve.true_positives[last], curve.members
    tail = (1 - confidence) / 2
    low = np.where(hits > 0, special.betaincinv(np.maximum(hits, 1), n - hits + 1, tail), 0)
    high = np.where(hits < n, special.betainccinv(hits + 1, np.maximum(n - hits, 1), tail), 1)
    rate = np.maximum(false / curve.non_members, 1e-12)
    return rate, hits / n, np.maximum(low, 1e-12), high


def _draw_histogram(axes: Axes, found: Membership) -> None:
    both = np.concatenate([found.members, found.non_members])
    low, high = np.quantile(both, [0.002, 0.998])
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, 41).tolist()
    for scores, colour, name in (
        (found.non_members, GREY, "non-members"), (found.members, BLUE, "members")
    ):
        axes.hist(np.clip(scores, low, high), bins=bins, density=True, histtype="stepfilled",
                  color=colour, alpha=0.35, ec=colour, lw=1.2, label=name)
    axes.set(xlabel="score (higher: more like a member)", yticks=[])
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element for HTML: no prologue, namespaces, metadata or fixed size."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    return re.sub(r'(<svg[^>]*?)\s+width="[^"]*"\s+height="[^"]*"', r"\1", text, count=1)
