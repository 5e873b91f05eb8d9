"""The audit's pictures as inline SVG: ROC curves on log axes, score histograms, epsilon by round.

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
from matplotlib.ticker import MaxNLocator
from scipy import special

from sottovoce.privacy.audit.claims import Claim
from sottovoce.privacy.audit.gaussian import gaussian_mu
from sottovoce.privacy.audit.membership import Membership
from sottovoce.privacy.audit.outcome import AttackResult, Audit, claim_of
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
POINTS = 300  # of a curve, at most: a million candidates make a page no heavier


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
            name = result.attack.name.replace("_", " ")
            axes.set_title(f"{name}, per {result.attack.unit}", parse_math=False)
        for axes in grid[len(measured):]:
            axes.set_axis_off()
        return _svg(figure)


def epsilon_by_round(audit: Audit) -> str:
    """Epsilon by theory over rounds, and what attacks proved where they were made."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1))
        figure.subplots_adjust(left=0.06, right=0.99, bottom=0.18, top=0.96)
        axes = figure.subplots()
        _draw_rounds(axes, audit)
        return _svg(figure)


def _draw_rounds(axes: Axes, audit: Audit) -> None:
    claim, rounds = audit.headline, [point.round for point in audit.rounds]
    axes.plot(rounds, [point.theory for point in audit.rounds], color=ORANGE, lw=1.8,
              label=f"theory: at most, per {claim.unit}")
    attacked = [(point.round, point.bound) for point in audit.rounds if point.bound is not None]
    axes.plot(*np.array(attacked, dtype=float).reshape(-1, 2).T, color=BLUE, marker="^", ms=9,
              ls="none", label=f"attacks: at least ({100 * audit.confidence:g} % confidence)",
              clip_on=False, zorder=3)
    strongest = audit.headline_result
    if strongest is not None and strongest.membership is not None:
        held, ceiling = strongest.claimed, strongest.membership.bound.ceiling
        if held is not None and held != claim.epsilon and math.isfinite(held):
            axes.axhline(held, color=ORANGE, ls="--", lw=1.2,
                         label="theory if one is exchanged: what these attacks are held against")
        if math.isfinite(ceiling):
            axes.axhline(ceiling, color=GREY, ls=":", lw=1.2, label="ceiling of this audit")
    axes.set(xlabel="round", ylabel="ε", ylim=(0, None), xlim=(0, max(rounds) * 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, axis="y", color="#E3E3E3", lw=0.8)
    axes.legend(loc="best")


def _draw_roc(axes: Axes, audit: Audit, result: AttackResult, found: Membership) -> None:
    curve = found.curve
    resolved, least = 1 / curve.non_members, 1 / curve.members
    floor = min(resolved, least) / 3
    line = np.geomspace(floor, 1, 200)
    axes.axvspan(floor, resolved, color="#EFEFEF", lw=0)
    axes.axhspan(floor, least, color="#EFEFEF", lw=0)
    axes.plot(line, line, color=GREY, ls=":", lw=1.2, label="chance")
    claim = claim_of(result.attack, audit.claims)
    claimed = result.claimed
    if claim and claimed is not None and math.isfinite(claimed) and result.invalid is None:
        limit = _claimed(line, claimed, claim)
        axes.plot(line, np.maximum(limit, floor), color=ORANGE, ls="--", lw=1.4,
                  label="most the claim allows")
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


def _claimed(fpr: Any, epsilon: float, claim: Claim) -> Any:
    """Highest true positive rate that the claim allows.

    Of a Gaussian mechanism its own trade-off curve, else that of (epsilon, delta)-DP, from both
    directions.
    """
    delta = claim.delta or 0.0
    if claim.gaussian and delta > 0:
        return special.ndtr(special.ndtri(fpr) + gaussian_mu(epsilon, delta))
    forward = np.exp(np.minimum(epsilon, 700)) * fpr + delta
    backward = 1 - np.exp(-epsilon) * (1 - fpr - delta)
    return np.clip(np.minimum(forward, backward), 0, 1)


def _band(curve: Roc, confidence: float) -> tuple[Any, Any, Any, Any]:
    """False positive rates, true positive rates and their pointwise Clopper-Pearson interval.

    One point for each false positive count: the best true positive rate there; of many counts
    about `POINTS`, evenly spread on the log axis.
    """
    last = np.flatnonzero(np.diff(curve.false_positives, append=np.iinfo(np.int64).max))
    if len(last) > POINTS:
        spread = np.geomspace(1, len(last), POINTS).astype(np.int64)
        last = last[np.unique(np.concatenate([[1], spread])) - 1]
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
    axes.legend(loc="upper right")


def _svg(figure: Figure) -> str:
    """The figure as an SVG element for HTML: no prologue, namespaces, metadata or fixed size."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    return re.sub(r'(<svg[^>]*?)\s+width="[^"]*"\s+height="[^"]*"', r"\1", text, count=1)
