"""What a run over real devices has before its first round: a name, and a closed roster."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from flwr.serverapp import Grid
from omegaconf import DictConfig

from sottovoce.client.task_spec import task_spec
from sottovoce.server.gateway.roster import ROSTER_FILE, Roster, RosterPlacement, close_roster
from sottovoce.server.limits import validate
from sottovoce.server.live_limits import is_live
from sottovoce.simulations.experiment import build_experiment


def with_roster(
    grid: Grid,
    folder: Path,
    config: DictConfig,
    *,
    gateways: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> DictConfig:
    """The settings of a new live run, once its devices are there; its roster goes into `folder`.

    Raises RunError where too few came in time, ConfigError where the settings do not fit them, and
    what else is wrong with the settings before it waits.
    """
    found = config.copy()
    found.population.run = secrets.token_hex(8)
    _check_first(found)
    roster = close_roster(
        grid,
        found.population.run,
        devices=int(found.population.min_devices),
        wait_s=float(found.population.wait_s),
        gateways=gateways,
        say=say,
    )
    found.population.devices = len(roster)
    validate(found)
    found.population.roster = str(folder.resolve() / ROSTER_FILE)
    roster.save(folder / ROSTER_FILE)
    return found


def _check_first(config: DictConfig) -> None:
    """Raise what is wrong with the public file, the model or the task, before anybody is waited
    for: the experiment is built as if the least number of devices were there."""
    from sottovoce.server.setup import settings_text  # which needs this module

    tried = config.copy()
    tried.population.devices = tried.population.min_devices
    task_spec(build_experiment(settings_text(tried)), tried.population.run)


def placement_of(config: DictConfig) -> RosterPlacement | None:
    """Where a run's devices are; None where any node can make them."""
    if not is_live(config):
        return None
    return RosterPlacement(Roster.load(Path(config.population.roster)), config.population.run)
