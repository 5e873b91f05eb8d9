"""Codes read out of federated models, with and without what is said to prevent it.

    python benchmarks/extraction.py --json > extraction.json

SNIPS on 450 devices, and 8 devices more that say a code canary each, 100 times. The arms are the
mitigations of Parikh et al. 2022 (arXiv:2203.13920), dropout and early stopping, and differential
privacy. Every run is attacked by model inversion and ranked by exposure. Prints a Markdown table,
or JSON with every canary.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sottovoce.client.examples import Examples
from sottovoce.privacy.audit.code_canaries import CodeCanary, canary_lines, draw_canaries
from sottovoce.privacy.audit.code_exposure import expose_from_run
from sottovoce.privacy.audit.extraction import extract_from_run
from sottovoce.server.report_tables import environment
from sottovoce.server.runs import load_run
from sottovoce.server.settings import compose
from sottovoce.server.simulate import simulate
from sottovoce.simulations.jsonl import JsonlPopulation
from sottovoce.simulations.population import Population

ARMS = {
    "none": ["privacy=none"],
    "dropout 0.3": ["privacy=none", "model.dropout=0.3"],
    "dropout 0.6": ["privacy=none", "model.dropout=0.6"],
    "stopped after 8 rounds": ["privacy=none", "rounds=8"],
    "device-level ε = 100": ["privacy=device", "privacy.device.epsilon=100"],
    "device-level ε = 8": ["privacy=device", "privacy.device.epsilon=8"],
    "example-level ε = 8": [
        "privacy=example", "privacy.example.noise_multiplier=null", "privacy.example.epsilon=8",
        "privacy.example.max_participations=30",
    ],
}
COMMON = [
    "population=jsonl",
    "task=intent_slots",
    "model=bilstm_small",
    "cohort_size=200",
    "strategy=fedadam",
    "strategy.max_rate=0.6",
    "strategy.local_epochs=1",
    "strategy.server_learning_rate=0.05",
    "run.evaluate_every=100",
    "run.report=false",
    "run.progress=false",
]


def lines_of(population: Population, examples: Examples, owner: str) -> list[str]:
    """JSON lines of examples, device k said by user `owner` k."""
    schema, found = population.schema, []
    devices = np.repeat(np.arange(examples.devices), np.diff(examples.device_offsets))
    assert examples.intent is not None and examples.slots is not None
    for row, device in enumerate(devices.tolist()):
        here = slice(examples.offsets[row], examples.offsets[row + 1])
        tokens = [population.words[token] for token in examples.tokens[here]]
        found.append(json.dumps({
            "user_id": f"{owner} {device}",
            "text": " ".join(tokens),
            "tokens": tokens,
            "intent": schema.intents[examples.intent[row]],
            "slots": [schema.slots[tag] for tag in examples.slots[here]],
        }))
    return found


def write_data(folder: Path, count: int, copies: int, seed: int) -> list[CodeCanary]:
    """Training and test file with `count` canaries, a device each."""
    source = Path(os.environ.get("SOTTOVOCE_DATA", "../shared/data")) / "snips.train.jsonl.gz"
    population = JsonlPopulation(source, users="assigned", devices=500, held_out_fraction=0.1)
    training = population.examples(np.arange(len(population)))
    found = draw_canaries(count, generator=np.random.default_rng(seed), schema=population.schema)
    lines = lines_of(population, training, "device")
    for number, canary in enumerate(found):
        said = canary_lines(canary, f"canary {number}", copies=copies)
        lines += [json.dumps(line) for line in said]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    test = lines_of(population, population.held_out_devices(), "held out")
    (folder / "test.jsonl").write_text("\n".join(test), encoding="utf-8")
    return found


def run(arm: str, folder: Path, canaries: Sequence[CodeCanary], options: Any) -> dict[str, Any]:
    """One arm: trained, attacked twice."""
    target = folder / arm.replace(" ", "-")
    target.mkdir()
    config = compose([
        *COMMON, f"population.path={folder / 'train.jsonl'}", "population.held_out_fraction=0",
        f"population.test_path={folder / 'test.jsonl'}", f"rounds={options.rounds}",
        f"seed={options.seed}", *ARMS[arm],
    ])
    simulate(config, target)
    finished = load_run(target)
    return {
        "arm": arm,
        "metrics": finished.summary["metrics"],
        "epsilon": finished.summary["epsilon"],
        "inversion": extract_from_run(finished, canaries).record(),
        "exposure": expose_from_run(finished, canaries).record(),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Utility beside what was read out."""
    lines = [
        "| arm | intent accuracy | slot F1 | digits right | p | whole codes | exposure, bits | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in runs:
        metrics, attack = one["metrics"], one["inversion"]
        low, high = attack["interval"]
        lines.append(
            f"| {one['arm']} | {metrics['accuracy']:.3f} | {metrics['slot_f1']:.3f} | "
            f"{attack['value']:.2f} [{low:.2f}, {high:.2f}] | {attack['p_value']:.1g} | "
            f"{attack['figures']['exact']:.2f} | {one['exposure']['value']:.1f} | "
            f"{one['exposure']['p_value']:.1g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--canaries", type=int, default=8)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canaries = write_data(folder, options.canaries, options.copies, options.seed)
        runs = []
        for arm in options.arms:
            runs.append(run(arm, folder, canaries, options))
            print(table(runs[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"environment": environment(), "runs": runs, "table": table(runs)}))
    else:
        print(table(runs))


if __name__ == "__main__":
    main()
