"""Faults put into real runs, and which check of the audit flags each: a table, or JSON.

    python benchmarks/audit_faults.py [--seeds 20] [--faults noise_halved …] [--json FILE]

Every run is a small federated one through `sottovoce simulate`'s own code, with canary devices and
one fault patched into it; the correct run is among them. Nothing in the package knows of faults.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from sottovoce.client import descents
from sottovoce.client.round_sum import RoundSum
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.audit.checks import Check
from sottovoce.privacy.audit.device_checks import run_checks
from sottovoce.privacy.audit.device_record import load_record
from sottovoce.privacy.mechanisms.device import DeviceMechanism
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate
from sottovoce.strategies.noised_sum import NoisedSum

RUN = (
    "population=assistant", "population.devices=50", "population.held_out_devices=2",
    "cohort_size=50", "rounds=24", "population.max_examples_per_round=8",
    "model.embedding_size=8", "model.hidden_size=8",
    "strategy=fedavg", "strategy.sampler=uniform", "strategy.learning_rate=0.5",
    "strategy.batch_size=8", "privacy=device", "privacy.device.epsilon=null",
    "privacy.device.noise_multiplier=1", "audit.device_canaries=100", "audit.canary_activity=64",
    "run.evaluation_devices=2", "run.evaluate_every=100", "run.checkpoint_every=100",
    "run.workers=1", "run.report=false", "run.progress=false",
)
Release = Callable[..., dict[str, Any]]
REAL_RELEASE: Release = DeviceMechanism.release
REAL_ADD = RoundSum.add
REAL_FINISHED = descents.finished
REAL_SUM = NoisedSum._release


def scaled_noise(factor: float, only: str = "") -> Any:
    """Noise times `factor`, in parameters whose name contains `only`."""
    def release(self: DeviceMechanism, sums: Any, local: float, generator: Any) -> Any:
        noised = REAL_RELEASE(self, sums, local, generator)
        return {
            name: sums[name] + factor * (value - sums[name]) if only in name else value
            for name, value in noised.items()
        }

    return mock.patch.object(DeviceMechanism, "release", release)


def reused_noise(first: int) -> Any:
    """The noise of round `first` again in every later one."""
    def summed(self: NoisedSum, total: Any, server_round: int) -> Any:
        return REAL_SUM(self, total, min(server_round, first))

    return mock.patch.object(NoisedSum, "_release", summed)


def unclipped() -> Any:
    """Updates that are handed over as they are."""
    return mock.patch.object(
        descents, "finished", lambda signal, bound: REAL_FINISHED(signal, None)
    )


def weighted_by_examples() -> Any:
    """Devices that weigh as many examples as they have, over a mean of 4."""
    def add(self: RoundSum, draws: Any, data: Any, updates: Any) -> None:
        weights = np.array([draw.rows / 4 for draw in draws], dtype=np.float32)
        for tensor in updates.signal.values():
            tensor *= descents.torch.from_numpy(weights).view(-1, *[1] * (tensor.dim() - 1))
        REAL_ADD(self, draws, data, updates)

    return mock.patch.object(RoundSum, "add", add)


def realised_divisor() -> Any:
    """A noised sum over the number of devices that are in it, not the expected one."""
    def summed(self: NoisedSum, total: Any, server_round: int) -> Any:
        release, deviation = REAL_SUM(self, total, server_round)
        factor = self.divisor / max(sum(total.devices_by_level.values()), 1)
        return {name: tensor * factor for name, tensor in release.items()}, deviation

    return mock.patch.object(NoisedSum, "_release", summed)


@contextmanager
def correct() -> Iterator[None]:
    """The run as it is."""
    yield


# Fault -> (how it is put in, checks of which one at least must flag it).
FAULTS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "none": (correct, ()),
    "noise_halved": (lambda: scaled_noise(0.5), ("noise_level",)),
    "noise_over_root_n": (lambda: scaled_noise(50**-0.5), ("noise_level",)),
    "no_noise": (lambda: scaled_noise(0.0), ("noise_level",)),
    "no_noise_in_one_layer": (lambda: scaled_noise(0.0, "heads.intent.weight"), ("noise_level",)),
    "noise_reused": (lambda: reused_noise(1), ("noise_reuse",)),
    "noise_reused_once": (lambda: reused_noise(15), ("noise_reuse",)),
    "no_clipping": (unclipped, ("clipping",)),
    "weighted_by_examples": (weighted_by_examples, ("weighting",)),
    "realised_divisor": (realised_divisor, ("noise_level", "divisor")),
}


def run_with(fault: str, seed: int, folder: Path, *overrides: str) -> tuple[Check, ...]:
    """The checks of a run in `folder` (which must not exist) with a fault put into it."""
    folder.mkdir(parents=True)
    with FAULTS[fault][0]():
        simulate(compose([*RUN, f"seed={seed}", *overrides]), folder)
    record = load_record(folder)
    assert record is not None
    return run_checks(record, Ledger.load(folder / "ledger.json"))


def _p_value(check: dict[str, Any]) -> float:
    return 1.0 if check["p_value"] is None else float(check["p_value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found: dict[str, Any] = {}
    for fault in chosen.faults:
        began, runs = time.perf_counter(), []
        for seed in range(chosen.seeds):
            with tempfile.TemporaryDirectory() as folder:
                with open(os.devnull, "w") as quiet:
                    before, sys.stdout = sys.stdout, quiet
                    try:
                        checks = run_with(fault, seed, Path(folder) / "run")
                    finally:
                        sys.stdout = before
            runs.append({check.name: check.record() for check in checks})
        flagged = {
            name: sum(run[name]["verdict"] == "FLAGGED" for run in runs) for name in runs[0]
        }
        named = FAULTS[fault][1]
        missed = sum(
            not any(run[name]["verdict"] == "FLAGGED" for name in named) for run in runs
        ) if named else 0
        found[fault] = {
            "runs": len(runs), "flagged": flagged, "named": list(named), "missed": missed,
            "largest_p": {
                name: max(_p_value(run[name]) for run in runs) for name in named
            },
            "smallest_p": {
                name: min(_p_value(run[name]) for run in runs) for name in runs[0]
            },
            "seconds_a_run": round((time.perf_counter() - began) / len(runs), 2),
        }
        words = ", ".join(f"{name} {count}" for name, count in flagged.items() if count)
        print(f"{fault:22s} {len(runs)} runs: {words or 'nothing flagged'}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
