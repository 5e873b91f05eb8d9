"""What a run promises for one unit, device or example, in sentences and terms.

Facts come from the ledger's events where they are there, else from the config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from sottovoce.server.run_record import (
    OBSERVER,
    UNITS,
    Record,
    claim,
    ledger_levels,
    level_rows,
    private_events,
    setting,
)
from sottovoce.server.wording import epsilon_text, level_text, number, small_text

NO_GUARANTEE = "no privacy guarantee"
SEES = {
    "fleet": "each device's update",
    "server": "each round's sum of updates, before central noise",
    "release": "every released global model",
}
UNIT_TEXT = {
    "device": "Device: everything that one device holds and sends, over the whole run.",
    "example": "Example: one utterance or message. What a person says often is protected less "
    "than what is said once.",
}
RELATIONS = {
    "add_remove": "Add or remove one {unit}: the neighbouring run has all the same data, "
    "except that this {unit} is absent.",
    "zero_out": "Zero-out: in the neighbouring run the same {unit} takes part and still adds its "
    "own noise, but its data contribute nothing. Only the clipped signal differs, as noise does "
    "not depend on data. What a device says is hidden; that it takes part may show. This is not "
    "the add/remove relation.",
    "replace_one": "Replace one {unit}: the neighbouring run has another {unit} in its place.",
}
TOPPED_UP = (" The noise that devices add themselves is topped up to a public total, so that the "
             "noise on a sum does not tell who took part.")


@dataclass(frozen=True)
class Fact:
    """One term of the statement; `caution` marks what a reader must not miss."""

    term: str
    text: str
    caution: bool = False


@dataclass(frozen=True)
class Claim:
    """What is promised for one unit: a sentence, its terms and epsilon per activity level."""

    unit: str
    observer: str
    epsilon: float | None
    delta: float | None
    sentence: str
    meaning: str
    facts: tuple[Fact, ...]
    by_level: tuple[Record, ...]

    @property
    def infinite(self) -> bool:
        """Whether nothing at all is promised."""
        return self.epsilon is not None and math.isinf(self.epsilon)


def unit_claim(unit: str, summary: Record, ledger: Record, config: Record) -> Claim:
    """The claim for `unit`, from summary.json, ledger.json and config.yaml as plain data."""
    stated = claim(summary, unit)
    epsilon = number(stated.get("epsilon"))
    delta = number(stated.get("delta") or setting(ledger, f"deltas.{unit}")
                   or setting(config, f"privacy.{unit}.delta"))
    found = str(stated.get("observer") or _first(unit, "observer", ledger))
    observer = found if found in SEES else OBSERVER[unit]
    return Claim(
        unit=unit,
        observer=observer,
        epsilon=epsilon,
        delta=delta,
        sentence=_sentence(unit, epsilon, delta, observer),
        meaning=_meaning(unit, epsilon, delta),
        facts=_facts(unit, observer, delta, summary, ledger, config),
        by_level=tuple(level_rows(stated)),
    )


def accountant_text(versions: Mapping[str, str] | None = None) -> str:
    """The accountant behind every epsilon, with its version (as run, else as installed)."""
    version = (versions or {}).get("dp-accounting") or installed_version("dp-accounting")
    return f"PLD (privacy loss distributions, pessimistic estimates) by dp-accounting {version}."


def installed_version(distribution: str) -> str:
    """The installed version of `distribution`, "not installed" where it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def success_bound(epsilon: float, delta: float, false_positives: float) -> float:
    """Highest true positive rate of any membership attack at a false positive rate.

    The two trade-offs of (epsilon, delta)-DP as a hypothesis test: Kairouz et al. 2015,
    arXiv:1311.0776, theorem 2.1.
    """
    if math.isinf(epsilon):
        return 1.0
    upper = math.exp(min(epsilon, 700.0)) * false_positives + delta
    return min(upper, 1 - math.exp(-epsilon) * (1 - false_positives - delta), 1.0)


def device_count(summary: Record, config: Record) -> float | None:
    """Training devices of the population, None where no file says so."""
    return number(setting(summary, "population.devices")
                  or setting(config, "population.devices"))


def _sentence(unit: str, epsilon: float | None, delta: float | None, observer: str) -> str:
    if epsilon is None:
        return f"{unit.capitalize()}-level: noise was added, but this folder states no epsilon."
    if math.isinf(epsilon):
        return f"{unit.capitalize()}-level: {NO_GUARANTEE} (epsilon is infinite)."
    return (
        f"{unit.capitalize()}-level (ε = {epsilon_text(epsilon)}, δ = {small_text(delta)}) "
        f"differential privacy against whoever sees {SEES[observer]}."
    )


def _meaning(unit: str, epsilon: float | None, delta: float | None) -> str:
    if epsilon is None or math.isinf(epsilon):
        return ""
    percent = math.ceil(1000 * success_bound(epsilon, delta or 0.0, 0.01)) / 10
    unused, used = {"device": ("devices whose data were not used", "those whose data were"),
                    "example": ("examples that were not used", "those that were")}[unit]
    test = (f"In words: a test that wrongly names 1\u00a0% of the {unused} rightly names at most "
            f"{min(percent, 100.0):.1f}\u00a0% of {used}, whatever else the attacker knows.")
    if percent < 95:
        return test
    return f"{test} An epsilon this large rules out little by itself: put an audit beside it."


def _facts(unit: str, observer: str, delta: float | None, summary: Record, ledger: Record,
           config: Record) -> tuple[Fact, ...]:
    both = all(setting(config, f"privacy.{u}.enabled") for u in UNITS)
    fixed = setting(config, "strategy.sampler") == "fixed_size"
    assumed = "replace_one" if fixed else "zero_out" if both else "add_remove"
    relation = (_first(unit, "relation", ledger)
                or (assumed if unit == "device" else "add_remove"))
    neighbours = RELATIONS.get(relation, relation).format(unit=unit)
    if both and (unit, relation) == ("device", "add_remove"):
        neighbours += TOPPED_UP
    return (
        Fact("Unit", UNIT_TEXT[unit]),
        Fact("Neighbouring relation", neighbours),
        Fact("Observer", f"{observer.capitalize()}: sees {SEES[observer]}, and anything "
             "computed from it."),
        _delta_fact(unit, delta, device_count(summary, config)),
        Fact("Sampling, as run", _sampling_text(unit, summary, ledger, config)),
        Fact("Noise multiplier", _noise_text(unit, ledger, config)),
        Fact("Accountant", accountant_text(setting(summary, "environment"))),
    )


def _delta_fact(unit: str, delta: float | None, devices: float | None) -> Fact:
    if delta is None:
        return Fact("Delta", "Not stated in this folder.", caution=True)
    text = f"δ = {small_text(delta)}"
    if not devices:
        return Fact("Delta", f"{text}; the number of devices is not stated.")
    limit = f"1/devices = {small_text(1 / devices)}"
    if delta < 1 / devices:
        return Fact("Delta", f"{text}, below {limit}.")
    return Fact("Delta", f"{text}, not below {limit}: so large a delta allows a mechanism that "
                f"publishes one {unit} in full.", caution=True)


def _sampling_text(unit: str, summary: Record, ledger: Record, config: Record) -> str:
    fixed = unit == "device" and setting(config, "strategy.sampler") == "fixed_size"
    kind = _first(unit, "sampling", ledger) or ("fixed_size" if fixed else "poisson")
    if unit == "example":
        return _local_sampling_text(kind, config)
    if kind == "fixed_size":
        return ("Fixed size: the same number of devices each round, drawn without replacement, "
                "and accounted as such. Assumes that the draw stays secret.")
    if kind == "none":
        return "No amplification by sampling is claimed: who takes part may be known."
    known = level_rows(claim(summary, unit)) or ledger_levels(ledger)
    rows = [r for r in known if number(r.get("sampling_rate"))]
    hidden = ("No amplification is claimed for it, as taking part may show."
              if _first(unit, "relation", ledger) == "zero_out"
              else "Assumes that who was drawn stays secret.")
    return (f"Poisson: every device joins each round by a draw of its own, with a public "
            f"probability{_rates_text(rows)}. Rates are fixed in advance and do not depend on who "
            f"is present. {hidden}")


def _rates_text(rows: list[Record]) -> str:
    if not rows:
        return " given by its activity level"
    by_rate = sorted(rows, key=lambda row: float(row["sampling_rate"]))
    low, high = (f"{small_text(r['sampling_rate'])} (devices with {level_text(int(r['level']))} "
                 f"example{'' if r['level'] == 0 else 's'})" for r in (by_rate[0], by_rate[-1]))
    if by_rate[0]["sampling_rate"] == by_rate[-1]["sampling_rate"]:
        return f" of {small_text(by_rate[0]['sampling_rate'])}, the same for all"
    return f" given by its activity level: from {low} to {high}"


def _local_sampling_text(kind: str, config: Record) -> str:
    bound = setting(config, "privacy.example.max_participations")
    limit = f", at most {bound} of them" if bound else ""
    local = {
        "poisson": "Poisson batches on the device: every example joins each step by a draw of "
        "its own",
        "fixed_size": "Batches of a fixed size, drawn on the device without replacement",
    }.get(kind, "No amplification by sampling is claimed on the device")
    return (f"{local}. All participations of a device compose{limit}. That devices are sampled "
            "is not counted in their favour, as the fleet sees who takes part.")


def _noise_text(unit: str, ledger: Record, config: Record) -> str:
    found = sorted({m for e in private_events(ledger, unit)
                    if (m := number(e.get("noise_multiplier"))) is not None})
    configured = number(setting(config, f"privacy.{unit}.noise_multiplier"))
    multipliers = found or ([] if configured is None else [configured])
    clip = number(setting(config, f"privacy.{unit}.clip_norm"))
    span = " to ".join(dict.fromkeys(f"{m:.4g}" for m in multipliers[:1] + multipliers[-1:]))
    norm = "" if clip is None else f", clip norm {clip:g}"
    return f"{span or 'not stated'}{norm}. The noise's standard deviation is their product."


def _first(unit: str, key: str, ledger: Record) -> str | None:
    return next((str(e[key]) for e in private_events(ledger, unit) if e.get(key)), None)
