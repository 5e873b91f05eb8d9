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

REPORTED = (" Its report of its activity level, by which it is sampled, is then one of a fixed "
            "level.")


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
    reports = unit == "device" and setting(config, "strategy.level_epsilon") is not None
    relation = "zero_out" if reports else relation
    neighbours = RELATIONS.get(relation, relation).format(unit=unit) + (REPORTED if reports else "")
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
        return _local_sampling_text(kind, config) + _kept_text(ledger)
    if kind == "fixed_size":
        return ("Fixed size: the same number of devices each round, drawn without replacement, "
                "and accounted as such. Assumes that the draw stays secret.")
    if kind == "none":
        planned = setting(ledger, "claims.correlated_noise")
        none = "No amplification by sampling is claimed: who takes part may be known."
        return f"{none} {_schedule_text(planned)}" if planned else none
    known = level_rows(claim(summary, unit)) or ledger_levels(ledger)
    rows = [r for r in known if number(r.get("sampling_rate"))]
    hidden = ("No amplification is claimed for it, as taking part may show."
              if _first(unit, "relation", ledger) == "zero_out"
              else "Assumes that who was drawn stays secret.")
    return (f"Poisson: every device joins each round by a draw of its own, with a public "
            f"probability{_rates_text(rows)}. Rates are fixed in advance and do not depend on who "
            f"is present. {hidden}{_timeline_text(ledger)}{_answers_text(ledger)}")


def _answers_text(ledger: Record) -> str:
    """What is not promised where some of the devices that are drawn do not answer."""
    said = setting(ledger, "claims.conditions")
    if not said:
        return ""
    return (f" Of {said['asked_cohort_size']:,.4g} devices drawn a round "
            f"{said['expected_replies']:,.4g} are expected to answer: that others do not must not "
            "depend on their data, and is not counted in anyone's favour.")


def _timeline_text(ledger: Record) -> str:
    """How rates and participations follow the periods; nothing for a static run."""
    if not setting(ledger, "claims.timeline"):
        return ""
    return (" Rates are public constants of each period; the highest of them is shown. No level "
            "has a higher one than the last, whose ε bounds every device, whatever levels it goes "
            "through.")


def _kept_text(ledger: Record) -> str:
    planned = setting(ledger, "claims.timeline")
    if not planned:
        return ""
    return (f" On this timeline that is: those of any {planned['retention']} periods in a row, "
            "after which an example is deleted.")


def _schedule_text(planned: Record) -> str:
    times, apart = planned["max_participations"], planned["min_separation"]
    rests = f", at least {apart} rounds apart" if times > 1 and apart > 1 else ""
    return (f"The claim rests on a schedule instead, which the coordinator enforces: no device "
            f"takes part more than {'once' if times == 1 else f'{times} times'}{rests}, in "
            f"{planned['rounds']} rounds.")


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
    planned = setting(ledger, "claims.correlated_noise") if unit == "device" else None
    if planned:
        return (f"{planned['noise_multiplier']:.4g}, clip norm {planned['clip_norm']:g}: the "
                "noise of a round before it is correlated with other rounds' "
                f"({planned['factorisation']['name']}, sensitivity {planned['sensitivity']:.4g}). "
                "All rounds together are worth one Gaussian release of noise multiplier "
                f"{planned['noise_multiplier'] / planned['sensitivity']:.4g}.")
    if unit == "device" and setting(config, "privacy.device.clipping") == "adaptive":
        return (f"{multipliers[0] if multipliers else 0:.4g}, of a round as a whole: the noised "
                "sum, and the noised count of unclipped devices by which the clip norm moves from "
                f"{clip or 0:g} on (clip_norm of each round in metrics.jsonl). The sum's own noise "
                "is a little larger.")
    measured = setting(ledger, "claims.private_metrics") if unit == "device" else None
    if measured:
        return (f"{multipliers[0] if multipliers else 0:.4g}, of a round as a whole: the noised "
                f"sum, clip norm {clip or 0:g}, and the noised training figures of the same "
                f"devices, which have {measured['noise_multiplier']:.4g}. The sum's own noise is a "
                "little larger.")
    span = " to ".join(dict.fromkeys(f"{m:.4g}" for m in multipliers[:1] + multipliers[-1:]))
    norm = "" if clip is None else f", clip norm {clip:g}"
    return f"{span or 'not stated'}{norm}. {_deviation_text(unit, config)}"


def _deviation_text(unit: str, config: Record) -> str:
    mode = setting(config, "privacy.example.clipping") if unit == "example" else None
    twice = mode == "micro_batch"
    base = "twice their product, as an example moves a micro-batch's mean by up to twice the norm"
    text = f"The noise's standard deviation is {base if twice else 'their product'}."
    if unit == "example" and setting(config, "privacy.example.threshold") == "quantile":
        text += (" Each device moves the clip norm by noised counts of its own; the multiplier is "
                 "that of a step's sum and count together.")
    if unit == "example" and setting(config, "privacy.example.noise") == "decay":
        text += (" Noise falls from round to round: a device's k-th participation is counted with "
                 "the noise of the k-th last round.")
    return text


def _first(unit: str, key: str, ledger: Record) -> str | None:
    return next((str(e[key]) for e in private_events(ledger, unit) if e.get(key)), None)
