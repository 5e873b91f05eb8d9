"""The Flower ServerApp: the same coordinator on every grid.

In process, `sottovoce simulate` hands over a run folder. Under Flower's own runtime (`flwr run .`)
the settings come from the app's `overrides`, written as on the command line of `simulate`, and the
folder is made where the SuperLink was started.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig
from rich.console import Console

from sottovoce.client.errors import RunError
from sottovoce.server.checkpoints import write_atomic
from sottovoce.server.limits import validate
from sottovoce.server.live_limits import draws_anew, is_live
from sottovoce.server.live_run import with_roster
from sottovoce.server.placement import discard_unstarted, new_folder, resumed
from sottovoce.server.progress import final_table
from sottovoce.server.settings import compose
from sottovoce.server.setup import settings_text
from sottovoce.server.training import Outcome, continue_run, start_run

FLEETS_TIMEOUT_S = 60.0

app = ServerApp()

outcomes: dict[str, Outcome] = {}  # by run folder: how runs of this process ended


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start or continue the run that `context.run_config` names."""
    given = context.run_config
    if "folder" in given:
        folder = Path(str(given["folder"]))
        if given.get("resume"):
            outcomes[str(folder)] = continue_run(
                grid, folder, progress=bool(given["progress"]), afresh=bool(given.get("afresh")),
            )
        else:
            outcomes[str(folder)] = start_run(grid, folder)
    else:
        run_on_flower(grid, shlex.split(str(given["overrides"])), int(given.get("fleets", 1)))


def run_on_flower(grid: Grid, overrides: Sequence[str], fleets: int) -> Outcome:
    """A run, or with `resume=RUN` the rest of one, under Flower's runtime; its end is printed.

    `overrides`: settings of `sottovoce simulate`. `fleets`: nodes to wait for before round 1.
    """
    torch.set_num_threads(1)
    config, folder = compose(overrides), None
    if config.resume is not None:
        config, folder = resumed(config, overrides)
    validate(config)
    wait_for_fleets(grid, fleets)
    console = Console(soft_wrap=True, highlight=False)
    if folder is None:
        folder = new_folder(config.run.dir)
        console.print(f"run: {folder.resolve()}", markup=False)
        outcome = start_new(grid, folder, config, fleets)
    else:
        outcome = continue_run(
            grid, folder, progress=config.run.progress, afresh=draws_anew(config)
        )
    report = folder.resolve() / "report.html" if config.run.report else None
    console.print(final_table(outcome.summary, report))
    if outcome.reason:
        console.print(outcome.reason, markup=False)
    return outcome


def start_new(grid: Grid, folder: Path, config: DictConfig, fleets: int) -> Outcome:
    """Run `config` in the new `folder`; its dated folder is removed if it cannot begin."""
    try:
        if is_live(config):
            config = with_roster(grid, folder, config, gateways=fleets, say=print)
        write_atomic(folder / "config.yaml", settings_text(config).encode())
        return start_run(grid, folder)
    except Exception:
        if config.run.dir is None:
            discard_unstarted(folder)
        raise


def wait_for_fleets(grid: Grid, fleets: int, timeout_s: float = FLEETS_TIMEOUT_S) -> None:
    """Return when `fleets` nodes are connected; RunError when they are not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while (connected := len(list(grid.get_node_ids()))) < fleets:
        if time.monotonic() > deadline:
            raise RunError(
                f"{connected} of fleets={fleets} nodes connected within {timeout_s:g} s: start "
                "more with flower-supernode, or set fleets lower"
            )
        time.sleep(0.5)
