"""Correlated against independent noise at equal epsilon, on next-word prediction.

    SOTTOVOCE_DATA=../shared/data python benchmarks/banded_noise.py --json > banded.json

Shakespeare's roles as devices. All arms have the same cohort, rounds, clip norm, epsilon and delta;
`independent, sampled` claims amplification by Poisson sampling (add/remove), the others nothing but
a participation schedule (zero-out). Each arm takes the server learning rate that is best on a seed
which is then left out. Prints Markdown tables, or JSON with every run; `--errors` alone prints the
table that needs no training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sottovoce.privacy.accounting.calibration import calibrate_noise
from sottovoce.privacy.mechanisms.optimised import NAMES, make_factorisation
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.server.report_tables import environment
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate

EPSILON, DELTA = 2.0, 1e-5
SEPARATION = 25
RATES = (1.5, 4.0)
PRIVATE = ["privacy=device", f"privacy.device.epsilon={EPSILON}", f"privacy.device.delta={DELTA}"]
SCHEDULE = [*PRIVATE, f"privacy.device.min_separation={SEPARATION}"]
ARMS = {
    "no privacy": ["privacy=none"],
    "independent, sampled": PRIVATE,
    "independent": SCHEDULE,
    "tree": [*SCHEDULE, "privacy.device.mechanism=tree"],
    "bisr": [*SCHEDULE, "privacy.device.mechanism=bisr"],
    "blt": [*SCHEDULE, "privacy.device.mechanism=blt"],
    "banded": [*SCHEDULE, "privacy.device.mechanism=banded"],
}
COMMON = [
    "population=shakespeare", "population.max_examples_per_round=8",
    "task=next_word", "task.vocabulary.buckets=512", "task.max_length=16",
    "model.embedding_size=16", "model.hidden_size=24",
    "strategy=fedavg", "strategy.sampler=uniform", "strategy.local_epochs=1",
    "strategy.batch_size=8", "strategy.learning_rate=1",
    "rounds=100", "cohort_size=50", "run.workers=1",
    "run.evaluation_devices=200", "run.evaluate_every=1000", "run.report=false",
    "run.progress=false",
]  # fmt: skip
PLANS = {
    "1,277 devices, 50 a round, 100 rounds, 25 apart": (1277, 50, Schedule(100, 25), DELTA),
    "1,000,000 devices, 3,000 a round, 2,000 rounds, 300 apart": (
        1_000_000, 3000, Schedule(2000, 300), 1e-7,
    ),
    "1,000,000 devices, 1,000 a round, 2,000 rounds, 1,000 apart": (
        1_000_000, 1000, Schedule(2000, 1000), 1e-7,
    ),
}  # fmt: skip


def run(arm: str, seed: int, rate: float) -> dict[str, Any]:
    """One run's metrics and epsilon."""
    overrides = [*COMMON, *ARMS[arm], f"seed={seed}", f"strategy.server_learning_rate={rate}"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "run"
        target.mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            simulate(compose(overrides), target)
        summary: dict[str, Any] = json.loads((target / "summary.json").read_text())
    print(arm, seed, rate, summary["metrics"]["perplexity"], file=sys.stderr, flush=True)
    facts = {key: summary[key] for key in ("metrics", "epsilon", "parameters", "seconds")}
    return {"arm": arm, "seed": seed, "rate": rate, **facts}


def runs_of(arm: str, seeds: int) -> list[dict[str, Any]]:
    """The runs of an arm at its best server learning rate, the seed that chose it left out."""
    tried = [run(arm, 0, rate) for rate in RATES]
    best = min(tried, key=lambda one: float(one["metrics"]["perplexity"]))["rate"]
    return [run(arm, seed, best) for seed in range(1, seeds + 1)]


def table(runs: list[dict[str, Any]]) -> str:
    """Mean (standard deviation) over seeds."""
    lines = [
        "| noise | ε | server learning rate | perplexity | top-3 accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in dict.fromkeys(one["arm"] for one in runs):
        mine = [one for one in runs if one["arm"] == arm]
        cost = mine[0]["epsilon"].get("device", {}).get("epsilon", math.inf)
        cells = [arm, "∞" if cost == math.inf else f"{cost:.2f}", f"{mine[0]['rate']:g}"]
        for metric, digits in (("perplexity", 1), ("top3_accuracy", 3)):
            values = [float(one["metrics"][metric]) for one in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ({spread:.{digits}f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def error_tables() -> str:
    """Root mean squared error of prefix sums over S, for a few plans and epsilons; no training."""
    lines: list[str] = []
    for title, (devices, cohort, schedule, delta) in PLANS.items():
        heads = ["ε", "independent, sampled", "independent", *NAMES[1:]]
        lines += [f"{title}, δ = {delta:g}:", "", "| " + " | ".join(heads) + " |",
                  "| --- " * len(heads) + "|"]
        every = [make_factorisation(
            name, schedule, schedule.min_separation if name == "banded" else None
        ) for name in NAMES]
        for epsilon in (1.0, 2.0, 4.0, 8.0):
            worth = calibrate_noise(epsilon, delta, 1.0, 1, sampling="none", relation="zero_out")
            sampled = calibrate_noise(epsilon, delta, cohort / devices, schedule.rounds)
            errors = [sampled * math.sqrt((schedule.rounds + 1) / 2)]
            errors += [worth * one.mean_error(schedule) for one in every]
            cells = [f"{epsilon:g}", *(f"{error:.2f}" for error in errors)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.errors:
        print(error_tables())
        return
    runs = [one for arm in options.arms for one in runs_of(arm, options.seeds)]
    if options.json:
        print(json.dumps({"environment": environment(), "runs": runs, "table": table(runs)}))
    else:
        print(table(runs), error_tables(), sep="\n\n")


if __name__ == "__main__":
    main()
