"""`sottovoce study`: many runs that differ in a few settings, one table and one plot.

A study is a module with `arms(config)`, the settings that its runs differ in, and `write(folder,
results)`, which makes the table and the plot. Every arm runs once for each seed, in a run folder of
its own below `runs/`; a study that was stopped goes on where it was, in the same folder.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from omegaconf import DictConfig, OmegaConf

from sottovoce.client.errors import ConfigError
from sottovoce.server import placement
from sottovoce.server.checkpoints import write_atomic
from sottovoce.server.config import SimulateConfig
from sottovoce.server.limits import validate
from sottovoce.server.run_record import RunRecord, read_run

STUDIES: dict[str, str] = {
    "sampling": "sottovoce.server.sampling_study",
    "privacy": "sottovoce.server.privacy_study",
    "mitigations": "sottovoce.server.mitigations_study",
}
"""Every study by name: adding one is a module and a line here."""

OWN = ("study", "seeds", "dir", "populations", "epsilons", "unit")  # which its runs do not have
FIXED = {"run.report": False, "run.progress": False, "run.dir": None}
SETTINGS = "study.yaml"
SEEDS = 3  # of a study that has no SEEDS of its own


@dataclass
class StudyConfig(SimulateConfig):
    """`study`: its name. `seeds`: runs of each arm, seeded `seed` (1), `seed` + 1, ... (null: as
    many as the study takes). `dir`: the study's folder, null for studies/<date>/<time>. All else is
    what the runs have in common.

    Of the study `privacy`: `populations` (null: its own, []: the one of `population`), `epsilons`
    (null among them: no privacy) and for which `unit`, device or example, they are.
    """

    study: str = "sampling"
    seeds: int | None = None
    dir: str | None = None
    populations: Any = None
    epsilons: Any = field(default_factory=lambda: [None, 16, 8, 4, 2, 1])
    unit: str = "device"


@dataclass(frozen=True)
class Arm:
    """Runs that share their settings. `changes`: values by dotted key, over the study's own."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A finished run of an arm."""

    arm: Arm
    seed: int
    run: RunRecord


def run_study(config: DictConfig) -> int:
    """Every run that is not finished yet, then the table and the plot; the exit code.

    Raises ConfigError, before any run, where an arm's settings are impossible.
    """
    study = _module(config.study)
    seeds = getattr(study, "SEEDS", SEEDS) if config.seeds is None else config.seeds
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} must be at least 1: set seeds")
    if config.resume is not None:
        raise ConfigError(f"resume={config.resume} is for one run: give the study's folder as dir")
    arms = study.arms(config)
    first = 1 if config.seed is None else int(config.seed)
    plan = [(arm, first + k) for k in range(seeds) for arm in arms]
    settings = {(arm.name, seed): run_settings(config, arm, seed) for arm, seed in plan}
    for each in settings.values():
        validate(each)
    folder = study_folder(config)
    results = []
    for number, (arm, seed) in enumerate(plan, start=1):
        began = time.perf_counter()
        place = folder / "runs" / f"{arm.name}-seed{seed}"
        new = run_arm(place, settings[arm.name, seed])
        results.append(Result(arm, seed, read_run(place)))
        spent = f"{time.perf_counter() - began:.0f} s" if new else "finished before"
        print(f"[{number}/{len(plan)}] {place.name}: {spent}", file=sys.stderr, flush=True)
    for path in study.write(folder, results):
        print(path.read_text("utf-8") if path.suffix == ".md" else path)
    return 0


def run_settings(config: DictConfig, arm: Arm, seed: int) -> DictConfig:
    """The settings of one run of an arm. A group among its changes replaces the study's whole."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    found = OmegaConf.create({key: value for key, value in values.items() if key not in OWN})
    for key, value in {**arm.changes, **FIXED, "seed": seed}.items():
        OmegaConf.update(found, key, value, merge=False)
    return found


def study_folder(config: DictConfig) -> Path:
    """The study's folder, new or that of the same study, to which seeds may be added.

    ConfigError where it is another's.
    """
    if config.dir is None:
        folder = placement.dated_folder(Path("studies"))
    else:
        folder = Path(config.dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.merge(config, {"dir": None, "seeds": 0}), resolve=True)
    stored = folder / SETTINGS
    if stored.exists():
        if stored.read_text("utf-8") != text:
            raise ConfigError(
                f"dir={folder} holds a study with other settings: name a new folder, or repeat "
                "the settings to go on with it"
            )
    elif any(folder.iterdir()):
        raise ConfigError(f"dir={folder} holds something already: name a new folder")
    else:
        write_atomic(stored, text.encode())
    return folder


def run_arm(folder: Path, config: DictConfig) -> bool:
    """A run in `folder`: nothing where it is finished (False), its rest where it was stopped.

    What a run prints of itself is kept from the screen.
    """
    from sottovoce.server.simulate import INTERRUPTED, simulate

    if _status(folder) in ("finished", "budget_spent"):
        return False
    if any((folder / "checkpoints").glob("round-*")):
        config = placement.stored_config(folder)
        config.resume = str(folder)
        config.run.progress = False
    else:
        folder.mkdir(parents=True, exist_ok=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = simulate(config, folder)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return True


def _status(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return None
    return str(found.get("status"))


class Study(Protocol):
    """What a study's module has, and `SEEDS` where it is another number than `SEEDS` here."""

    def arms(self, config: DictConfig) -> Sequence[Arm]: ...

    def write(self, folder: Path, results: Sequence[Result]) -> list[Path]: ...


def _module(name: str) -> Study:
    if name not in STUDIES:
        raise ConfigError(f"study={name} does not exist: choose {' or '.join(STUDIES)}")
    return cast(Study, import_module(STUDIES[name]))
