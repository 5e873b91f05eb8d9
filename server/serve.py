"""`sottovoce serve`: the coordinator and one gateway in one process; and a gateway alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from flwr.app import Context, RecordDict, UserConfig
from omegaconf import DictConfig
from rich.console import Console

from sottovoce.client.app import app as client_app
from sottovoce.server.app import app as server_app
from sottovoce.server.app import outcomes
from sottovoce.server.checkpoints import write_atomic
from sottovoce.server.gateway.gateway import Gateway
from sottovoce.server.gateway.live_fleet import GATEWAY, serve_here
from sottovoce.server.gateway_config import gateway_settings
from sottovoce.server.live_limits import draws_anew
from sottovoce.server.live_run import with_roster
from sottovoce.server.progress import final_table
from sottovoce.server.setup import settings_text
from sottovoce.simulations.grid import LocalGrid

INTERRUPTED = 130


def serve(config: DictConfig, folder: Path) -> int:
    """Run (or, with `config.resume`, continue) a live run in `folder`; the exit code.

    A run that is continued draws new samples and new noise for a round that may have been released
    before, and books both.
    """
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, highlight=False)
    with _terminable(), running_gateway(config.gateway, console) as gateway:
        grid = LocalGrid(client_app, {}, [{GATEWAY: str(gateway.folder)}])
        if config.resume is None:
            console.print(f"run: {folder}", markup=False)
            _begin(grid, config, folder, console)
        given: UserConfig = {
            "folder": str(folder),
            "resume": config.resume is not None,
            "afresh": draws_anew(config),
            "progress": bool(config.run.progress),
        }
        server_app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), given))
        outcome = outcomes.pop(str(folder))
        if outcome.status != "interrupted":
            gateway.finish(outcome.run)
    report = folder / "report.html" if config.run.report else None
    console.print(final_table(outcome.summary, report))
    if outcome.reason:
        console.print(outcome.reason, markup=False)
    if outcome.status == "interrupted":
        console.print(
            f"interrupted after round {outcome.summary['rounds']}; go on with: "
            f"sottovoce serve resume={folder}", markup=False,
        )
        return INTERRUPTED
    return 0


def serve_gateway(config: DictConfig) -> int:
    """Run a gateway alone until a signal ends it: the coordinator is elsewhere."""
    with _terminable(), running_gateway(config.gateway, Console(soft_wrap=True, highlight=False)):
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


@contextmanager
def running_gateway(settings: DictConfig, console: Console) -> Iterator[Gateway]:
    """A gateway that serves until the block ends, known to this process' nodes."""
    gateway = Gateway(Path(settings.folder).expanduser().resolve(), gateway_settings(settings))
    gateway.start()
    try:
        serve_here(gateway.folder, gateway.settings.name, gateway)
        console.print(f"gateway: {gateway.address}, kept in {gateway.folder}", markup=False)
        yield gateway
    finally:
        gateway.stop()


def _begin(grid: LocalGrid, config: DictConfig, folder: Path, console: Console) -> None:
    """Wait for the devices of a new run and write its settings, without those of the gateway."""
    settings = config.copy()
    del settings["gateway"]
    settings = with_roster(
        grid, folder, settings, say=lambda line: console.print(line, markup=False)
    )
    write_atomic(folder / "config.yaml", settings_text(settings).encode())


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: with a checkpoint, and devices told to come back."""
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
