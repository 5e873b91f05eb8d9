"""The settings of `sottovoce audit`, and what they must satisfy before anything is opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.privacy.audit.design import Design

DEFAULT_DELTA = 1e-6
UNITS = ("device", "example")
OBSERVERS = ("release", "server", "fleet")
MECHANISMS = ("any", "gaussian")


@dataclass
class AuditConfig:
    """`run`: the folder of a finished run; or `scores`: a file of id, member, score.

    Of a run, `attacks`: "default" or names from `ATTACKS`; `devices`: at most so many members and
    non-members each; `reference_models`: to train for attacks on example canaries that compare with
    some (0: those are left out); `without`: the same run without canaries, for what they cost.

    Of scores, `unit` and `observer` of the claim that they are held against, `claim_epsilon` at
    `delta` (null: none is claimed), `coins`: whether each candidate was put in by a fair coin of
    its own; `mechanism`: gaussian where it is known to be one without sampling.

    `guesses`: shares of the candidates to call members, and as many non-members, declared before
    any score was seen; null: a share `holdout` of them chooses. `seed` draws candidates, coins and
    that share. `output`: the folder to write to (null: the run's, or the file's).
    """

    run: str | None = None
    scores: str | None = None
    attacks: Any = "default"
    devices: int = 1000
    reference_models: int = 0
    without: str | None = None
    delta: float | None = None
    claim_epsilon: float | None = None
    unit: str = "example"
    observer: str = "release"
    coins: bool = False
    mechanism: str = "any"
    holdout: float = 0.5
    guesses: Any = None
    confidence: float = 0.95
    seed: int = 0
    output: str | None = None
    format: str = "table"


OF_SCORES = ("delta", "claim_epsilon", "unit", "observer", "coins", "mechanism")
OF_RUNS = ("attacks", "devices", "reference_models", "without")


def check_config(cfg: AuditConfig) -> Path:
    """The run folder or score file. Raises ConfigError or RunError naming value and remedy."""
    if bool(cfg.run) == bool(cfg.scores):
        what = "run= is missing" if not cfg.run else "run= and scores= exclude each other"
        raise ConfigError(
            f"{what}: give the folder of a finished run, run=runs/…, or a file of scores, "
            "scores=scores.csv"
        )
    _check_values(cfg)
    design_of(cfg)
    if cfg.scores:
        _refuse_set(cfg, OF_RUNS, "needs run=: a file of scores has neither attacks nor devices")
        return Path(cfg.scores).expanduser()
    _refuse_set(cfg, OF_SCORES, "needs scores=: of a run, its ledger says it")
    return _run_folder(Path(cfg.run or "").expanduser())


def design_of(cfg: AuditConfig, *, gaussian: bool | None = None) -> Design:
    """How guesses are fixed. Raises ConfigError where holdout or guesses are impossible."""
    declared = cfg.guesses if cfg.guesses is not None else ()
    listed = list(declared) if isinstance(declared, Iterable) else [declared]
    try:
        shares = tuple(float(share) for share in listed)
        if cfg.guesses is not None and not shares:
            raise ValueError("guesses=[] declares none: leave it out, or give shares as in [0.1]")
        known = cfg.mechanism == "gaussian" if gaussian is None else gaussian
        return Design(cfg.coins, cfg.holdout, shares, known)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def target_folder(cfg: AuditConfig, source: Path) -> Path:
    """Where `audit.json` and `audit.html` go: `output`, the run, or the folder of the file."""
    if cfg.output is None:
        return source if cfg.run else source.parent
    folder = Path(cfg.output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={cfg.output} is a file: give a folder")
    return folder


def _check_values(cfg: AuditConfig) -> None:
    if cfg.format not in ("table", "json"):
        raise ConfigError(f"format={cfg.format} is unknown: choose table or json")
    if cfg.devices < 1:
        raise ConfigError(f"devices={cfg.devices} must be at least 1: 1000 is usual")
    if cfg.reference_models < 0:
        raise ConfigError(f"reference_models={cfg.reference_models} must be 0 or more")
    if not 0 < cfg.confidence < 1:
        raise ConfigError(f"confidence={cfg.confidence} must be between 0 and 1: 0.95 is usual")
    if cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed} must be 0 or more")
    if cfg.delta is not None and not 0 <= cfg.delta < 1:
        raise ConfigError(f"delta={cfg.delta} must be at least 0 and below 1: 1e-5 is usual")
    if cfg.claim_epsilon is not None and not cfg.claim_epsilon >= 0:
        raise ConfigError(f"claim_epsilon={cfg.claim_epsilon} must be 0 or more")
    for name, choices in (("unit", UNITS), ("observer", OBSERVERS), ("mechanism", MECHANISMS)):
        value = getattr(cfg, name)
        if value not in choices:
            raise ConfigError(f"{name}={value} is unknown: choose {', '.join(choices)}")
    if cfg.mechanism == "gaussian" and cfg.delta == 0:
        raise ConfigError("delta=0.0 leaves mechanism=gaussian no finite epsilon: give delta > 0")


def _refuse_set(cfg: AuditConfig, names: tuple[str, ...], why: str) -> None:
    usual = {field.name: field.default for field in fields(AuditConfig)}
    for name in names:
        if getattr(cfg, name) != usual[name]:
            raise ConfigError(f"{name}={getattr(cfg, name)} {why}")


def _run_folder(folder: Path) -> Path:
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder} is not a run folder (no config.yaml): give one that "
                       "`sottovoce simulate` wrote")
    for name in ("model.safetensors", "ledger.json", "summary.json"):
        if not (folder / name).is_file():
            raise RunError(f"{folder} is not finished (no {name}): "
                           f"`sottovoce simulate resume={folder}` ends it")
    return folder
