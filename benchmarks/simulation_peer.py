"""apple/pfl-research in a virtual environment of its own, and how its bench is started.

    python simulation_peer.py BENCH_FOLDER NOISE_SEED [options of bench_pfl.py]

runs the peer's `bench_pfl.py` as it is, in that environment, with the noise drawn from another seed
than users, cohorts and first weights, so that the spread of its final loss can be seen.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch==2.13.0", "pfl[pytorch]==0.6.0")
DEFAULT_FOLDER = Path(__file__).parents[1] / "build" / "pfl"
PROBE = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({n: m.version(n) for n in ('pfl', 'torch', 'numpy')}))"
)


def peer_python(folder: Path) -> Path:
    """The interpreter of the peer's environment, which is made on first use.

    Raises SystemExit, saying why and what to do, where it cannot be made.
    """
    python = folder / "bin" / "python"
    marker = folder / ".installed"
    if python.exists() and (marker.exists() or versions(python)):
        return python
    print(f"installing {' '.join(PACKAGES)} into {folder}: a few minutes, once", file=sys.stderr)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(refusal(folder, done.stderr))
    marker.touch()
    return python


def refusal(folder: Path, complaint: str) -> str:
    """What to say where the environment could not be made."""
    lines = [line for line in complaint.splitlines() if line.strip()] or ["no reason given"]
    return (
        f"pfl could not be installed into {folder}: {lines[-1].strip()}\n"
        f"make that environment by hand (pip install {' '.join(PACKAGES)}) and name it with "
        "--peer-venv, or measure without it: --peer none"
    )


def versions(python: Path) -> dict[str, str]:
    """Versions of the peer's packages; empty where it is not installed."""
    import json

    done = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def peer_environment(threads: int) -> dict[str, str]:
    """Like ours: the given threads, which yield while they wait."""
    return {
        **os.environ, "PFL_PYTORCH_DEVICE": "cpu", "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
    }


def run_with_noise_seed(bench: Path, seed: int, arguments: list[str]) -> None:
    """Run `bench_pfl.py` here; noise follows `seed` from the first model on."""
    import numpy as np
    import torch

    sys.path.insert(0, str(bench))
    import models

    make_model = models.make_model

    def then_reseed(name: str, model_seed: int) -> Any:
        model = make_model(name, model_seed)
        torch.manual_seed(seed)
        np.random.seed(seed)
        return model

    models.make_model = then_reseed
    script = str(bench / "bench_pfl.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run_with_noise_seed(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
