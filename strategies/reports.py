"""Activity levels that devices report by randomised response, and rates that make the best of them.

Every device says its level once, or with a known probability any level (`RandomisedReport`).
Whatever follows reads the report: its inclusion probability, its row in the accounting. A report of
a high level is often a lie, so what a reported level weighs in sampling is the mean weight of the
devices behind it, by Bayes' rule,

    w(r) = sum_l P(l | r) w(l),    P(l | r) ~ P(l) (keep 1[l = r] + (1 - keep) / options)

with P(l) from a public model of activity or else from the reports themselves, their lies taken off
(Warner 1965; Kairouz et al. 2014, arXiv:1407.1338).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.accounting.events import RandomisedReport
from sottovoce.strategies.counts import LevelCounts
from sottovoce.strategies.levels import MAX_LEVEL
from sottovoce.strategies.rates import ActivityWeight

OPTIONS = MAX_LEVEL + 1
_DEVIATIONS = 4.0  # of its error, below which an estimated share counts as nobody


def level_report(epsilon: float) -> RandomisedReport:
    """The event of reports that are `epsilon`-DP each, over all activity levels."""
    return RandomisedReport.from_epsilon(epsilon, OPTIONS)


def reported_levels(
    levels: NDArray[np.uint8], report: RandomisedReport, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """(devices,) what each device reports: its own level with probability `keep`, else any.

    A device's report follows from the generator's first state and its place. 16 bits decide
    whether it tells the truth: `keep` is rounded down to a multiple of 2^-16, never up.

    *Guarantee*: reports are `report.epsilon`-DP each, relations zero-out and replace-one: less
    truth than `keep` makes a report no more telling.
    *Assumes*: the generator is secret, and asked for nothing else.
    """
    truthful = int(report.keep * (1 << 16))
    honest = generator.integers(0, 1 << 16, size=len(levels), dtype=np.uint16) < truthful
    lies = generator.integers(0, report.options, size=len(levels), dtype=np.uint8)
    found: NDArray[np.uint8] = np.where(honest, levels, lies)
    return found


def reported_counts(reported: NDArray[np.uint8], report: RandomisedReport) -> LevelCounts:
    """Devices by reported level, exactly: post-processing of the reports, which are the cost."""
    found = np.bincount(reported, minlength=OPTIONS).tolist()
    counts = {level: float(count) for level, count in enumerate(found)}
    return LevelCounts("reported", counts, dict(enumerate(found)), events=(report,))


def true_shares(reported: NDArray[np.uint8], report: RandomisedReport) -> NDArray[np.float64]:
    """(levels,) estimated shares of devices by true level, from reports alone; they sum to 1."""
    devices = max(len(reported), 1)
    seen = np.bincount(reported, minlength=OPTIONS) / devices
    error = np.sqrt(seen / devices) / report.keep
    found = (seen - (1 - report.keep) / report.options) / report.keep
    found = np.where(found > _DEVIATIONS * error, found, 0.0)
    total = float(found.sum())
    shares: NDArray[np.float64] = found / total if total > 0 else seen
    return shares


@dataclass(frozen=True)
class ReportedWeight(ActivityWeight):
    """The weight of a device that reports a level: of `means`, (levels,), not the level's own."""

    means: tuple[float, ...] = ()

    def of(self, level: int) -> float:
        return self.means[level]


def reported_weight(
    weight: ActivityWeight, shares: NDArray[np.float64], report: RandomisedReport
) -> ReportedWeight:
    """Mean `weight` behind each reported level. `shares`: (levels,) of devices by true level."""
    levels = np.arange(OPTIONS)
    plain = np.array([weight.of(level) for level in levels.tolist()])
    told = report.keep * np.eye(OPTIONS) + (1 - report.keep) / report.options
    behind = told * np.pad(shares, (0, OPTIONS - len(shares)))  # [reported, true]
    totals = np.maximum(behind.sum(axis=1), 1e-300)
    means = tuple((behind @ plain / totals).tolist())
    return ReportedWeight(
        weight.weight, weight.power, weight.uniform_mix, weight.max_rate, means=means
    )
