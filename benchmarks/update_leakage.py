"""What one device's update gives away, by model and by how much noise the device adds.

    python benchmarks/update_leakage.py --json > update_leakage.json

Devices of the generated assistant population send their first update; both probes read it. Prints
a Markdown table, or JSON with every device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sottovoce.client.batches import BatchPlan
from sottovoce.client.fleet import ExampleClipping, LocalTraining
from sottovoce.client.models import make_model
from sottovoce.client.tasks import make_task
from sottovoce.client.vocabulary import make_vocabulary
from sottovoce.privacy.audit.leakage import Leakage
from sottovoce.privacy.audit.update_leakage import update_leakage
from sottovoce.server.report_tables import environment
from sottovoce.simulations.assistant import AssistantPopulation

MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "bilstm": ("intent_slots", {"embedding_size": 64, "hidden_size": 64}),
    "transformer": ("intent_slots", {"hidden_size": 64, "layers": 2, "heads": 4}),
    "lstm": ("next_word", {"embedding_size": 64, "hidden_size": 128}),
    "causal_transformer": ("next_word", {"hidden_size": 128, "layers": 2, "heads": 4}),
}
ONE_STEP = BatchPlan(32, local_epochs=1, max_examples=32, poisson=False)
STEPS = BatchPlan(8, local_epochs=2, max_examples=32, poisson=False)
COINS = BatchPlan(8, local_epochs=1, max_examples=32, poisson=True)
NOISES = (0.0, 0.002, 0.01, 0.05, 0.25, 1.0)
TRAININGS = {
    "one step, no noise": LocalTraining(0.5, ONE_STEP, None, None),
    "several steps, clipped to 0.3": LocalTraining(0.5, STEPS, None, 0.3),
    **{
        f"examples clipped, noise multiplier {noise:g}": LocalTraining(
            0.5, COINS, ExampleClipping(1.0, noise), None
        )
        for noise in NOISES
    },
}


def measure(name: str, training: LocalTraining, devices: int, seed: int) -> list[Leakage]:
    """Both probes on devices with 4 to 15 examples."""
    population = AssistantPopulation(devices=2000, held_out_devices=5, seed=seed)
    task_name, sizes = MODELS[name]
    vocabulary = make_vocabulary("grammar", population)
    task = make_task(
        task_name, vocabulary=vocabulary, schema=population.schema, words=population.words,
        max_length=32,
    )
    model = make_model(name, task, generator=torch.Generator().manual_seed(seed), **sizes)
    usual = np.flatnonzero((population.activity >= 4) & (population.activity < 16))[:devices]
    return update_leakage(
        population, task, model, training, devices=[int(i) for i in usual], seed=seed
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Recall and precision of either probe."""
    lines = [
        "| model | local training | rows: recall | precision | AUC | span: recall | precision | "
        "seconds a device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in runs:
        cells = [one["model"], one["training"]]
        for probe in (one["update_rows"], one["update_span"]):
            names = ("recall", "precision", "auc") if probe is one["update_rows"] else (
                "recall", "precision",
            )
            cells += [f"{probe['figures'][n]:.2f}" if probe["figures"] else "–" for n in names]
        seconds = one["update_rows"]["seconds"] + one["update_span"]["seconds"]
        cells.append(f"{seconds / max(1, len(one['update_rows']['rows'])):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for name in options.models:
        for label, training in TRAININGS.items():
            found = measure(name, training, options.devices, options.seed)
            probes = {probe.name: probe.record() for probe in found}
            runs.append({"model": name, "training": label, **probes})
    if options.json:
        print(json.dumps({"environment": environment(), "runs": runs, "table": table(runs)}))
    else:
        print(table(runs))


if __name__ == "__main__":
    main()
