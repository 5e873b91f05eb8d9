"""The privacy statement of a run: what is promised, to whom, under which assumptions, what is not.

Pure functions of the run's summary, ledger and config. Nothing here computes an epsilon; it says
what those that were computed mean. A claim made for one observer holds for every later one
(post-processing), and for no earlier one:

    fleet (sees each device's update) -> server (sees each round's sum) -> release (sees models)
"""

from __future__ import annotations

from dataclasses import dataclass

from sottovoce.server.claims import NO_GUARANTEE, SEES, Claim, device_count, unit_claim
from sottovoce.server.run_record import UNITS, Record, bare_releases, claim, setting
from sottovoce.server.wording import (
    count_text,
    epsilon_text,
    number,
    projection_text,
    small_text,
)

OBSERVERS = ("fleet", "server", "release")
VOCABULARIES = {
    "grammar": "the grammar's own words",
    "hash": "hashed word buckets",
    "file": "a file given by the user",
    "auto": "chosen for the population",
}


@dataclass(frozen=True)
class PrivacyStatement:
    """The whole statement. `warnings` are shown in red, before anything else.

    `observers`: rows (observer, what it sees, {unit: epsilon as text}).
    """

    headline: str
    claims: tuple[Claim, ...]
    observers: tuple[tuple[str, str, dict[str, str]], ...]
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]
    warnings: tuple[str, ...]


def privacy_statement(summary: Record, ledger: Record, config: Record) -> PrivacyStatement:
    """The statement for a run, from its summary.json, ledger.json and config.yaml as plain data."""
    claims = tuple(
        unit_claim(unit, summary, ledger, config)
        for unit in UNITS
        if setting(config, f"privacy.{unit}.enabled") or claim(summary, unit)
    )
    nothing = all(c.infinite for c in claims)
    return PrivacyStatement(
        headline=_headline(claims),
        claims=claims,
        observers=_observers(claims),
        covered=() if nothing else _covered(summary, config),
        not_covered=() if nothing else _not_covered(claims, summary, config),
        warnings=_warnings(claims, summary, ledger, config),
    )


def vocabulary_source(summary: Record, config: Record) -> str:
    """Where the words came from: as the run resolved it, else as configured."""
    resolved = setting(summary, "vocabulary.source")
    return str(resolved or setting(config, "task.vocabulary.source") or "")


def _headline(claims: tuple[Claim, ...]) -> str:
    if not claims:
        return (f"This run gives {NO_GUARANTEE}. No noise was added: whoever sees a released "
                "model may learn anything that any device said. Do not use such a run on "
                "people's data without another protection.")
    if all(c.infinite for c in claims):
        return f"This run gives {NO_GUARANTEE}: epsilon is infinite."
    return " ".join(c.sentence for c in claims)


def _observers(claims: tuple[Claim, ...]) -> tuple[tuple[str, str, dict[str, str]], ...]:
    """Epsilon of every claim for every observer: infinite for those before the claim's own."""

    def spent(made: Claim, observer: str) -> str:
        upstream = OBSERVERS.index(observer) < OBSERVERS.index(made.observer)
        return "∞" if upstream else epsilon_text(made.epsilon)

    rows = ((name, SEES[name], {c.unit: spent(c, name) for c in claims}) for name in OBSERVERS)
    return tuple(rows) if claims else ()


def _covered(summary: Record, config: Record) -> tuple[str, ...]:
    rounds = number(summary.get("rounds"))
    span = f"all {count_text(rounds)} rounds" if rounds else "all rounds"
    covered = [f"Every global model released in {span}, the last one included, and anything "
               "computed from them."]
    if setting(config, "privacy.device.private_metrics"):
        covered.append("Training figures of every round (devices, examples, training loss, clipped "
                       "fraction, mean norm): noised, each device's part cut to a public bound.")
    local = number(setting(config, "strategy.level_epsilon"))
    if local is not None:
        covered.append("Activity levels: every device reports its own once, by randomised response "
                       f"(ε = {epsilon_text(local)}), and is sampled and counted by its report.")
    source = vocabulary_source(summary, config)
    if source not in ("training_text", ""):
        text = setting(summary, "vocabulary.description") or VOCABULARIES.get(source, source)
        covered.append(f"The vocabulary: it is public ({text}) and says nothing of anyone's text.")
    return tuple(covered)


def _not_covered(claims: tuple[Claim, ...], summary: Record, config: Record) -> tuple[str, ...]:
    parts = []
    if any(c.unit == "device" for c in claims):
        parts.append("The server, which sees each sum before central noise, and the fleet, which "
                     "sees each update: against them the device-level epsilon is infinite. They "
                     "must be trusted.")
    else:
        parts.append("Devices as a whole: only single examples are protected. What one person "
                     "says many times, or in many ways, may show.")
    if setting(config, "privacy.device.private_metrics"):
        parts.append("Metrics on held-out devices: computed from their text without noise; these "
                     "devices never train. What the run says of its population is exact too.")
    elif setting(config, "population.name") == "live":
        parts.append("How many devices took part, declined or were late, and the update's norm: "
                     "exact, for the operator's eyes. Devices report no other figures.")
    else:
        parts += [
            "Metrics on held-out devices and examples: computed from their text without noise.",
            "Training figures here and in metrics.jsonl (training loss, clipped fractions, update "
            "norms, participations by level): exact, for the operator's eyes.",
        ]
    if setting(config, "strategy.level_epsilon") is None:
        parts.append("Activity levels: every device reports its own to the coordinator, without "
                     "noise.")
    parts += [
        "Tuning: every earlier run on the same devices has spent privacy of its own.",
    ]
    if vocabulary_source(summary, config) == "training_text":
        parts.append("The vocabulary: its words were read from training text.")
    return tuple(parts)


def _warnings(
    claims: tuple[Claim, ...], summary: Record, ledger: Record, config: Record
) -> tuple[str, ...]:
    """What a reader must see first; the run's own warnings are not said twice."""
    found = []
    noise = str(summary.get("noise") or setting(ledger, "claims.noise") or "")
    if "reproducible" in noise or (not noise and config.get("seed") is not None):
        found.append("reproducible noise: simulation only. Whoever knows the seed can take the "
                     "noise away; a real deployment must not set one.")
    if all(c.infinite for c in claims):
        found.append(f"{NO_GUARANTEE}: no noise was added to what was released; epsilon is "
                     "infinite for every observer.")
    if projected := projection_text(summary.get("projection")
                                    or setting(ledger, "claims.projection")):
        found.append(f"{projected}. Never release its model.")
    if vocabulary_source(summary, config) == "training_text":
        found.append("vocabulary read from training text: its words are released as they are, "
                     "outside every epsilon stated here.")
    found += [f"released without noise: {what}." for what in bare_releases(ledger)
              if claims and "vocabulary" not in what]
    found += [_delta_warning(c, summary, config) for c in claims if c.unit == "device"]
    return tuple(_merge([w for w in found if w], [str(w) for w in summary.get("warnings") or []]))


def _merge(found: list[str], stated: list[str]) -> list[str]:
    """`found`, then those `stated` by the run whose subject was not yet named."""
    subjects = ("reproducible noise", NO_GUARANTEE, "projection", "training text", "1/devices")
    said = [s for s in subjects if any(s in w for w in found)]
    return found + [w for w in stated if not any(s in w for s in said)]


def _delta_warning(made: Claim, summary: Record, config: Record) -> str:
    devices = device_count(summary, config)
    if not devices or made.delta is None or made.delta < 1 / devices:
        return ""
    return (f"delta={small_text(made.delta)} is not below 1/devices={small_text(1 / devices)}: "
            f"lower privacy.{made.unit}.delta for a guarantee that means something for every "
            f"{made.unit}.")
