"""Sottovoce's simulation beside apple/pfl-research: the same users, models, rounds and noise.

    python benchmarks/simulation.py --json --peer pfl > simulation.json
    python benchmarks/simulation.py --peer none --model bag --users 10000 --rounds 20
    python benchmarks/simulation.py --scale --json > scale.json

Every run is a process of its own; ours and the peer's take turns, and ratios are taken pair by
pair: medians of `--repeats`. Users, cohorts and models come from the bench in `--bench`, FedAvg
with central noise: one local epoch of SGD, lr 0.1, batches of 8, updates clipped to 1, one thread
a worker. Ours is the verb `simulate` with its files (`simulation_ours.py`), the peer's its own
`bench_pfl.py`. Before any clock starts both train three rounds without noise and with each user's
examples in their own order, where nothing is left to chance, and must end at the same loss.
`--privacy example` runs ours with per-example eDP-SGD on every device, `none,example` beside our
run without. Peak memory is that of training, before the final test; several processes' peaks are
added up. `--blazefl-venv DIR` runs BlazeFL beside them, from an environment that has its source
(`simulation_blazefl.py`). `--scale` compares rounds over the populations of `--users` and opens ten
million devices (`ten_million.py`), without the peer.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import simulation_peer
from simulation_measure import Figures, machine, measured, spread
from simulation_peer import peer_environment, peer_python
from simulation_tables import compared, speedups, table

from sottovoce.server.cli import ENVIRONMENT
from sottovoce.server.report_tables import environment

HERE = Path(__file__).parent
BENCH = HERE.parents[1] / "shared" / "bench"
ROUNDS = {"bag": 15, "lstm": 8, "lm": 4}
COHORTS = {"bag": 1000, "lstm": 200, "lm": 200}
SAME_LOSS = 1e-5
NO_CHANCE = "--local-lr 0.5 --clip 0.2 --noise 0 --cohort 60 --warmup 1".split()


def shared_arguments(
    options: argparse.Namespace, model: str, users: int, workers: int
) -> list[str]:
    given = {
        "--model": model, "--users": users, "--cohort": options.cohort or COHORTS[model],
        "--workers": workers,
        "--warmup": options.warmup, "--seed": options.seed, "--data": options.data,
    }
    return [str(word) for pair in given.items() for word in pair]


def ours(
    options: argparse.Namespace, model: str, users: int, workers: int, privacy: str, *more: str
) -> Figures:
    """A run of ours; noise and batches come from the operating system."""
    command = [
        sys.executable, str(HERE / "simulation_run.py"),
        *shared_arguments(options, model, users, workers), "--bench", str(options.bench),
        "--rounds", str(rounds_of(options, model)), "--privacy", privacy,
        *(f"--set={setting}" for setting in options.set), *more,
    ]
    found = measured(command, peer_environment(1) | ENVIRONMENT)
    return found | {"peak_memory_mib": found["peak_rss_mib"] + found["children_peak_mib"]}


def peers(
    options: argparse.Namespace,
    python: Path,
    model: str,
    users: int,
    workers: int,
    noise_seed: int,
    *more: str,
) -> Figures:
    alone = [str(HERE / "simulation_peer.py"), str(options.bench), str(noise_seed)]
    script = alone if workers == 1 else [str(options.bench / "bench_pfl.py")]  # its own children
    command = [
        str(python), *script,
        *shared_arguments(options, model, users, workers), "--threads", "1",
        "--iterations", str(rounds_of(options, model)), *more,
    ]
    found = measured(command, peer_environment(1))
    return found | {"peak_memory_mib": found["peak_rss_mib"] * workers}


def blazefls(
    options: argparse.Namespace, model: str, users: int, noise_seed: int, *more: str
) -> Figures:
    """A run of BlazeFL, which has neither workers of the same kind nor users made on the fly."""
    given = {
        "--bench": options.bench, "--model": model, "--users": users,
        "--cohort": options.cohort or COHORTS[model], "--warmup": options.warmup,
        "--iterations": rounds_of(options, model), "--seed": options.seed,
        "--noise-seed": noise_seed,
    }
    words = [str(word) for pair in given.items() for word in pair]
    python = str(options.blazefl_venv / "bin" / "python")
    found = measured(
        [python, str(HERE / "simulation_blazefl.py"), *words, *more], peer_environment(1)
    )
    return found | {"peak_memory_mib": found["peak_rss_mib"]}


def agreement(options: argparse.Namespace, python: Path, model: str) -> Figures:
    """Final losses where both sides must do the same: no noise, no shuffling."""
    report(f"{model}: both sides without noise and shuffling")
    users = options.users[0]
    mine = ours(options, model, users, 1, "none", *NO_CHANCE, "--rounds", "2", "--in-order")
    other = peers(options, python, model, users, 1, 0, *NO_CHANCE, "--iterations", "2")
    losses = {"ours": mine["test"]["loss"], "pfl": other["test"]["loss"]}
    if options.blazefl_venv is not None:
        third = blazefls(options, model, users, 0, *NO_CHANCE, "--iterations", "2")
        losses["blazefl"] = third["test"]["loss"]
    gap = max(abs(loss - losses["ours"]) for loss in losses.values())
    return {
        **losses, "difference": gap,
        "clipped_fraction": mine["clipped_fraction"], "passed": gap < SAME_LOSS,
    }


def rounds_of(options: argparse.Namespace, model: str) -> int:
    return options.rounds or ROUNDS[model]


def setting(
    options: argparse.Namespace, python: Path | None, model: str, users: int, workers: int
) -> Figures:
    """All runs of one model, population and number of workers, in turns."""
    arms: dict[str, list[Figures]] = {"none": [], "example": [], "pfl": [], "blazefl": []}
    for repeat in range(options.repeats):
        for privacy in options.privacy:
            report(f"{model}, {users} users, {workers} worker(s): ours, {privacy}, {repeat + 1}")
            arms[privacy].append(ours(options, model, users, workers, privacy))
        if python is not None:
            report(f"{model}, {users} users, {workers} worker(s): pfl, {repeat + 1}")
            arms["pfl"].append(peers(options, python, model, users, workers, repeat))
        if options.blazefl_venv is not None and workers == 1:
            report(f"{model}, {users} users: BlazeFL, {repeat + 1}")
            arms["blazefl"].append(blazefls(options, model, users, repeat))
    found: Figures = {
        "model": model, "users": users, "workers": workers,
        "cohort": options.cohort or COHORTS[model],
        "rounds": rounds_of(options, model), "runs": {k: v for k, v in arms.items() if v},
    }
    return found | compared(arms, model)


def scale(options: argparse.Namespace) -> Figures:
    """Seconds per round over populations in turns, and ten million devices from the start."""
    found: Figures = {"rounds": {}}
    for model in options.model:
        runs: dict[int, list[Figures]] = {users: [] for users in options.users}
        for repeat, users in product(range(options.repeats), options.users):
            report(f"{model}, {users} users, {repeat + 1}")
            runs[users].append(ours(options, model, users, 1, "none"))
        least = runs[options.users[0]]
        found["rounds"][model] = {
            str(users): {
                "clients_per_second": [run["clients_per_second"] for run in own],
                "seconds_to_least_population": spread(
                    [a["clients_per_second"] / b["clients_per_second"]
                     for a, b in zip(least, own, strict=True)]
                ),
            }
            for users, own in runs.items()
        }
    report("ten million devices")
    command = [sys.executable, str(HERE / "ten_million.py")]
    return found | {"ten_million": measured(command, peer_environment(1) | ENVIRONMENT)}


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", choices=["pfl", "none"], default="pfl")
    parser.add_argument("--peer-venv", type=Path, default=simulation_peer.DEFAULT_FOLDER)
    parser.add_argument("--blazefl-venv", type=Path, help="run it too, from this environment")
    parser.add_argument("--bench", type=Path, default=BENCH, help="folder of synth_users.py")
    parser.add_argument("--model", default="bag,lstm,lm")
    parser.add_argument("--users", type=numbers, default=[10_000, 1_000_000])
    parser.add_argument("--cohort", type=int, help=f"devices a round; usual: {COHORTS}")
    parser.add_argument("--rounds", type=int, help=f"timed ones; usual: {ROUNDS}")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before those")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=numbers, default=[1])
    parser.add_argument("--privacy", default="none", help="none, example or none,example")
    parser.add_argument("--threads", type=int, default=1, choices=[1])
    parser.add_argument("--seed", type=int, default=0, help="of users, cohorts and first weights")
    parser.add_argument("--data", choices=["cached", "fly"], default="cached")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of ours")
    parser.add_argument("--scale", action="store_true")
    options = parser.parse_args()
    options.model = options.model.split(",")
    options.privacy = options.privacy.split(",")
    if not (options.bench / "synth_users.py").exists():
        parser.error(f"--bench {options.bench} has no synth_users.py: name the bench's folder")
    if options.warmup < 1:
        parser.error(f"--warmup {options.warmup}: the peer's bench needs at least 1")
    for name in {*options.model} - {*ROUNDS}:
        parser.error(f"--model {name}: choose {', '.join(ROUNDS)}")
    for name in {*options.privacy} - {"none", "example"}:
        parser.error(f"--privacy {name}: choose none, example or none,example")
    return options


def main() -> None:
    options = parsed()
    result: dict[str, Any] = {"machine": machine(), "versions": environment()}
    if options.scale:
        print(json.dumps(result | scale(options), indent=1))
        return
    python = peer_python(options.peer_venv) if options.peer == "pfl" else None
    if python is not None:
        result["peer_versions"] = simulation_peer.versions(python)
        result["agreement"] = {m: agreement(options, python, m) for m in options.model}
    result["settings"] = [
        setting(options, python, model, users, workers)
        for model, users, workers in product(options.model, options.users, options.workers)
    ]
    result["workers"] = speedups(result["settings"])
    result["load_average_after"] = machine()["load_average"]
    print(json.dumps(result, indent=1) if options.json else table(result))


if __name__ == "__main__":
    main()
