"""What clipping micro-batches buys in time over clipping examples, on this engine.

    python benchmarks/micro_batches.py --json > micro_batches.json

One thread; the bi-LSTM and the encoder of `edp_sgd_models.py`, batches of 32 and 128, micro-batches
of 2, 4 and 8 with members by coin: in this engine, and as plain autograd would do it, one backward
pass for each. A sample is a forward pass and the clipped sums, without noise
and optimiser. Arms are interleaved in every round, and ratios are taken round by round: medians of
at least 7. Beside them epsilon at q = 0.01, 1,000 steps, delta 1e-5, noise sigma C with sigma = 1.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from edp_sgd_models import Case, make_case

from sottovoce.privacy import Clipping, EpsilonTracker
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import track
from sottovoce.privacy.gradients.micro_batches import MicroBatches, count_of
from sottovoce.privacy.optimizer.releases import Release
from sottovoce.privacy.optimizer.schedule import NoiseSchedule
from sottovoce.server.report_tables import environment

MODELS, ROWS, SIZES = ("bilstm", "encoder"), (32, 128), (2, 4, 8)
LEAST_SECONDS = 0.2
Step = Callable[[], Any]


def plain(case: Case) -> Step:
    parameters = list(case.model.parameters())
    return lambda: torch.autograd.grad(case.losses(case.model, case.batch).sum(), parameters)


def per_example(case: Case) -> Step:
    grouped = track(case.model)
    return lambda: backward(grouped, case.losses(grouped.module, case.batch), Clipping(1.0), 1)


def micro_batch(case: Case, size: int) -> Step:
    grouped, coins = track(case.model), np.random.default_rng(size)
    rule, rows = Clipping(1.0, "micro_batch"), case.rows()

    def step() -> None:
        micro = MicroBatches.drawn(rows, count_of(rows, size), coins)
        backward(grouped, case.losses(grouped.module, case.batch), rule, 1, micro)

    return step


def one_by_one(case: Case, size: int) -> Step:
    """The mode without an engine: plain autograd, one micro-batch after another."""
    parameters, coins = list(case.model.parameters()), np.random.default_rng(size)

    def step() -> None:
        micro = MicroBatches.drawn(case.rows(), count_of(case.rows(), size), coins)
        total = [torch.zeros_like(p) for p in parameters]
        for unit in micro.unit.unique():
            own = tuple(part[micro.unit == unit] for part in case.batch)
            mean = torch.autograd.grad(case.losses(case.model, own).mean(), parameters)
            norm = torch.stack([g.square().sum() for g in mean]).sum().sqrt()
            for kept, g in zip(total, mean, strict=True):
                kept.add_(g.mul_((1 / norm).clamp(max=1.0)))

    return step


def seconds(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each arm in every round; the order is drawn anew each time."""
    inner = {n: max(1, math.ceil(LEAST_SECONDS / timed(step, 2))) for n, step in steps.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(steps), len(steps)):
            found[name].append(timed(steps[name], inner[name]))
    return found


def timed(step: Step, times: int) -> float:
    step()
    began = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - began) / times


def ratio(mine: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def measured(model: str, rows: int, repeats: int) -> dict[str, Any]:
    """Ratios of every arm to plain autograd and to per-example clipping."""
    case = make_case(model, rows, "cpu")
    steps = {"plain": plain(case), "per_example": per_example(case)}
    for size in SIZES:
        steps[f"micro_batch {size}"] = micro_batch(case, size)
        steps[f"one_by_one {size}"] = one_by_one(case, size)
    found = seconds(steps, repeats)
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(own),
            "to_plain": ratio(own, found["plain"]),
            "to_per_example": ratio(own, found["per_example"]),
        }
        for name, own in found.items()
    }


def spent(mode: Any) -> float:
    release = Release(Clipping(1.0, mode), NoiseSchedule(1.0), 1.0, 0.01)
    events = [release.event(step) for step in range(1000)]
    return EpsilonTracker(1e-5, unit="example", events=events).epsilon()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, 7 at least")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": platform.machine(), "versions": environment(), "threads": 1,
        "epsilon": {mode: spent(mode) for mode in ("per_example", "micro_batch")}, "models": {},
    }
    for model in arguments.models:
        for rows in arguments.rows:
            found = measured(model, rows, max(7, arguments.repeats))
            result["models"].setdefault(model, {})[str(rows)] = found
            line = ", ".join(f"{name} {arm['to_plain']:.2f}" for name, arm in found.items())
            print(f"{model}, {rows} rows, to plain: {line}", flush=True,
                  file=sys.stderr if arguments.json else sys.stdout)
    print(json.dumps(result, indent=1) if arguments.json else f"epsilon: {result['epsilon']}")


if __name__ == "__main__":
    main()
