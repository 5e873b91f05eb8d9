"""Activity against uniform sampling on a heavy-tailed population: utility, and epsilon per level.

    python benchmarks/activity_sampling.py --json > activity.json

Same population, cohort size, rounds and seeds for every arm. The first three share the noise
multiplier and differ in the sampler; the last samples uniformly and spends, in the worst case, what
the capped one costs. Prints a Markdown table, or JSON with every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sottovoce.server.report_tables import environment
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate

ARMS = {
    "uniform": ["strategy.sampler=uniform"],
    "activity, linear": ["strategy.max_rate=1"],
    "activity, linear, rate <= 0.02": ["strategy.max_rate=0.02"],
    "uniform, less noise: worst ε 3.64": [
        "strategy.sampler=uniform",
        "privacy.device.noise_multiplier=null",
        "privacy.device.epsilon=3.64",
    ],
}
COMMON = [
    "population.devices=100000",
    "population.preset=chat",
    "population.max_examples_per_round=16",
    "cohort_size=200",
    "privacy=device",
    "privacy.device.epsilon=null",
    "privacy.device.noise_multiplier=0.7",
    "strategy=fedadam",
    "strategy.server_learning_rate=0.08",
    "strategy.beta1=0.7",
    "run.evaluation_devices=300",
    "run.evaluate_every=100",
    "run.report=false",
    "run.progress=false",
]
LEVELS = (0, 4, 8, 12)


def run(arm: str, seed: int, rounds: int) -> dict[str, Any]:
    """Summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*COMMON, *ARMS[arm], f"seed={seed}", f"rounds={rounds}"])
        target = Path(folder) / "run"
        target.mkdir()
        simulate(config, target)
        summary: dict[str, Any] = json.loads((target / "summary.json").read_text())
    return {"arm": arm, "seed": seed, **{k: summary[k] for k in ("metrics", "epsilon", "levels")}}


def table(runs: list[dict[str, Any]]) -> str:
    """Mean (standard deviation) of the seeds' accuracy, epsilon at some levels."""
    lines = [
        "| sampler | intent accuracy | slot F1 | "
        + " | ".join(f"ε at {1 << level:,} examples" for level in LEVELS)
        + " | worst ε |",
        "| --- | --- | --- | " + "--- | " * (len(LEVELS) + 1),
    ]
    for arm in dict.fromkeys(r["arm"] for r in runs):
        mine = [r for r in runs if r["arm"] == arm]
        found = {
            row["level"]: row["epsilon"] for row in mine[0]["epsilon"]["device"]["by_level"]
        }
        cells = [_spread([r["metrics"][m] for r in mine]) for m in ("accuracy", "slot_f1")]
        cells += [f"{found[level]:.3g}" if level in found else "–" for level in LEVELS]
        cells.append(f"{mine[0]['epsilon']['device']['epsilon']:.3g}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ({spread:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = []
    for seed in range(1, options.seeds + 1):
        for arm in options.arms:
            runs.append(run(arm, seed, options.rounds))
            print(arm, seed, runs[-1]["metrics"], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"environment": environment(), "runs": runs, "table": table(runs)}))
    else:
        print(table(runs))


if __name__ == "__main__":
    main()
