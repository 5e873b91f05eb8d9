"""Examples for the demo in compose.yaml: a public file, and one for each device.

    python demo_examples.py FOLDER DEVICES

Requests come from the voice assistant's grammar (population=assistant): nobody ever said them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sottovoce.client.examples import Examples
from sottovoce.simulations import AssistantPopulation

EACH = 200  # examples of a device
PUBLIC = 1000


def main(folder: Path, devices: int) -> None:
    """Write `folder`/public.jsonl and device-1.jsonl, device-2.jsonl, ..."""
    population = AssistantPopulation(devices=10_000, seed=0)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "public.jsonl", rows(population, population.held_out_devices(500)), PUBLIC)
    busy = np.flatnonzero(population.activity >= EACH)[:devices]
    for number, device in enumerate(busy, start=1):
        examples = population.examples(np.array([device]))
        write(folder / f"device-{number}.jsonl", rows(population, examples), EACH)


def rows(population: AssistantPopulation, examples: Examples) -> Iterator[dict[str, object]]:
    """Examples as a device's app would add them."""
    assert examples.intent is not None and examples.slots is not None
    for number in range(len(examples)):
        place = slice(examples.offsets[number], examples.offsets[number + 1])
        yield {
            "tokens": [population.words[token] for token in examples.tokens[place]],
            "intent": population.schema.intents[examples.intent[number]],
            "slots": [population.schema.slots[tag] for tag in examples.slots[place]],
        }


def write(path: Path, found: Iterator[dict[str, object]], most: int) -> None:
    lines = [json.dumps(row) for row, _ in zip(found, range(most), strict=False)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} examples")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
