"""`sottovoce account`: the epsilon of a finished run, or of a plan that was never run.

`account` computes and returns plain values; `run_account` prints them, as a table, as one JSON
object, or as a statement. A run is read from its ledger alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import ACCOUNTANTS, check_delta
from sottovoce.privacy.accounting.events import OBSERVERS, Unit

if TYPE_CHECKING:
    from omegaconf import DictConfig

Facts = dict[str, Any]
FORMATS = ("table", "json", "statement")
SOLVES = ("noise", "rounds", "cohort", "population")
SWEEPS = ("max_rate", "uniform_mix")
MOST = 10**12  # steps, devices
OF_RUNS = {"run", "delta", "accountant", "unit", "observer", "format", "sweep", "values"}


@dataclass
class AccountConfig:
    """A run's folder, or a plan: Poisson-sampled Gaussian releases under add/remove.

    A plan needs `sampling_rate` (or `cohort_size` and `devices`), `steps`, `delta` and either
    `noise_multiplier` or `target_epsilon`, for which the noise is then found. `solve` finds
    something else for the target: `rounds`, the largest `cohort`, the smallest `population`.
    `example_*` add on-device steps, `example_steps` a round, in `max_participations` rounds
    at most. With `run`, `unit` and `observer` choose the claim that leads, `delta` replaces the
    run's own.

    With `min_separation` (and `max_participations`) or `mechanism` the plan rests on a schedule,
    not on sampling: independent, tree, banded, bisr or blt noise over all `steps` rounds.

    `sweep`: what each of `values` of max_rate or uniform_mix costs each activity level, for a run
    or for a plan with `levels` (devices at level 0, 1, ...) or with `preset` and `devices`.
    """

    run: str | None = None
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    delta: float | None = None
    target_epsilon: float | None = None
    accountant: str = "pld"
    unit: str | None = None
    observer: str | None = None
    format: str = "table"
    solve: str | None = None
    devices: int | None = None
    cohort_size: float | None = None
    max_participations: int | None = None
    example_epsilon: float | None = None
    example_noise_multiplier: float | None = None
    example_sampling_rate: float | None = None
    example_steps: int | None = None
    example_delta: float | None = None
    sweep: str | None = None
    values: list[float] | None = None
    levels: list[float] | None = None
    preset: str | None = None
    activity_weight: str = "linear"
    activity_power: float = 0.5
    uniform_mix: float = 0.0
    max_rate: float | None = None
    mechanism: str | None = None
    min_separation: int | None = None
    bands: int | None = None


def account(options: Mapping[str, Any]) -> Facts:
    """What `options` (fields of `AccountConfig`; others may be left out) amount to.

    `epsilon, delta, noise_multiplier, sampling_rate, steps, accountant, unit, observer, relation`
    and `by_accountant` (None where an accountant has no figure). For a run also `level`, the worst
    one; `by_level`, a list of `{level, devices, sampling_rate, epsilon}`; and `claims`, epsilon for
    each unit and observer. Of a run, `noise_multiplier` and `sampling_rate` are None where they
    changed; they and `steps` are those of the worst level.

    Raises ConfigError, in one line, where something is missing, contradictory or impossible, and
    RunError where the run has no readable ledger.
    """
    from sottovoce.server.account_plan import of_plan
    from sottovoce.server.account_run import of_run, statement_of_run
    from sottovoce.server.account_sweep import sweep_of_plan, sweep_of_run

    config = checked(options)
    scheduled = (config.mechanism, config.min_separation, config.bands)
    if config.run is None and scheduled != (None, None, None):
        from sottovoce.server.account_schedule import of_schedule

        return of_schedule(config)
    if config.run is None:
        return of_plan(config) if config.sweep is None else sweep_of_plan(config)
    if config.format == "statement":
        return statement_of_run(config, Path(config.run))
    found = of_run(config, Path(config.run))
    return found if config.sweep is None else found | sweep_of_run(config, Path(config.run))


def run_account(cfg: AccountConfig | DictConfig) -> int:
    """Print `account(cfg)` in `cfg.format`; the exit code 0."""
    from sottovoce.server.account_tables import as_json, print_tables

    facts = account({field.name: getattr(cfg, field.name) for field in fields(AccountConfig)})
    if cfg.format == "json":
        print(as_json(facts))
    elif cfg.format == "statement":
        print(facts["paragraph"] + "\n\n" + as_json(facts["statement"], indent=1))
    else:
        print_tables(facts)
    return 0


# -- checks ----------------------------------------------------------------------------------------


def checked(options: Mapping[str, Any]) -> AccountConfig:
    """The options as a config whose single values are possible; ConfigError names the first not."""
    known = {field.name for field in fields(AccountConfig)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"{unknown[0]} is no option of account: use {', '.join(sorted(known))}")
    config = AccountConfig(**options)
    _check_choice("accountant", config.accountant, ACCOUNTANTS)
    _check_choice("unit", config.unit, get_args(Unit))
    _check_choice("observer", config.observer, OBSERVERS)
    _check_choice("format", config.format, FORMATS)
    _check_choice("solve", config.solve, SOLVES)
    _check_choice("sweep", config.sweep, SWEEPS)
    for delta in (config.delta, config.example_delta):
        if delta is not None:
            check_delta(delta)
    if config.run is None:
        _check_numbers(config)
        if config.format == "statement":
            raise ConfigError("format=statement needs run=RUN: a plan has released nothing")
    else:
        _check_run(config)
    return config


def check_delta_for(delta: float, devices: float | None) -> None:
    """Raise ConfigError unless delta is below 1/devices, where they are known."""
    if devices and delta >= 1 / devices:
        raise ConfigError(
            f"delta={delta:g} must be below 1/devices={1 / devices:g}: so large a delta allows "
            "publishing one device's data outright; lower delta"
        )


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ConfigError(f"{name}={value} does not exist: choose {' or '.join(choices)}")


def _check_run(config: AccountConfig) -> None:
    plain = AccountConfig()
    for name, value in asdict(config).items():
        if name not in OF_RUNS and value != getattr(plain, name):
            raise ConfigError(f"{name} contradicts run={config.run}, whose ledger has it: drop one")


def _check_numbers(config: AccountConfig) -> None:
    given = asdict(config)
    for name in ("sampling_rate", "example_sampling_rate"):
        if given[name] is not None and not 0 <= given[name] <= 1:
            raise ConfigError(f"{name}={given[name]} must be in [0, 1]")
    for name in ("steps", "devices", "max_participations", "example_steps"):
        value = given[name]
        if value is not None and not (1 <= value <= MOST and int(value) == value):
            raise ConfigError(f"{name}={value} must be a whole number from 1 to {MOST:g}")
    for name in ("noise_multiplier", "example_noise_multiplier"):
        if given[name] is not None and not (math.isfinite(given[name]) and given[name] >= 0):
            raise ConfigError(f"{name}={given[name]} must be finite and at least 0")
    for name in ("cohort_size", "target_epsilon", "example_epsilon"):
        if given[name] is not None and not (math.isfinite(given[name]) and given[name] > 0):
            raise ConfigError(f"{name.replace('_', ' ')}={given[name]} must be finite and above 0")
