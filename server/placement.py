"""Where a run writes: a folder of its own, made only once the settings are known to be possible."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime
from itertools import count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.server.config import SimulateConfig

KEPT_ON_RESUME = ("resume", "run.progress")


def new_folder(chosen: str | None) -> Path:
    """The folder of a new run: the chosen one, else runs/<date>/<time>."""
    return dated_folder(Path("runs")) if chosen is None else named_folder(Path(chosen).expanduser())


def dated_folder(parent: Path) -> Path:
    """A new folder parent/<date>/<time>; those of one second get -2, -3, … appended."""
    now = datetime.now()
    day = parent / f"{now:%Y-%m-%d}"
    day.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = day / (f"{now:%H-%M-%S}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("count() ends never")


def named_folder(folder: Path) -> Path:
    """`folder`, made if need be; ConfigError where it holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"run.dir={folder} holds something already: name a new folder, or continue that run "
            f"with resume={folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def discard_unstarted(folder: Path) -> None:
    """Remove the dated folder of a run that failed before its first record, as if never begun."""
    if not (folder / "metrics.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)
        discard_empty(folder.parent, folder.parent.parent)


def discard_empty(*folders: Path) -> None:
    """Remove those of `folders` that are empty, in order, up to one that is not."""
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            return
        if folder.is_dir():
            folder.rmdir()


def resumed(cfg: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
    """The settings of the run to continue, as its folder has them, and that folder.

    `overrides`: what the command line set; only `run.progress` may be set anew, because any other
    change would make it another run under the same name.
    """
    for override in overrides:
        if override.partition("=")[0] not in KEPT_ON_RESUME:
            raise ConfigError(
                f"{override} cannot be changed by resume: the run goes on with the settings of its "
                "config.yaml; start a new run for others"
            )
    folder = Path(cfg.resume).expanduser()
    stored = stored_config(folder)
    stored.resume = str(folder)
    stored.run.progress = cfg.run.progress
    return stored, folder


def stored_config(folder: Path) -> DictConfig:
    """The settings in a run folder; RunError where it is not one."""
    if not folder.is_dir():
        raise RunError(f"{folder} does not exist: give a run's folder, runs/<date>/<time>")
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(
            f"{folder} is not a run folder (no config.yaml): give one that simulate wrote"
        )
    try:
        stored = OmegaConf.merge(OmegaConf.structured(SimulateConfig), OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} does not hold the settings of a run: restore it, or start a new run"
        ) from error
    assert isinstance(stored, DictConfig)
    return stored
