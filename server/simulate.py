"""`sottovoce simulate`: the coordinator over one in-process fleet."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from flwr.app import Context, RecordDict, UserConfig
from omegaconf import DictConfig
from rich.console import Console

from sottovoce.client.app import app as client_app
from sottovoce.server.app import app as server_app
from sottovoce.server.app import outcomes
from sottovoce.server.checkpoints import write_atomic
from sottovoce.server.progress import final_table
from sottovoce.server.setup import settings_text
from sottovoce.simulations.experiment import SECRET_FOLDER, close_fleets
from sottovoce.simulations.grid import LocalGrid

INTERRUPTED = 130


def simulate(config: DictConfig, folder: Path) -> int:
    """Run (or, with `config.resume`, continue) a simulation in `folder`; the exit code.

    One thread computes: on small models two threads that wait for each other are slower than one.
    """
    torch.set_num_threads(1)
    resume = config.resume is not None
    if not resume:
        write_atomic(folder / "config.yaml", settings_text(config).encode())
    given: UserConfig = {
        "folder": str(folder), "resume": resume, "progress": bool(config.run.progress)
    }
    grid = LocalGrid(client_app, {}, [{SECRET_FOLDER: str(folder / "checkpoints")}])
    context = Context(grid.run.run_id, 1, {}, RecordDict(), given)
    try:
        server_app(grid, context)
    except Exception:
        if not resume and not (folder / "metrics.jsonl").exists():
            _clear(folder)
        raise
    finally:
        close_fleets()
    outcome = outcomes.pop(str(folder))
    console = Console()
    report = folder / "report.html" if config.run.report else None
    console.print(final_table(outcome.summary, report))
    if outcome.reason:
        console.print(outcome.reason, markup=False, highlight=False, soft_wrap=True)
    if outcome.status == "interrupted":
        console.print(
            f"interrupted after round {outcome.summary['rounds']}; go on with: "
            f"sottovoce simulate resume={folder}",
            markup=False, highlight=False, soft_wrap=True,
        )
        return INTERRUPTED
    return 0


def _clear(folder: Path) -> None:
    """Take back what a run wrote that could not begin, so that its folder can be used again."""
    (folder / "config.yaml").unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
