"""Ten million devices: how long they take to open, what three rounds take, and in how much memory.

    python benchmarks/ten_million.py

Runs `sottovoce simulate` on the assistant population in a process of its own and prints JSON:
seconds to import, to open the population, to build the sampler, for each round, and peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=10_000_000)
    parser.add_argument("--cohort", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    began = time.perf_counter()
    from sottovoce.privacy.mechanisms.noise import NoiseSource
    from sottovoce.server.report_tables import environment
    from sottovoce.server.settings import compose
    from sottovoce.server.setup import settings_text
    from sottovoce.server.simulate import simulate
    from sottovoce.simulations.experiment import build_experiment
    from sottovoce.strategies.samplers import make_sampler

    imported = time.perf_counter()
    config = compose([
        f"population.devices={options.devices}", f"cohort_size={options.cohort}",
        f"rounds={options.rounds}", "run.report=false", "run.progress=false",
    ])
    experiment = build_experiment(settings_text(config))
    opened = time.perf_counter()
    sampler = make_sampler(
        config.strategy, experiment.population, config.cohort_size,
        source=NoiseSource.from_system(), private=True,
    )
    built = time.perf_counter()
    cohort = len(sampler.sample(1))
    drawn = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        simulate(config, Path(folder))
        records = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    print(json.dumps({
        "devices": options.devices,
        "import_s": round(imported - began, 2),
        "open_s": round(opened - imported, 2),
        "sampler_s": round(built - opened, 2),
        "draw_cohort_ms": round(1000 * (drawn - built), 2),
        "cohort": cohort,
        "round_s": [round(json.loads(line).get("seconds", 0), 2) for line in records[1:]],
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "environment": environment(),
    }, indent=1))


if __name__ == "__main__":
    main()
