"""How a run's figures are drawn on matplotlib axes: one function a picture.

No pyplot, no global state but the style that `plots` sets around the drawing. Colours: Okabe and
Ito's, told apart by colour-blind readers; lines differ in dash and marker too.
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sottovoce.server.run_record import UNITS, Record, RunRecord, setting
from sottovoce.server.wording import (
    FRACTIONS,
    HELD_OUT_EXAMPLES,
    OF_DEVICES,
    epsilon_text,
    label,
    number,
)
from sottovoce.strategies.levels import level_size

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#007A5A", "#B0598C", "#5A5A5A"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MARKERS = ("o", "s", "^", "D")
UNIT_COLOURS = {"device": BLUE, "example": ORANGE}
POPULATION = "#9CA3AF"
DOTTED, DASHED = (0, (1, 1.5)), (0, (5, 3))
CLIPPED = (("device", "clipped_fraction", "device updates"),
           ("example", "example_clipped_fraction", "example gradients"))


def metric_families(run: RunRecord) -> list[list[str]]:
    """Metrics that share an axis, the headline's family first; families never measured left out."""
    fractions = [m for m in FRACTIONS if run.series(m)[0]]
    families = [f for f in (fractions, ["perplexity"], ["loss", "train_loss"])
                if any(run.series(m)[0] for m in f)]
    return sorted(families, key=lambda family: run.headline not in family)


def protected_units(run: RunRecord) -> list[str]:
    """Units for which epsilon was spent and known round by round."""
    return [u for u in UNITS if any(v > 0 for v in run.series(f"epsilon_{u}")[1])]


def spent_points(run: RunRecord, unit: str) -> list[tuple[float, float]]:
    """(epsilon spent, headline metric) at every evaluation; nothing is spent before round 1."""
    def spent(record: Record) -> float | None:
        return 0.0 if record["round"] == 0 else number(record.get(f"epsilon_{unit}"))

    pairs = [(spent(r), number(r[run.headline])) for r in run.evaluations]
    return [(e, v) for e, v in pairs if e is not None and math.isfinite(e) and v is not None]


def clipped_series(run: RunRecord) -> list[tuple[str, list[int], list[float]]]:
    """(name, rounds, fractions) for every unit whose contributions the run clips."""
    series = [(name, *run.series(key)) for unit, key, name in CLIPPED
              if setting(run.config, f"privacy.{unit}.enabled")]
    return [found for found in series if found[1]]


def draw_metrics(axes: Axes, run: RunRecord, metrics: list[str]) -> None:
    """Lines of `metrics` over rounds; the same on held-out examples dotted, in the same colour."""
    for metric, colour, marker in zip(metrics, COLOURS, MARKERS, strict=False):
        rounds, values = run.series(metric)
        name = "held-out loss" if metric == "loss" else label(metric, run.task)
        shown = marker if len(rounds) <= 30 and metric != "train_loss" else ""
        if rounds:
            axes.plot(rounds, values, color=colour, marker=shown, label=name, clip_on=not shown)
        axes.plot(*run.series(metric + HELD_OUT_EXAMPLES), color=colour, linestyle=DOTTED)
    if all(m in FRACTIONS for m in metrics):
        _fraction_axis(axes)
        axes.set_ylabel("fraction right")
    elif metrics == ["perplexity"]:
        log_axis(axes)
        axes.set_ylabel("perplexity (log)")
    else:
        axes.set_ylabel("loss")
    rounds_axis(axes, run)
    _legend(axes)


def draw_devices(axes: Axes, run: RunRecord) -> None:
    """The leading metric over rounds: mean, median device, and the devices served worst."""
    shown = (("", "all examples", "-"), *((end, name, dash) for (end, name), dash in zip(
        OF_DEVICES.items(), ("--", DASHED, DOTTED), strict=True)))
    for (end, name, dash), colour in zip(shown, COLOURS, strict=True):
        axes.plot(*run.series(run.headline + end), color=colour, linestyle=dash, label=name)
    if run.headline in FRACTIONS:
        _fraction_axis(axes)
    if run.headline == "perplexity":
        log_axis(axes)
    axes.set_ylabel(label(run.headline, run.task))
    rounds_axis(axes, run)
    _legend(axes, columns=2)


def draw_devices_by_level(axes: Axes, run: RunRecord) -> None:
    """The leading metric at the last evaluation: mean over the devices of each activity level."""
    found = {int(level): float(value) for level, value in run.by_level.items()}
    levels = list(range(min(found), max(found) + 1))
    heights = [found.get(level, math.nan) for level in levels]
    axes.bar(range(len(levels)), heights, width=0.6, color=BLUE)
    if run.headline == "perplexity":
        log_axis(axes)
    axes.set_ylabel(label(run.headline, run.task))
    axes.grid(visible=False, axis="x")
    _levels_axis(axes, levels)


def draw_utility_against_epsilon(axes: Axes, run: RunRecord, unit: str) -> None:
    """The headline metric at the epsilon spent by then, with the budget as a line."""
    spent, values = zip(*spent_points(run, unit), strict=True)
    axes.plot(spent, values, color=UNIT_COLOURS[unit], marker="o" if len(spent) <= 40 else "",
              clip_on=False)
    if run.headline in FRACTIONS:
        _fraction_axis(axes)
    if run.headline == "perplexity":
        log_axis(axes)
    for word, bound in bounds(run, unit):
        axes.axvline(bound, color=GREY, linewidth=1.1, linestyle=DASHED)
        axes.annotate(f"{word} {epsilon_text(bound)}", (bound, 0), (-4, 6), ha="right",
                      xycoords=("data", "axes fraction"), textcoords="offset points",
                      color=GREY, fontsize=10)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit}-level ε spent so far")
    axes.set_ylabel(label(run.headline, run.task))


def draw_budget(axes: Axes, run: RunRecord, unit: str) -> None:
    """Epsilon spent after each round against the run's budget and target."""
    rounds, spent = run.series(f"epsilon_{unit}")
    axes.plot([0, *rounds], [0.0, *spent], color=UNIT_COLOURS[unit])
    for word, bound in bounds(run, unit):
        axes.axhline(bound, color=GREY, linewidth=1.1, linestyle=DASHED)
        axes.annotate(f"{word} {epsilon_text(bound)}", (0, bound), (6, 4), color=GREY,
                      xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=10)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    axes.set_ylabel(f"{unit}-level ε")
    rounds_axis(axes, run)


def bounds(run: RunRecord, unit: str) -> list[tuple[str, float]]:
    """The run's epsilon budget and target for `unit`; a target equal to the budget once."""
    found = {}
    for key, word in (("epsilon", "target"), ("max_epsilon", "budget")):
        bound = number(setting(run.config, f"privacy.{unit}.{key}"))
        if bound is not None and math.isfinite(bound):
            found[bound] = word
    return [(word, bound) for bound, word in found.items()]


def draw_shares(axes: Axes, run: RunRecord) -> None:
    """Per activity level: share of the population's devices beside share of participations."""
    levels = _levels(run)
    devices = {int(r["level"]): number(r.get("devices")) or 0.0 for r in run.levels}
    taken = {level: float(count) for level, count in run.participations.items()}
    bars = [(counts, colour, name) for counts, colour, name in
            ((devices, POPULATION, "devices in the population"), (taken, BLUE, "participations"))
            if sum(counts.values()) > 0]
    for index, (counts, colour, name) in enumerate(bars):
        total = sum(counts.values())
        shift = 0.4 * (index - (len(bars) - 1) / 2)
        axes.bar([i + shift for i in range(len(levels))],
                 [100 * counts.get(level, 0.0) / total for level in levels],
                 width=0.38, color=colour, label=name)
    axes.set_ylabel("share (%)")
    axes.grid(visible=False, axis="x")
    _levels_axis(axes, levels)
    _legend(axes)


def draw_rates(axes: Axes, run: RunRecord) -> None:
    """The public probability with which a device of each level joins a round."""
    levels = _levels(run)
    rates = {int(r["level"]): number(r.get("sampling_rate")) or 0.0 for r in run.levels}
    kept = [(i, rates[level]) for i, level in enumerate(levels) if rates.get(level, 0.0) > 0]
    axes.plot([i for i, _ in kept], [p for _, p in kept], color=ORANGE, marker="o", linewidth=1.2)
    log_axis(axes)
    axes.set_ylabel("probability (log)")
    _levels_axis(axes, levels)


def draw_clipping(axes: Axes, run: RunRecord) -> None:
    """Clipped fractions of device updates and of example gradients over rounds."""
    for found, colour, dash in zip(clipped_series(run), COLOURS, ("-", "--"), strict=False):
        name, rounds, values = found
        axes.plot(rounds, values, color=colour, linestyle=dash, label=name)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("clipped fraction")
    rounds_axis(axes, run)
    _legend(axes, at_least=1)


def draw_noise(axes: Axes, run: RunRecord) -> None:
    """Signal to noise over rounds; a dashed line where both are equally loud."""
    axes.plot(*run.series("signal_to_noise"), color=GREEN)
    axes.axhline(1.0, color=GREY, linewidth=1.1, linestyle=DASHED)
    log_axis(axes)
    axes.set_ylabel("signal to noise (log)")
    rounds_axis(axes, run)


def rounds_axis(axes: Axes, run: RunRecord) -> None:
    """All planned rounds, so that a stopped run shows how far it came."""
    axes.set_xlabel("round")
    axes.set_xlim(0, max(run.planned_rounds, 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def log_axis(axes: Axes) -> None:
    """A log scale labelled with plain figures; at 2 and 5 too where it spans few decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = high / low < 300
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(
        lambda value, _: f"{value:g}" if few and _leading_digit(value) in (2, 5) else ""))


def _leading_digit(value: float) -> int:
    return round(value / 10.0 ** math.floor(math.log10(value) + 1e-9))


def _fraction_axis(axes: Axes) -> None:
    """From 0 to 1, or to what was reached where that is far below 1."""
    reached = axes.get_ylim()[1]
    axes.set_ylim(0, reached if 0.05 < reached < 0.5 else 1.02)


def _levels(run: RunRecord) -> list[int]:
    found = {int(r["level"]) for r in run.levels} | set(run.participations)
    return list(range(min(found), max(found) + 1))


def _levels_axis(axes: Axes, levels: list[int]) -> None:
    sizes = [level_size(level) for level in levels]
    axes.set_xticks(range(len(levels)), [str(n) if n < 1024 else f"{n // 1024}k" for n in sizes])
    axes.set_xlabel("examples on the device, at least")


def _legend(axes: Axes, at_least: int = 2, columns: int | None = None) -> None:
    """A legend above the axes, in one row; none where the axis itself names the only line."""
    entries = len(axes.get_legend_handles_labels()[1])
    if entries >= at_least:
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)}
        axes.legend(ncols=columns or entries, borderaxespad=0.2, columnspacing=1.4,
                    handlelength=1.6, **place)
