"""What a thousand canaries prove: without privacy, and at an epsilon of 8.

    python benchmarks/audit_canaries.py --json > audit_canaries.json

SNIPS on few devices, which train long enough to know single examples by heart. Every arm has 1,000
candidates (500 or so of them in); `sottovoce audit` tests all of them, with shares to guess that
are declared here and all count (Bonferroni), as do the attacks.
The arm without privacy is also run without canaries: what they cost. Prints a Markdown table, or
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sottovoce.privacy.audit.canary_attacks import CANARY_ATTACKS
from sottovoce.privacy.audit.run import AuditConfig, run_audit
from sottovoce.server.report_tables import environment
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate

FEW_DEVICES = [
    "population.devices=3", "cohort_size=2", "strategy=fedavg", "strategy.sampler=uniform",
    "strategy.device_optimizer=adam", "strategy.learning_rate=0.005", "strategy.batch_size=16",
    "strategy.local_epochs=6", "strategy.max_rate=1", "population.max_examples_per_round=20000",
    "rounds=3",
]
MANY_DEVICES = ["cohort_size=100", "rounds=10", "strategy.max_rate=1"]
EXAMPLE = [
    "privacy=example", "privacy.example.noise_multiplier=null", "privacy.example.epsilon=8",
    "privacy.example.max_participations=3",
]
DEVICE = ["privacy=device", "privacy.device.epsilon=8"]
PLAIN = [*FEW_DEVICES, "privacy=none"]
ARMS = {
    "mislabelled, no privacy": ["mislabelled", *PLAIN],
    "mislabelled, example-level ε = 8": ["mislabelled", *FEW_DEVICES, *EXAMPLE],
    "mislabelled, device-level ε = 8": ["mislabelled", *MANY_DEVICES, *DEVICE],
    "unique tokens, no privacy": ["unique_token", *PLAIN],
    "natural, no privacy": ["natural", *PLAIN],
}
COMMON = ["population=snips", "run.evaluate_every=100", "run.report=false", "run.progress=false",
          "audit.number=1000"]
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.45)
LEADING = "accuracy"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        without = trained(Path(folder) / "plain", ["none", *PLAIN], given.seed)
        arms = {name: measured(Path(folder), name, given.seed) for name in given.arms}
    record = {
        "environment": environment(), "seed": given.seed, "arms": arms,
        "without_canaries": {LEADING: without["metrics"][LEADING], "seconds": without["seconds"]},
    }
    print(json.dumps(record, indent=2) if given.json else table(record))


def trained(folder: Path, arm: list[str], seed: int) -> dict[str, Any]:
    """A run of an arm in `folder`; its summary."""
    folder.mkdir(parents=True)
    canaries, *others = arm
    with contextlib.redirect_stdout(io.StringIO()):
        simulate(compose([*COMMON, *others, f"audit.canaries={canaries}", f"seed={seed}"]), folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def measured(parent: Path, name: str, seed: int) -> dict[str, Any]:
    """One arm, trained and audited."""
    folder = parent / f"arm {list(ARMS).index(name)}"
    summary = trained(folder, ARMS[name], seed)
    started = time.perf_counter()
    fit = [attack for attack in CANARY_ATTACKS if attack.task is None]
    attacks, cheap = ([a.name for a in fit], [a.name for a in fit if not a.optional])
    found = {}
    for kind, chosen in (("default", cheap), ("with references", attacks)):
        with contextlib.redirect_stdout(io.StringIO()):
            run_audit(AuditConfig(run=str(folder), attacks=chosen, guesses=list(SHARES)))
        found[kind] = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    audit = found["default"]
    claim = next(claim for claim in audit["claims"] if claim["unit"] == "example")
    return {
        "settings": ARMS[name],
        "seconds_to_train": summary["seconds"],
        "seconds_to_audit": time.perf_counter() - started,
        LEADING: summary["metrics"][LEADING],
        "epsilon_claimed": claim["epsilon"],
        "verdict": audit["verdict"],
        "reason": audit["reason"],
        "epsilon_lower_bound": max(one["epsilon_lower_bound"] for one in audit["attacks"]),
        "ceiling": max(one["ceiling"] for one in audit["attacks"]),
        "attacks": {
            one["name"]: {key: one[key] for key in (
                "auc", "auc_ci", "tpr_at_fpr", "epsilon_lower_bound", "n_members", "n_non_members",
                "seconds",
            )}
            for one in [*audit["attacks"], *(
                one for one in found["with references"]["attacks"] if one["name"] not in cheap
            )]
        },
    }


def table(record: dict[str, Any]) -> str:
    """The arms in Markdown."""
    plain = record["without_canaries"]
    lines = [
        f"Without canaries: accuracy {plain[LEADING]:.3f}.",
        "",
        "| canaries | accuracy | ε claimed | ε at least | ceiling | AUC by attack |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in record["arms"].items():
        claimed = "∞" if arm["epsilon_claimed"] is None else f"{arm['epsilon_claimed']:.2f}"
        aucs = ", ".join(
            f"{attack.removeprefix('canary_')} {one['auc']:.3f}"
            for attack, one in arm["attacks"].items()
        )
        lines.append(
            f"| {name} | {arm[LEADING]:.3f} | {claimed} | {arm['epsilon_lower_bound']:.2f} | "
            f"{arm['ceiling']:.2f} | {aucs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
