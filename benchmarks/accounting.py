"""Public figures of privacy accounting, by every accountant here: the table of docs/accounting.md.

    .venv/bin/python benchmarks/accounting.py           the table, in Markdown
    .venv/bin/python benchmarks/accounting.py --json    the same as JSON, with what accounting costs

Costs: CPU seconds in this process. `account_cold_s`: a run of 2,000 rounds and 20 activity levels,
everything that `sottovoce account run=` computes, nothing cached, libraries imported before;
`next_round_s`: its next round, for the progress bar; the same at 100,000 rounds; appending to a
ledger of 100,000 events is wall time, as it waits for the disk.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import Event, GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.accounting.tracker import EpsilonTracker
from sottovoce.server.account import account

ROUNDS, LEVELS, MANY = 2000, 20, 100_000


@dataclass(frozen=True)
class Figure:
    """A plan, and what others say it costs. `published`: PLD or exact, as the source has it."""

    what: str
    events: tuple[Event, ...]
    delta: float
    published: float | None
    published_rdp: float | None = None


def poisson(rate: float, noise: float, steps: int, **fields: Any) -> GaussianEvent:
    return GaussianEvent(
        noise_multiplier=noise, count=steps, sampling="poisson", sampling_rate=rate, **fields
    )


def of_rho(rho: float) -> GaussianEvent:
    """The Gaussian release of zero-concentrated DP rho."""
    return GaussianEvent(noise_multiplier=math.sqrt(1 / (2 * rho)))


FIGURES = (
    Figure("q=0.01 σ=1 T=1,000", (poisson(0.01, 1.0, 1000),), 1e-5, 1.8282, 2.1014),
    Figure("q=0.01 σ=4 T=10,000", (poisson(0.01, 4.0, 10_000),), 1e-5, 0.9470, 1.0355),
    Figure("q=256/60000 σ=1.1 T=14,062", (poisson(256 / 60_000, 1.1, 14_062),), 1e-5, 2.3817,
           2.5966),
    Figure("q=1 σ=10 T=100", (poisson(1.0, 10.0, 100),), 1e-5, 4.3772),
    Figure("q=0.25 σ=1 T=40", (poisson(0.25, 1.0, 40),), 1e-3, 7.9525),
    Figure("q=0.001 σ=0.8 T=2,000", (poisson(1e-3, 0.8, 2000),), 1e-6, 0.5600, 1.5047),
    Figure("q=0.0001 σ=0.6 T=100,000", (poisson(1e-4, 0.6, 100_000),), 1e-5, 0.609, 1.82),
    Figure("q=0.001 σ=1 T=1,000,000", (poisson(1e-3, 1.0, 1_000_000),), 1e-6, 6.6980),
    Figure("q=0.1 σ=1 T=200", (poisson(0.1, 1.0, 200),), 1e-3, 7.096),
    Figure("q=0.05 σ=1 T=1,000", (poisson(0.05, 1.0, 1000),), 1e-5, 10.99),
    Figure("(q=0.02 σ=1.2)×50, (0.005, 0.8)×100, (0.1, 3)×20",
           (poisson(0.02, 1.2, 50), poisson(0.005, 0.8, 100), poisson(0.1, 3.0, 20)), 1e-5,
           1.083109, 1.80062),
    Figure("q=0.01 σ=1 T=1,000, replace-one",
           (poisson(0.01, 1.0, 1000, relation="replace_one"),), 1e-5, 2.84),
    Figure("10 epochs in fixed order, σ=1", (GaussianEvent(noise_multiplier=1.0, count=10),),
           1e-5, 17.86),
    Figure("Gboard es-ES 2022, ρ=0.806 (published: zCDP)", (of_rho(0.806),), 1e-10, None, 8.90),
    Figure("Gboard, ρ=0.1507", (of_rho(0.1507),), 1e-10, 3.42),
    Figure("Gboard, ρ=0.01434", (of_rho(0.01434),), 1e-10, 0.994),
)


def rows() -> list[dict[str, Any]]:
    """Every figure by every accountant; None where one has none."""
    found = []
    for figure in FIGURES:
        by = {
            name: epsilon(figure.events, figure.delta, accountant=name)
            for name in ("pld", "rdp", "prv")
        }
        found.append({
            "what": figure.what, "delta": figure.delta, "published": figure.published,
            "published_rdp": figure.published_rdp,
            **{name: value if math.isfinite(value) else None for name, value in by.items()},
        })
    return found


def event_of(number: int, top: float) -> GaussianEvent:
    rates = [min(top, top / 1000 * 1.45**level) for level in range(LEVELS)]
    return GaussianEvent(
        noise_multiplier=0.9, sampling="poisson", round=number,
        by_level=tuple((level, rate, 1) for level, rate in enumerate(rates)),
    )


def ledger_of(rounds: int, top: float) -> Ledger:
    return Ledger(
        (event_of(number, top) for number in range(1, rounds + 1)),
        levels=dict.fromkeys(range(LEVELS), 1000), deltas={"device": 1e-7},
    )


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    began = clock()
    work()
    return clock() - began


def next_rounds(ledger: Ledger, top: float) -> list[float]:
    """Seconds of each of fifty more rounds in the progress bar, the first one left out."""
    tracker = EpsilonTracker(1e-7, events=ledger)
    found = []
    for number in range(51):
        event = event_of(len(ledger) + number, top)
        found.append(seconds(lambda event=event: (tracker.add(event), tracker.epsilon())))
    return found[1:]


def costs() -> dict[str, float]:
    import dp_accounting  # noqa: F401
    import opacus.accountants  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        run, large = ledger_of(ROUNDS, 0.02), ledger_of(MANY, 0.0005)
        run.save(Path(folder) / "ledger.json")
        cold = seconds(lambda: account({"run": folder}))
        path = Path(folder) / "large.json"
        large.save(path)
        appended = []
        for number in range(5):
            large.append(event_of(MANY + number, 0.0005))
            appended.append(seconds(lambda: large.save(path), time.perf_counter))
    return {
        "account_cold_s": cold,
        "next_round_s": statistics.median(next_rounds(run, 0.02)),
        "next_of_100000_rounds_s": statistics.median(more := next_rounds(large, 0.0005)),
        "slowest_of_these_s": max(more),
        "append_to_100000_events_s": statistics.median(appended),
    }


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| plan | δ | published | PLD | RDP (published) | PRV |",
             "| --- | --- | --- | --- | --- | --- |"]
    for row in found:
        stated = f"{row['published']:.5g}" if row["published"] else "–"
        rdp = f"{row['rdp']:.4f}" if row["rdp"] else "–"
        if row["published_rdp"]:
            rdp += f" ({row['published_rdp']:.5g})"
        prv = f"{row['prv']:.4f}" if row["prv"] else "–"
        lines.append(f"| {row['what']} | {row['delta']:g} | {stated} | {row['pld']:.4f} | {rdp} | "
                     f"{prv} |")
    return "\n".join(lines)


def main() -> None:
    found = rows()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"figures": found, "costs": costs()}, indent=1))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
