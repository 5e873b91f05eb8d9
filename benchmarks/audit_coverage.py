"""How often the audit's bounds are wrong, on mechanisms whose epsilon is known.

    python benchmarks/audit_coverage.py --json > coverage.json

Every trial draws fair coins for its canaries, lets a mechanism of known epsilon release something,
scores the canaries and asks for a bound at 95 %. Whatever is labelled a bound may exceed the true
epsilon in at most 5 % of trials. The traps at the end are what the audit does not do: they are here
to show why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from audit_mechanisms import DELTA, SAMPLED, Array, Coins, Mechanism, exchanged, mechanisms
from scipy import stats

from sottovoce.privacy.audit import (
    clopper_pearson_lower_bound,
    one_run_lower_bound,
    pooled_gaussian_lower_bound,
    two_gaussians_epsilon,
)
from sottovoce.privacy.audit.bounds import pure_one_run_bound
from sottovoce.privacy.audit.design import Design
from sottovoce.privacy.audit.membership import split_bound
from sottovoce.privacy.audit.shares import FRACTIONS, sizes

CONFIDENCE = 0.95

# -- what the audit calls a bound ------------------------------------------------------------------

Bound = Callable[[Array, Coins, float, np.random.Generator], float]


def audited(design: Design) -> Bound:
    """The audit's own bound, with guesses chosen on a part that is not tested, or declared."""
    def bound(scores: Array, coins: Coins, delta: float, generator: np.random.Generator) -> float:
        found, _ = split_bound(
            scores[coins], scores[~coins], delta=delta, confidence=CONFIDENCE,
            generator=generator, design=design,
        )
        return found.epsilon

    return bound


def split_pool(scores: Array, coins: Coins, delta: float, generator: np.random.Generator) -> float:
    """The bound for a random split of a finite pool, of which a tenth is held out at most."""
    return audited(Design())(scores, coins, delta, generator)


def clopper_pearson(
    scores: Array, coins: Coins, delta: float, generator: np.random.Generator
) -> float:
    """Rates at the score's middle, fixed beforehand; scores must be independent of each other."""
    guessed = scores > 0.5
    hits, false = int((guessed & coins).sum()), int((guessed & ~coins).sum())
    positives, negatives = int(coins.sum()), int((~coins).sum())
    return clopper_pearson_lower_bound(hits, positives, false, negatives, delta, CONFIDENCE)


def pooled(scores: Array, coins: Coins, delta: float, generator: np.random.Generator) -> float:
    """The Gaussian limit; delta = 0 has none, so that `DELTA` is used."""
    found = pooled_gaussian_lower_bound(scores[coins], scores[~coins], delta or DELTA, CONFIDENCE)
    return found.epsilon


BOUNDS: dict[str, Bound] = {
    "one run, half chooses": audited(Design(coins=True)),
    "one run, declared shares": audited(Design(coins=True, declared=(0.02, 0.1, 0.3))),
    "one run, random split": split_pool,
    "Clopper-Pearson": clopper_pearson,
    "one run, Gaussian": audited(Design(coins=True, gaussian=True)),
    "pooled Gaussian": pooled,
}
GAUSSIAN_ONLY = ("one run, Gaussian", "pooled Gaussian")
INDEPENDENT_ONLY = ("Clopper-Pearson", "pooled Gaussian")


# -- what it does not ------------------------------------------------------------------------------


def chosen_on_tested(
    scores: Array, coins: Coins, delta: float, generator: np.random.Generator
) -> float:
    """TRAP: the best shares of guesses, chosen on the very canaries that are then tested."""
    order = np.argsort(-scores)
    made = sizes(FRACTIONS[1:], len(scores))
    top = np.cumsum(coins[order])[made - 1]
    bottom = np.cumsum(~coins[order[::-1]])[made - 1]
    guesses, right = (a[:, None] + b[None, :] for a, b in ((made, made), (top, bottom)))
    proved = pure_one_run_bound(guesses, right, 1 - CONFIDENCE)
    row, column = np.unravel_index(int(np.argmax(proved)), proved.shape)
    return _one_run(len(scores), int(guesses[row, column]), int(right[row, column]), delta)


def unpooled(scores: Array, coins: Coins, delta: float, generator: np.random.Generator) -> float:
    """TRAP: a normal fitted to either side with a variance of its own, read as a bound."""
    sides = (scores[~coins], scores[coins])
    (out, std_out), (inside, std_in) = ((s.mean(), s.std(ddof=1)) for s in sides)
    return two_gaussians_epsilon(out, std_out, inside, std_in, delta or DELTA)


def traps() -> list[tuple[str, Mechanism, Bound]]:
    """(what is done wrong, on what, how)."""
    known = {one.name: one for one in mechanisms()}
    gaussian_bound, limit = BOUNDS["one run, Gaussian"], pooled
    removed = Mechanism("fixed size, held against ε 2", 2.0, exchanged(2.0), 0.0)
    return [
        ("shares chosen on the tested half", known["null"], chosen_on_tested),
        ("shares chosen on the tested half", known["randomised response, ε 1"], chosen_on_tested),
        ("Gaussian bound", known["randomised response, ε 3"], _at_delta(gaussian_bound)),
        ("Gaussian bound", known["Laplace, ε 4"], _at_delta(gaussian_bound)),
        ("Gaussian limit", known["Laplace, ε 4"], limit),
        ("Gaussian limit", known[SAMPLED], limit),
        ("variances not pooled", known["null"], unpooled),
        ("variances not pooled", known["Gaussian, μ 0.5"], unpooled),
        ("exchanges held against add/remove", removed, split_pool),
    ]


def _at_delta(bound: Bound) -> Bound:
    return lambda scores, coins, delta, generator: bound(scores, coins, delta or DELTA, generator)


# -- counting --------------------------------------------------------------------------------------


def false_alarms(
    mechanism: Mechanism, bound: Bound, *, canaries: int, trials: int, seed: int = 0
) -> dict[str, float]:
    """How often `bound` exceeds the truth, and its median."""
    generator = np.random.default_rng([seed, len(mechanism.name), canaries])
    found = np.empty(trials)
    for trial in range(trials):
        coins = generator.random(canaries) < 0.5
        scores = mechanism.release(coins, generator)
        found[trial] = bound(scores, coins, mechanism.delta, generator)
    alarms = int((found > mechanism.epsilon + 1e-9).sum())
    print(mechanism.name, canaries, f"{alarms} of {trials}", file=sys.stderr, flush=True)
    return {"alarms": alarms, "rate": alarms / trials, "median": float(np.median(found))}


def most_alarms(trials: int, chance: float = 1e-6) -> int:
    """The count that alarms of probability 5 % exceed with probability `chance`."""
    return int(stats.binom.isf(chance, trials, 1 - CONFIDENCE))


def covered(name: str, mechanism: Mechanism) -> bool:
    """Whether the bound `name` is made for `mechanism`."""
    if name in GAUSSIAN_ONLY and not mechanism.gaussian:
        return False
    return name not in INDEPENDENT_ONLY or mechanism.independent


def measure(canaries: int, trials: int) -> dict[str, Any]:
    """Every bound on every mechanism that it is made for, and the traps."""
    bounds = [
        {"bound": name, "mechanism": one.name, "epsilon": one.epsilon, "delta": one.delta,
         **false_alarms(one, bound, canaries=canaries, trials=trials)}
        for one in mechanisms() for name, bound in BOUNDS.items() if covered(name, one)
    ]
    fallen = [
        {"trap": name, "mechanism": one.name, "epsilon": one.epsilon, "delta": one.delta,
         **false_alarms(one, bound, canaries=canaries, trials=trials)}
        for name, one, bound in traps()
    ]
    return {
        "environment": environment(), "trials": trials, "canaries": canaries,
        "confidence": CONFIDENCE, "most_alarms": most_alarms(trials),
        "bounds": bounds, "traps": fallen,
        "broken": [row for row in bounds if row["alarms"] > most_alarms(trials)],
    }


def tables(found: dict[str, Any]) -> str:
    """Markdown: false alarms of bounds by mechanism, then the traps."""
    names = list(BOUNDS)
    lines = ["| mechanism | true ε | " + " | ".join(names) + " |",
             "| --- | --- |" + " --- |" * len(names)]
    for one in dict.fromkeys(row["mechanism"] for row in found["bounds"]):
        mine = {row["bound"]: row for row in found["bounds"] if row["mechanism"] == one}
        truth = next(iter(mine.values()))["epsilon"]
        cells = [_cell(mine[name]) if name in mine else "–" for name in names]
        lines.append(f"| {one} | {truth:.2f} | " + " | ".join(cells) + " |")
    lines += ["", "| trap | mechanism | true ε | false alarms (median) |",
              "| --- | --- | --- | --- |"]
    lines += [f"| {row['trap']} | {row['mechanism']} | {row['epsilon']:.2f} | {_cell(row)} |"
              for row in found["traps"]]
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What ran where."""
    packages = {name: version(name) for name in ("sottovoce", "numpy", "scipy")}
    return {"python": platform.python_version(), "processor": _processor(),
            "cores": os.cpu_count(), **packages}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _cell(row: dict[str, Any]) -> str:
    return f"{100 * row['rate']:.1f} % ({row['median']:.2f})"


@lru_cache(maxsize=100_000)
def _one_run(canaries: int, guesses: int, right: int, delta: float) -> float:
    return one_run_lower_bound(canaries, guesses, right, delta, CONFIDENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--canaries", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.canaries, options.trials)
    print(json.dumps(found, indent=1, ensure_ascii=False) if options.json else tables(found))
    if found["broken"]:
        raise SystemExit("bounds with too many false alarms: see `broken`")


if __name__ == "__main__":
    main()
