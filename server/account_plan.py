"""The epsilon of a plan, and what of it fits a target: noise, rounds, cohort or population."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import ACCOUNTANTS, epsilon
from sottovoce.privacy.accounting.events import Event, GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.accounting.planning import (
    Layer,
    calibrate_layers,
    largest_rate,
    most_rounds,
    smallest_population,
)
from sottovoce.server.account import AccountConfig, Facts, check_delta_for


def of_plan(config: AccountConfig) -> Facts:
    """Facts of the plan, complete with what was to be found."""
    config = _with_rate(config)
    solve = config.solve or ("noise" if _open(config) else None)
    _check(config, solve)
    if solve is not None and (solve != "noise" or _open(config)):
        config = _solved(config, solve)
    return _facts(config) | ({} if config.solve is None else {"solve": config.solve})


def _open(config: AccountConfig) -> bool:
    """Whether some layer's noise is to be found."""
    wanted = config.example_epsilon is not None and config.example_noise_multiplier is None
    return config.noise_multiplier is None or wanted


def _with_rate(config: AccountConfig) -> AccountConfig:
    """The plan with its sampling rate, where cohort and population say it."""
    devices, cohort = config.devices, config.cohort_size
    if config.delta is not None and devices is not None:
        check_delta_for(config.delta, devices)
    if devices is None or cohort is None:
        return config
    if cohort > devices:
        raise ConfigError(
            f"cohort_size={cohort:g} is more than devices={devices}: the sampling rate would be "
            f"{cohort / devices:g}, above 1"
        )
    rate = cohort / devices
    if config.sampling_rate is not None and not math.isclose(config.sampling_rate, rate):
        raise ConfigError(
            f"sampling_rate={config.sampling_rate:g} contradicts cohort_size / devices = {rate:g}: "
            "drop one"
        )
    return replace(config, sampling_rate=rate)


def _check(config: AccountConfig, solve: str | None) -> None:
    needs = {
        None: ("sampling_rate", "steps", "delta"),
        "noise": ("sampling_rate", "steps", "delta"),
        "rounds": ("noise_multiplier", "target_epsilon", "sampling_rate", "delta"),
        "cohort": ("noise_multiplier", "target_epsilon", "devices", "steps", "delta"),
        "population": ("noise_multiplier", "target_epsilon", "cohort_size", "steps", "delta"),
    }[solve]
    missing = [name for name in needs if getattr(config, name) is None]
    if solve in (None, "noise") and config.noise_multiplier is None:
        if config.target_epsilon is None:
            missing.insert(0, "noise_multiplier (or target_epsilon)")
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: give them, or run=RUN for a finished run")
    if solve in (None, "noise") and None not in (config.noise_multiplier, config.target_epsilon):
        raise ConfigError(
            "noise_multiplier and target_epsilon contradict each other: give one, or "
            "solve=rounds, cohort or population"
        )
    if config.observer not in (None, "release"):
        raise ConfigError(f"observer={config.observer} needs run=RUN: a plan is about release")
    _check_example(config, solve)


def _check_example(config: AccountConfig, solve: str | None) -> None:
    """The on-device layer must be whole where any part of it is given."""
    names = ("example_sampling_rate", "example_steps", "example_delta")
    given = [config.example_epsilon, config.example_noise_multiplier]
    if not any(getattr(config, name) is not None for name in names) and given == [None, None]:
        if config.max_participations is not None:
            raise ConfigError(
                f"max_participations={config.max_participations} bounds steps on the device or a "
                "schedule: give example_*, or min_separation (1: no rest), or drop it"
            )
        return
    missing = [name for name in names if getattr(config, name) is None]
    if config.unit == "example":
        raise ConfigError(
            "unit=example contradicts example_*, which are that unit's own layer: drop one"
        )
    if None not in given and solve != "rounds":
        raise ConfigError(
            "example_noise_multiplier and example_epsilon contradict each other: give one, or "
            "solve=rounds"
        )
    if given == [None, None]:
        missing.append("example_noise_multiplier (or example_epsilon)")
    if solve not in (None, "noise") and config.example_noise_multiplier is None:
        missing.append("example_noise_multiplier")
    if solve == "rounds" and config.example_epsilon is None:
        missing.append("example_epsilon")
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: both layers must be told in full")


# -- solving ---------------------------------------------------------------------------------------


def _layers(config: AccountConfig, rate: float) -> list[Layer]:
    """The device layer, and the example layer where one is given."""
    layers = [
        Layer(
            config.target_epsilon or math.inf, config.delta or 0.0, ((0, rate, 1),),
            config.noise_multiplier, unit=_unit(config), accountant=config.accountant,
        )
    ]
    if config.example_steps is not None:
        entry = (0, config.example_sampling_rate or 0.0, config.example_steps)
        layers.append(
            Layer(
                config.example_epsilon or math.inf, config.example_delta or 0.0, (entry,),
                config.example_noise_multiplier, config.max_participations, unit="example",
                observer="server", accountant=config.accountant,
            )
        )
    return layers


def _solved(config: AccountConfig, solve: str) -> AccountConfig:
    rate, steps = config.sampling_rate or 0.0, config.steps or 1
    device, *examples = _layers(config, rate)
    if solve == "noise":
        open_ones = [layer for layer in (device, *examples) if layer.noise_multiplier is None]
        found = {layer.unit: layer for layer in calibrate_layers(open_ones, steps)}
        if device.unit in found:
            config = replace(config, noise_multiplier=found[device.unit].noise_multiplier)
        if "example" in found and device.unit != "example":
            noise = found["example"].noise_multiplier
            config = replace(config, example_noise_multiplier=noise)
        return config
    if solve == "rounds":
        return replace(config, steps=most_rounds([device, *examples]))
    if solve == "cohort":
        devices = config.devices or 1
        cohort = math.floor(largest_rate(device, steps) * devices)
        if cohort < 1:
            raise ConfigError(
                f"devices={devices} are too few for a cohort of one within epsilon="
                f"{config.target_epsilon:g}: raise noise_multiplier or target_epsilon"
            )
        return replace(config, cohort_size=float(cohort), sampling_rate=cohort / devices)
    cohort_size = config.cohort_size or 1.0
    devices = smallest_population(device, steps, math.ceil(cohort_size))
    check_delta_for(config.delta or 0.0, devices)
    return replace(config, devices=devices, sampling_rate=cohort_size / devices)


# -- facts -----------------------------------------------------------------------------------------


def _facts(config: AccountConfig) -> Facts:
    rate, steps, noise = config.sampling_rate, config.steps, config.noise_multiplier
    assert rate is not None and steps is not None and noise is not None and config.delta is not None
    event = _event(noise, rate, steps, _unit(config))
    found = by_accountant(Ledger([event]), config.delta, event.unit, event.observer, None)
    facts = {
        "epsilon": leading(found, config.accountant),
        "delta": config.delta,
        "noise_multiplier": noise,
        "sampling_rate": rate,
        "steps": steps,
        "accountant": config.accountant,
        "unit": event.unit,
        "observer": event.observer,
        "relation": event.relation,
        "by_accountant": found,
    }
    for name in ("devices", "cohort_size"):
        if getattr(config, name) is not None:
            facts[name] = getattr(config, name)
    return facts | ({"example": _example_facts(config)} if config.example_steps else {})


def _example_facts(config: AccountConfig) -> Facts:
    noise, rate = config.example_noise_multiplier, config.example_sampling_rate
    assert noise is not None and rate is not None and config.example_delta is not None
    rounds = config.steps or 1
    times = min(rounds, config.max_participations or rounds)
    steps = (config.example_steps or 1) * times
    event = _event(noise, rate, steps, "example")
    return {
        "epsilon": epsilon(event, config.example_delta, accountant=config.accountant),
        "delta": config.example_delta,
        "noise_multiplier": noise,
        "sampling_rate": rate,
        "steps": steps,
        "participations": times,
        "unit": "example",
        "observer": "server",
        "relation": event.relation,
    }


def _event(noise: float, rate: float, steps: int, unit: Any) -> GaussianEvent:
    return GaussianEvent(
        noise_multiplier=noise, count=int(steps), sampling="poisson", sampling_rate=rate, unit=unit
    )


def _unit(config: AccountConfig) -> Any:
    return config.unit or "device"


def by_accountant(
    source: Ledger | Sequence[Event], delta: float, unit: str, observer: str, level: int | None
) -> dict[str, float | None]:
    """Epsilon by each accountant; None where PRV, the second opinion, does not apply."""
    found: dict[str, float | None] = {
        name: epsilon(source, delta, unit=unit, observer=observer, accountant=name, level=level)
        for name in ACCOUNTANTS
    }
    if found["prv"] == math.inf:
        found["prv"] = None
    return found


def leading(found: Mapping[str, float | None], accountant: str) -> float:
    """The figure of the accountant that was asked for; infinite where it has none."""
    value = found[accountant]
    return math.inf if value is None else value
