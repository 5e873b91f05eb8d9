"""The statement that goes with a model: what its ledger proves, in the terms of the field.

    NIST SP 800-226 (2025), Guidelines for Evaluating Differential Privacy Guarantees: unit of
        privacy, neighbouring relation, privacy loss, trust model, mechanism, what is outside
    How to DP-fy ML, Ponomareva et al. 2023, arXiv:2303.00654, section 5.3.3: setting, definition
        (accesses covered, output, unit, adjacency), accounting and its assumptions, verifiability

Everything is computed from the ledger, so that a statement can be checked by whoever has the file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from sottovoce.privacy.accounting.accountants import by_level
from sottovoce.privacy.accounting.events import (
    OBSERVERS,
    Event,
    GaussianEvent,
    NonPrivateRelease,
    RandomisedReport,
)
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.server.account_run import claims
from sottovoce.server.claims import RELATIONS, SEES, UNIT_TEXT, installed_version
from sottovoce.server.wording import count_text, epsilon_text, projection_text, small_text

Facts = dict[str, Any]

LEADS = {"device": "release", "example": "server"}
SETTINGS = {
    "release": "central: the coordinator is trusted; it sees each round's sum before noise, as the "
    "fleets see single updates",
    "server": "distributed: devices and fleets are trusted; noise is in every sum before the "
    "server sees it",
    "fleet": "local: only the device itself is trusted; noise is in every update that leaves it",
}
METHODS = {
    "pld": "privacy loss distributions (connect-the-dots), pessimistic estimates only; exact "
    "Gaussian formula where nothing is sampled",
    "rdp": "Renyi differential privacy",
    "prv": "privacy loss random variables (upper bound): a cross-check, not a reference",
}
EXACT = (
    "metrics and training figures, counts of participations and costs among them, which are "
    "computed from private data without noise"
)
HELD_OUT = ("figures measured on held-out devices, which never train, and what the run says of its "
            "population: both without noise")
LEVELS_PUBLIC = (
    "Activity levels, the powers of two that devices report, are taken as public: an example is "
    "protected as long as its device's level stays the same without it. "
)
TAKEN_PART = (
    "participations of each activity level's busiest device: the ledger and the example-level "
    "epsilon tell them exactly, which the device-level epsilon does not cover"
)
OUTSIDE = (
    "tuning: earlier runs on the same data",
    "side channels: timing, floating-point rounding of noise, compromised devices",
    "what many devices or examples have in common: that may be learned by design",
)


def disclosure(
    ledger: Ledger, *, accountant: str = "pld", delta: float | None = None
) -> Facts:
    """The statement's facts, JSON values but for infinite floats.

    `guarantees`: one for each unit, against the observer for whom the unit is protected; `table`:
    epsilon for every unit and observer, infinite ones included.
    """
    table = claims(ledger, delta, accountant)
    projected = projection_text(ledger.claims.get("projection"))
    devices = sum(ledger.levels.values())
    guarantees = [
        _guarantee(ledger, _leading(table, unit), accountant, devices)
        for unit in dict.fromkeys(row["unit"] for row in table)
    ]
    return {
        "terms": ["NIST SP 800-226", "arXiv:2303.00654"],
        "guarantees": guarantees,
        "table": table,
        "covered": _covered(ledger),
        "not_covered": [
            *_bare(ledger), *_told_apart(ledger),
            HELD_OUT if "private_metrics" in ledger.claims else EXACT, *OUTSIDE,
        ],
        "tuning": _tuning(ledger),
        "noise": str(ledger.claims.get("noise", "its source is not recorded")),
        "projection": projected is not None,
        "projected": projected,
        "conditions": ledger.claims.get("conditions"),
        "accountant": {
            "name": accountant,
            "method": METHODS[accountant],
            "library": f"dp-accounting {installed_version('dp-accounting')}",
            "software": f"sottovoce {_version()}",
        },
        "ledger": {"events": len(ledger), "head": ledger.head},
        "verify": "sottovoce account run=RUN computes every figure again from ledger.json alone",
    }


def paragraph(facts: Facts) -> str:
    """The facts as one paragraph."""
    if not facts["guarantees"]:
        return (
            "This model comes with no differential privacy guarantee: its ledger records no "
            "mechanism, and epsilon is infinite for every unit and observer."
        )
    parts = [_sentences(made, facts) for made in facts["guarantees"]]
    endless = sorted(
        {f"{row['unit']}s against {row['observer']}" for row in facts["table"]
         if math.isinf(row["epsilon"])}
    )
    if endless:
        parts.append(f"No guarantee (epsilon is infinite) holds for {', '.join(endless)}.")
    parts.append(f"Covered: {'; '.join(facts['covered']) or 'nothing was released'}.")
    parts.append(f"Not covered: {'; '.join(facts['not_covered'])}.")
    parts.append(facts["tuning"])
    if "reproducible" in facts["noise"]:
        parts.append("The noise is reproducible from a seed: a simulation, not a release.")
    if facts["projection"]:
        parts.insert(0, f"{facts['projected']}.")
    if facts.get("conditions"):
        parts.append(_conditions_text(facts["conditions"]))
    parts.append(
        f"Accountant: {facts['accountant']['method']}; {facts['accountant']['library']}, "
        f"{facts['accountant']['software']}. Ledger: {facts['ledger']['events']} events, head "
        f"{facts['ledger']['head'][:16]}."
    )
    return " ".join(parts)


def _conditions_text(said: Mapping[str, Any]) -> str:
    return (
        f"Devices were asked at {said['over_selection']:g} times the wanted rate, and the rates "
        "above are those at which they were asked; of those asked, not all answer. That they do "
        "not is assumed not to depend on their data, given their activity level, and is not "
        "counted in their favour; sums are divided by the public expected number of answers, "
        f"{said['expected_replies']:.4g}."
    )


# -- one unit --------------------------------------------------------------------------------------


def _leading(table: Sequence[Facts], unit: str) -> Facts:
    """The claim against whoever sees most of those with a finite epsilon, else the usual one."""
    rows = [row for row in table if row["unit"] == unit]
    finite = [row for row in rows if math.isfinite(row["epsilon"])]
    if finite:
        return max(finite, key=lambda row: [*OBSERVERS].index(row["observer"]))
    return next(row for row in rows if row["observer"] == LEADS[unit])


def _guarantee(ledger: Ledger, row: Facts, accountant: str, devices: int) -> Facts:
    unit, observer, delta = row["unit"], row["observer"], row["delta"]
    return {
        **row,
        "unit_text": UNIT_TEXT[unit],
        "relation_text": RELATIONS[row["relation"]].format(unit=unit),
        "observer_text": f"sees {SEES[observer]}",
        "trust": SETTINGS[observer],
        "delta_text": _delta_text(delta, devices),
        "mechanisms": _mechanisms(ledger, unit),
        "schedule": _schedule(ledger) if unit == "device" else None,
        "levels": len(by_level(ledger, delta, unit, observer, accountant)),
    }


def _delta_text(delta: float, devices: int) -> str:
    if not devices:
        return "chosen for the run; the number of devices is not recorded"
    share = 1 / devices
    if delta < share:
        return (f"below 1/devices = {small_text(share)}, so that not even one device's data may "
                "be published outright")
    return (f"NOT below 1/devices = {small_text(share)}: a mechanism that publishes one device's "
            "data would pass")


def _schedule(ledger: Ledger) -> Facts | None:
    """What a claim without sampling rests on, None where it rests on none."""
    planned = ledger.claims.get("correlated_noise")
    names = ("rounds", "min_separation", "max_participations", "sensitivity")
    return {name: planned[name] for name in names} if planned else None


def _mechanisms(ledger: Ledger, unit: str) -> list[Facts]:
    """Every kind of noised release about the unit: noise, sampling as run, how many."""
    kinds: dict[tuple[str, str], list[GaussianEvent | RandomisedReport]] = {}
    for event in ledger:
        if event.unit == unit and not isinstance(event, NonPrivateRelease):
            kinds.setdefault((event.purpose, event.observer), []).append(event)
    return [_mechanism(purpose, observer, events) for (purpose, observer), events in kinds.items()]


def _mechanism(
    purpose: str, observer: str, events: Sequence[GaussianEvent | RandomisedReport]
) -> Facts:
    facts: Facts = {"purpose": purpose, "observer": observer, "events": len(events)}
    reports = [event for event in events if isinstance(event, RandomisedReport)]
    if reports:
        return facts | {
            "mechanism": "randomised response",
            "epsilon_each": max(event.epsilon for event in reports),
        }
    sums = [event for event in events if isinstance(event, GaussianEvent)]
    noises = [event.noise_multiplier for event in sums]
    rates = [rate for event in sums for rate in _rates(event)]
    return facts | {
        "mechanism": "Gaussian",
        "noise_multiplier": sorted({min(noises), max(noises)}),
        "sampling": sorted({event.sampling for event in sums}),
        "sampling_rate": sorted({min(rates), max(rates)}) if rates else [],
    }


def _rates(event: GaussianEvent) -> list[float]:
    if event.by_level is None:
        return [event.sampling_rate]
    return [rate for _, rate, count in event.by_level if count]


def _sentences(made: Facts, facts: Facts) -> str:
    unit, observer = made["unit"], made["observer"]
    if math.isinf(made["epsilon"]):
        return f"{unit.capitalize()}-level: no guarantee, epsilon is infinite."
    relation = made["relation"].replace("_", "/" if made["relation"] == "add_remove" else "-")
    levels = f", for the worst of {made['levels']} activity levels" if made["levels"] > 1 else ""
    return (
        f"{unit.capitalize()}-level (ε = {epsilon_text(made['epsilon'])}, δ = "
        f"{small_text(made['delta'])}) differential privacy under the {relation} relation, "
        f"against whoever {made['observer_text']} ({observer}){levels}. Trust: {made['trust']}. "
        f"{' '.join(_mechanism_text(kind) for kind in made['mechanisms'])} "
        f"{_schedule_text(made['schedule'])}{LEVELS_PUBLIC if unit == 'example' else ''}"
        f"δ is {made['delta_text']}."
    )


def _schedule_text(schedule: Facts | None) -> str:
    if schedule is None:
        return ""
    times, apart = schedule["max_participations"], schedule["min_separation"]
    rests = f", at least {apart} rounds apart" if times > 1 and apart > 1 else ""
    return (
        "All rounds together are that one release, paid for in full from the first round on. It "
        f"rests on a schedule that the coordinator enforces: no device takes part more than "
        f"{'once' if times == 1 else f'{times} times'}{rests}, in {schedule['rounds']} rounds; "
        "activity levels, by which devices may be preferred, are taken as public. "
    )


def _mechanism_text(kind: Facts) -> str:
    times = f"{count_text(kind['events'])} times" if kind["events"] > 1 else "once"
    if kind["mechanism"] == "randomised response":
        return (f"Mechanism: randomised response ({kind['purpose']}), "
                f"ε = {epsilon_text(kind['epsilon_each'])} each, {times}.")
    noise = " to ".join(f"{value:.4g}" for value in kind["noise_multiplier"])
    text = f"Mechanism: Gaussian ({kind['purpose']}), noise multiplier {noise}, recorded {times}; "
    return text + " ".join(_sampling_text(name, kind["sampling_rate"]) for name in kind["sampling"])


def _sampling_text(sampling: str, rates: list[float]) -> str:
    span = " to ".join(small_text(rate) for rate in rates)
    return {
        "poisson": f"Poisson-sampled as run, by secret coins at public rates of {span}.",
        "fixed_size": f"a fixed number drawn without replacement, rate {span}; the draw is secret.",
        "none": "no amplification by sampling is claimed.",
    }[sampling]


# -- the run ---------------------------------------------------------------------------------------


def _covered(ledger: Ledger) -> list[str]:
    """Noised releases by purpose, with how often each was recorded."""
    found = Counter(
        event.purpose for event in ledger if not isinstance(event, NonPrivateRelease)
    )
    return [f"{purpose} ({count_text(times)} events)" for purpose, times in found.items()]


def _bare(ledger: Ledger) -> list[str]:
    found: list[Event] = [event for event in ledger if isinstance(event, NonPrivateRelease)]
    return list(dict.fromkeys(
        f"{event.purpose}, which {event.observer} sees without noise" for event in found
    ))


def _told_apart(ledger: Ledger) -> list[str]:
    """What a ledger of both units shows of the cohorts: the device claim rests on their secrecy.

    Example events name the levels whose busiest device took part once more. Where a level has few
    devices, that tells who was drawn, which no noise covers.
    """
    levels = any(
        event.unit == "example" and isinstance(event, GaussianEvent) and event.by_level is not None
        for event in ledger
    )
    return [TAKEN_PART] if levels and any(event.unit == "device" for event in ledger) else []


def _tuning(ledger: Ledger) -> str:
    told = ledger.claims.get("tuning")
    if told:
        return f"Tuning: {told}."
    return ("Tuning: the ledger counts this run alone; every earlier run on the same data, to "
            "choose settings, has spent privacy of its own.")


def _version() -> str:
    try:
        return metadata.version("sottovoce")
    except metadata.PackageNotFoundError:
        return "unknown"
