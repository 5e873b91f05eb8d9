"""The Flower ServerApp: the same coordinator on every grid.

In process, `sottovoce simulate` hands over a run folder. Under Flower's own runtime (`flwr run .`)
the settings come from the app's `overrides`, and the folder is made here.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sottovoce.server.training import Outcome, continue_run, start_run

app = ServerApp()

outcomes: dict[str, Outcome] = {}  # by run folder: how runs of this process ended


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Start or continue the run that `context.run_config` names."""
    given = context.run_config
    folder = Path(str(given["folder"])) if "folder" in given else new_run(str(given["overrides"]))
    run = continue_run if given.get("resume") else start_run
    outcomes[str(folder)] = run(grid, folder)


def new_run(overrides: str) -> Path:
    """A new run folder with the settings that `overrides` (as on the command line) make."""
    from sottovoce.server.checkpoints import write_atomic
    from sottovoce.server.limits import validate
    from sottovoce.server.placement import new_folder
    from sottovoce.server.setup import settings_text
    from sottovoce.server.settings import compose

    config = compose(overrides.split())
    validate(config)
    folder = new_folder(config.run.dir)
    write_atomic(folder / "config.yaml", settings_text(config).encode())
    return folder
