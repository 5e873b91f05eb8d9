"""The epsilon of a run, from its ledger alone."""

from __future__ import annotations

import math
from pathlib import Path

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import by_level, epsilon
from sottovoce.privacy.accounting.events import OBSERVERS, GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.correlated import PURPOSE
from sottovoce.server.account import AccountConfig, Facts, check_delta_for
from sottovoce.server.account_plan import by_accountant, leading
from sottovoce.server.wording import projection_text


def ledger_of(run: Path) -> Ledger:
    """The ledger of a run's folder, or of the file itself. RunError where there is none."""
    return Ledger.load(run if run.is_file() else run / "ledger.json")


def of_run(config: AccountConfig, folder: Path) -> Facts:
    """Facts of the run in `folder`; see `sottovoce.server.account.account`."""
    ledger = ledger_of(folder)
    tally = ledger.tally
    if config.delta is not None:
        check_delta_for(config.delta, sum(ledger.levels.values()))
    unit = config.unit or next(iter((*ledger.deltas, *ledger.units)), "device")
    unit, observer = tally.resolve(unit, config.observer)
    if not (ledger.events or ledger.deltas):
        return _of_nothing(config, unit, observer)
    delta = _delta(config, ledger, unit)
    rows = by_level(ledger, delta, unit, observer, config.accountant)
    level = max(rows, key=lambda row: float(row["epsilon"]))["level"] if rows else None
    found = by_accountant(ledger, delta, unit, observer, level)
    facts = {
        "epsilon": leading(found, config.accountant),
        "delta": delta,
        **_what_was_run(ledger, unit, level),
        "accountant": config.accountant,
        "unit": unit,
        "observer": observer,
        "relation": tally.relation(unit),
        "by_accountant": found,
        "level": level,
        "by_level": rows,
        "claims": claims(ledger, config.delta, config.accountant),
        "run": str(folder),
        "head": ledger.head,
    }
    if projected := projection_text(ledger.claims.get("projection")):
        facts["projection"] = projected
    taken = participations(ledger)
    return facts | ({"participations": taken} if unit == "example" and taken else {})


def statement_of_run(config: AccountConfig, folder: Path) -> Facts:
    """The run's statement: `paragraph`, one paragraph, and `statement`, its facts."""
    from sottovoce.server.disclosure import disclosure, paragraph

    found = disclosure(ledger_of(folder), accountant=config.accountant, delta=config.delta)
    return {"paragraph": paragraph(found), "statement": found}


def claims(ledger: Ledger, delta: float | None, accountant: str = "pld") -> list[Facts]:
    """Epsilon for every unit and observer, infinite ones included.

    Units are those that the ledger states a delta for or records releases about; where neither
    `delta` nor the ledger states one, a unit is left out.
    """
    units = [unit for unit in ("device", "example") if unit in (*ledger.deltas, *ledger.units)]
    return [
        {
            "unit": unit,
            "observer": observer,
            "relation": ledger.tally.relation(unit),
            "delta": stated,
            "epsilon": epsilon(
                ledger, stated, unit=unit, observer=observer, accountant=accountant
            ),
        }
        for unit in units
        if (stated := ledger.deltas.get(unit) if delta is None else delta) is not None
        for observer in OBSERVERS
    ]


def participations(ledger: Ledger) -> list[Facts]:
    """How often devices of each level took part: the busiest one, and on average.

    `most`: participations of the busiest device, for which its examples are accounted; `expected`:
    rounds times the level's rate, None where the ledger has no device-level rounds.
    """
    most: dict[int, int] = {}
    expected: dict[int, float] = {}
    for event in ledger:
        if not isinstance(event, GaussianEvent) or event.by_level is None:
            continue
        for level, rate, _ in event.by_level:
            if event.unit == "example":
                most[level] = most.get(level, 0) + 1
            elif event.sampling == "poisson":
                expected[level] = expected.get(level, 0.0) + rate
    return [
        {"level": level, "most": most[level], "expected": expected.get(level)}
        for level in sorted(most)
    ]


def _of_nothing(config: AccountConfig, unit: str, observer: str) -> Facts:
    """A run without events or deltas trained without any mechanism: nothing is promised."""
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
    """Noise, rate and steps of the releases in which devices of `level` took part.

    Of correlated noise: as the run was set, and the rounds that it released.
    """
    planned = ledger.claims.get("correlated_noise") if unit == "device" else None
    if planned:
        steps = sum(isinstance(e, GaussianEvent) and e.purpose == PURPOSE for e in ledger)
        noise = planned["noise_multiplier"]
        return {"noise_multiplier": noise, "sampling_rate": 1.0, "steps": steps}
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
