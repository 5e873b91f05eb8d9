"""Levers on activity sampling: what capping rates, or mixing in uniform ones, costs each level.

A cap takes rounds from heavy devices and gives them to light ones; a uniform mixture likewise. For
each value of the lever the rates are found anew, for the same expected cohort, noise and rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import NEARLY, composition_epsilon
from sottovoce.privacy.accounting.events import Event, GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.accounting.planning import Layer
from sottovoce.server.account import AccountConfig, Facts, check_delta_for
from sottovoce.server.account_run import ledger_of
from sottovoce.strategies.counts import LevelCounts
from sottovoce.strategies.rates import ActivityWeight, rates_from_counts

CAPS = (1.5, 2, 3, 5, 10, 20, 50)  # times the uniform rate
MIXES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Plan:
    """What stays the same in a sweep. `counts`: devices by level."""

    counts: dict[int, float]
    cohort_size: float
    noise_multiplier: float
    rounds: int
    delta: float
    weight: ActivityWeight
    spent: tuple[Event, ...] = ()
    accountant: str = "pld"

    @property
    def uniform_rate(self) -> float:
        return self.cohort_size / sum(self.counts.values())


def swept(
    plan: Plan, lever: str, values: Sequence[float] | None, *, was_run: bool = False
) -> Facts:
    """Rows {value, epsilon, expected_cohort, by_level} of each value that the cohort allows."""
    check_delta_for(plan.delta, sum(plan.counts.values()))
    own = getattr(plan.weight, lever)
    usual = [v for v in _usual(plan, lever) if not math.isclose(v, own, rel_tol=0.01)]
    chosen = sorted({*(values or usual), own})
    rows = [_row(plan, lever, value) | {"as_run": was_run and value == own} for value in chosen]
    return {
        "sweep": {
            "lever": lever,
            "delta": plan.delta,
            "noise_multiplier": plan.noise_multiplier,
            "steps": plan.rounds,
            "cohort_size": plan.cohort_size,
            "rows": rows,
        }
    }


def sweep_of_plan(config: AccountConfig) -> Facts:
    """A sweep over a population that `levels`, or `preset` and `devices`, describe."""
    missing = [
        name for name in ("noise_multiplier", "steps", "delta", "cohort_size")
        if getattr(config, name) is None
    ]
    if config.levels is None and (config.preset is None or config.devices is None):
        missing.append("levels (or preset and devices)")
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: a sweep needs them, or run=RUN")
    assert config.noise_multiplier is not None and config.steps and config.cohort_size
    assert config.delta is not None and config.sweep is not None
    weight = ActivityWeight(
        config.activity_weight, config.activity_power, config.uniform_mix,  # type: ignore[arg-type]
        1.0 if config.max_rate is None else config.max_rate,
    )
    plan = Plan(
        _counts(config), config.cohort_size, config.noise_multiplier, config.steps, config.delta,
        weight, accountant=config.accountant,
    )
    return swept(plan, config.sweep, config.values)


def sweep_of_run(config: AccountConfig, folder: Path) -> Facts:
    """A sweep around what was run: its levels, noise, rounds and weights, from the ledger."""
    ledger = ledger_of(folder)
    assert config.sweep is not None
    said = ledger.claims
    if said.get("sampler") != "ActivitySampler" or not ledger.levels:
        raise ConfigError(f"{config.run} did not sample by known activity levels: nothing to sweep")
    rounds = [
        event for event in ledger
        if isinstance(event, GaussianEvent) and event.unit == "device" and event.by_level
        and event.sampling == "poisson"
    ]
    noises = {event.noise_multiplier for event in rounds}
    delta = config.delta or ledger.deltas.get("device")
    if len(noises) != 1 or delta is None:
        raise ConfigError(f"{config.run} has no device-level rounds of one noise: nothing to sweep")
    weight = ActivityWeight(
        said["weight"], said.get("power", 0.5), said["uniform_mix"], said["max_rate"]
    )
    plan = Plan(
        {level: float(count) for level, count in ledger.levels.items()},
        said["expected_cohort_size"], noises.pop(), len(rounds), delta, weight,
        _others(ledger, rounds), config.accountant,
    )
    return swept(plan, config.sweep, config.values, was_run=True)


def _others(ledger: Ledger, rounds: list[GaussianEvent]) -> tuple[Event, ...]:
    """What else was released about devices against `release`: an activity histogram."""
    own = {id(event) for event in rounds}
    return tuple(
        event for event in ledger
        if event.unit == "device" and id(event) not in own and event.observer == "release"
    )


def _counts(config: AccountConfig) -> dict[int, float]:
    if config.levels is not None:
        found = {level: float(count) for level, count in enumerate(config.levels)}
        if min(found.values(), default=-1.0) < 0 or not sum(found.values()):
            raise ConfigError(f"levels={config.levels} must be devices at level 0, 1, ..., >= 0")
        return found
    from sottovoce.simulations.activity import activity_model

    model = activity_model(str(config.preset), None, None, 10_000)
    return dict(enumerate(model.expected_level_counts(config.devices or 0).tolist()))


def _usual(plan: Plan, lever: str) -> list[float]:
    if lever == "uniform_mix":
        return list(MIXES)
    return [*(rate for by in CAPS if (rate := by * plan.uniform_rate) < 1), 1.0]


def _row(plan: Plan, lever: str, value: float) -> dict[str, Any]:
    known = LevelCounts("model", plan.counts, {})
    weight = ActivityWeight(**(vars(plan.weight) | {lever: value}))
    rates = rates_from_counts(weight, known, plan.cohort_size)
    levels = [level for level, count in plan.counts.items() if count >= 0.5]
    layer = Layer(
        float("inf"), plan.delta,
        tuple((level, rates.by_level[level], 1) for level in levels),
        plan.noise_multiplier, spent=plan.spent, accountant=plan.accountant,
    )
    found = layer.compositions(plan.rounds)
    rows = [
        {
            "level": level,
            "devices": round(plan.counts[level]),
            "sampling_rate": rates.by_level[level],
            "epsilon": composition_epsilon(steps, plan.delta, plan.accountant, NEARLY),
        }
        for (level, _), steps in found.items()
        if level is not None
    ]
    return {
        "value": value,
        "epsilon": max(row["epsilon"] for row in rows),
        "expected_cohort": rates.expected_cohort,
        "by_level": rows,
    }
