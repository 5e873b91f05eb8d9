"""`sottovoce account`: the epsilon of a finished run, or of a plan that was never run.

`account` computes and returns plain values; `run_account` prints them, as a table or as one JSON
object. A run is read from its ledger alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accountants import ACCOUNTANTS, by_level, check_delta, epsilon
from sottovoce.privacy.calibration import calibrate_noise
from sottovoce.privacy.composition import Tally
from sottovoce.privacy.events import OBSERVERS, GaussianEvent, Unit
from sottovoce.privacy.ledger import Ledger
from sottovoce.server.account_tables import as_json, print_tables

if TYPE_CHECKING:
    from omegaconf import DictConfig

Facts = dict[str, Any]


@dataclass
class AccountConfig:
    """A run's folder, or a plan: Poisson-sampled Gaussian releases under add/remove.

    A plan needs `sampling_rate`, `steps`, `delta` and either `noise_multiplier` or
    `target_epsilon`, for which the noise is then found. With `run`, `unit` and `observer` choose
    the claim that leads and `delta` replaces the run's own.
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
    config = _config(options)
    return _of_plan(config) if config.run is None else _of_run(config, Path(config.run))


def run_account(cfg: AccountConfig | DictConfig) -> int:
    """Print `account(cfg)` in `cfg.format`; the exit code 0."""
    facts = account({field.name: getattr(cfg, field.name) for field in fields(AccountConfig)})
    if cfg.format == "json":
        print(as_json(facts))
    else:
        print_tables(facts)
    return 0


# -- checks ----------------------------------------------------------------------------------------


def _config(options: Mapping[str, Any]) -> AccountConfig:
    known = {field.name for field in fields(AccountConfig)}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"{unknown[0]} is no option of account: use {', '.join(sorted(known))}")
    config = AccountConfig(**options)
    _check_choice("accountant", config.accountant, ACCOUNTANTS)
    _check_choice("unit", config.unit, get_args(Unit))
    _check_choice("observer", config.observer, OBSERVERS)
    _check_choice("format", config.format, ("table", "json"))
    if config.delta is not None:
        check_delta(config.delta)
    return config


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise ConfigError(f"{name}={value} does not exist: choose {' or '.join(choices)}")


def _check_plan(config: AccountConfig) -> None:
    given = asdict(config)
    missing = [name for name in ("sampling_rate", "steps", "delta") if given[name] is None]
    if config.noise_multiplier is None and config.target_epsilon is None:
        missing.insert(0, "noise_multiplier (or target_epsilon)")
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: give them, or run=RUN for a finished run")
    if config.noise_multiplier is not None and config.target_epsilon is not None:
        raise ConfigError("noise_multiplier and target_epsilon contradict each other: give one")
    if config.observer not in (None, "release"):
        raise ConfigError(f"observer={config.observer} needs run=RUN: a plan is about release")
    rate, steps, noise = config.sampling_rate, config.steps, config.noise_multiplier
    if not 0 <= float(rate or 0) <= 1:
        raise ConfigError(f"sampling_rate={rate} must be in [0, 1]")
    if steps is None or int(steps) != steps or steps < 1:
        raise ConfigError(f"steps={steps} must be a whole number of at least 1")
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        raise ConfigError(f"noise_multiplier={noise} must be finite and at least 0")


# -- a plan ----------------------------------------------------------------------------------------


def _of_plan(config: AccountConfig) -> Facts:
    _check_plan(config)
    rate, steps, delta = config.sampling_rate, config.steps, config.delta
    assert rate is not None and steps is not None and delta is not None
    noise = config.noise_multiplier
    if noise is None:
        assert config.target_epsilon is not None
        noise = calibrate_noise(
            config.target_epsilon, delta, rate, steps, accountant=config.accountant
        )
    event = GaussianEvent(
        noise_multiplier=noise,
        count=steps,
        sampling="poisson",
        sampling_rate=rate,
        unit=config.unit or "device",  # type: ignore[arg-type]
    )
    by_accountant = _by_accountant(Ledger([event]), delta, event.unit, event.observer, None)
    return {
        "epsilon": _leading(by_accountant, config.accountant),
        "delta": delta,
        "noise_multiplier": noise,
        "sampling_rate": rate,
        "steps": steps,
        "accountant": config.accountant,
        "unit": event.unit,
        "observer": event.observer,
        "relation": event.relation,
        "by_accountant": by_accountant,
    }


def _by_accountant(
    ledger: Ledger, delta: float, unit: str, observer: str, level: int | None
) -> dict[str, float | None]:
    """Epsilon by each accountant; None where PRV, the second opinion, does not apply."""
    found: dict[str, float | None] = {
        name: epsilon(
            ledger, delta, unit=unit, observer=observer, accountant=name, level=level
        )
        for name in ACCOUNTANTS
    }
    if found["prv"] == math.inf:
        found["prv"] = None
    return found


def _leading(by_accountant: Mapping[str, float | None], accountant: str) -> float:
    value = by_accountant[accountant]
    return math.inf if value is None else value


# -- a run -----------------------------------------------------------------------------------------


def _of_run(config: AccountConfig, folder: Path) -> Facts:
    for name in ("noise_multiplier", "sampling_rate", "steps", "target_epsilon"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name} contradicts run={config.run}, whose ledger has it: drop one")
    ledger = Ledger.load(folder if folder.is_file() else folder / "ledger.json")
    tally = Tally(ledger)
    unit = config.unit or next(iter((*ledger.deltas, *ledger.units)), "device")
    unit, observer = tally.resolve(unit, config.observer)
    if not ledger.events:
        return _of_nothing(config, unit, observer)
    delta = _delta(config, ledger, unit)
    rows = by_level(ledger, delta, unit, observer, config.accountant)
    level = max(rows, key=lambda row: float(row["epsilon"]))["level"] if rows else None
    by_accountant = _by_accountant(ledger, delta, unit, observer, level)
    return {
        "epsilon": _leading(by_accountant, config.accountant),
        "delta": delta,
        **_what_was_run(ledger, unit, level),
        "accountant": config.accountant,
        "unit": unit,
        "observer": observer,
        "relation": tally.relation(unit),
        "by_accountant": by_accountant,
        "level": level,
        "by_level": rows,
        "claims": _claims(config, ledger, tally),
        "run": str(folder),
    }


def _of_nothing(config: AccountConfig, unit: str, observer: str) -> Facts:
    """A run whose ledger is empty trained without any mechanism: nothing is promised."""
    return {
        "epsilon": math.inf,
        "delta": config.delta,
        "noise_multiplier": 0.0,
        "sampling_rate": None,
        "steps": 0,
        "accountant": config.accountant,
        "unit": unit,
        "observer": observer,
        "relation": "add_remove",
        "by_accountant": {"pld": math.inf, "rdp": math.inf, "prv": None},
        "level": None,
        "by_level": [],
        "claims": [],
        "run": str(config.run),
    }


def _delta(config: AccountConfig, ledger: Ledger, unit: str) -> float:
    delta = config.delta if config.delta is not None else ledger.deltas.get(unit)
    if delta is None:
        raise ConfigError(f"{config.run} states no delta for unit={unit}: give delta=")
    return delta


def _what_was_run(ledger: Ledger, unit: str, level: int | None) -> Facts:
    """Noise, rate and steps of the releases in which devices of `level` took part."""
    found = []
    for event in ledger:
        if not isinstance(event, GaussianEvent) or event.unit != unit:
            continue
        if event.by_level is None and event.sampling != "none":
            found.append((event.noise_multiplier, event.sampling_rate, event.count))
        for at, rate, count in event.by_level or ():
            if at == level and count:
                found.append((event.noise_multiplier, rate, count))
    noises, rates = {noise for noise, _, _ in found}, {rate for _, rate, _ in found}
    return {
        "noise_multiplier": noises.pop() if len(noises) == 1 else None,
        "sampling_rate": rates.pop() if len(rates) == 1 else None,
        "steps": sum(count for _, _, count in found),
    }


def _claims(config: AccountConfig, ledger: Ledger, tally: Tally) -> list[Facts]:
    """Epsilon for every unit and observer, infinite ones included."""
    return [
        {
            "unit": unit,
            "observer": observer,
            "relation": tally.relation(unit),
            "delta": _delta(config, ledger, unit),
            "epsilon": epsilon(
                ledger,
                _delta(config, ledger, unit),
                unit=unit,
                observer=observer,
                accountant=config.accountant,
            ),
        }
        for unit in ledger.units
        if config.delta is not None or unit in ledger.deltas
        for observer in OBSERVERS
    ]
