"""A device's training does without torch's compiler: its import would take seconds and 100 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
from live_devices import live_update, spec_of
from small_fleets import NOISED, SIZES, fleet, parts
from sottovoce.privacy.mechanisms.noise import NoiseSource

population, task, model = parts("bilstm")
start = {name: p.detach().clone() for name, p in model.named_parameters()}
for example in (None, NOISED):
    training = fleet("bilstm", example, 0.3).training
    spec = spec_of(task, model, "bilstm", SIZES["bilstm"], training)
    live_update(spec, population, start, 17, 3, 1, NoiseSource.from_seed(1))
print(json.dumps([name for name in ("torch._dynamo", "torch._inductor", "sympy")
                  if name in sys.modules]))
"""


def test_training_imports_neither_compiler_nor_computer_algebra() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == []
