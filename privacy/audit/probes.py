"""The probes by name: what reads data back out of a run, and what each of them needs.

A new probe is a class (`sottovoce.privacy.audit.leakage.Probe`) and a line in `PROBES`. They share
the setting `attacks` with the membership attacks; by default all run that the run can feed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.audit.attacks import KEPT
from sottovoce.privacy.audit.code_exposure import ExposureProbe
from sottovoce.privacy.audit.extraction import InversionProbe
from sottovoce.privacy.audit.leakage import Leakage, Probe
from sottovoce.privacy.audit.material import FinishedRun
from sottovoce.privacy.audit.update_leakage import UpdateProbe, without_noise

if TYPE_CHECKING:
    from sottovoce.client.fleet import LocalTraining

NO_CODES = "no code canaries were inserted (sottovoce simulate audit.codes=8)"
NO_TRAINING = "the run does not say how its devices train"
NO_NOISE = "devices add no noise, so that {name} is it"
FEWER = "{took_part} of {devices} canary devices took part in a round"


@dataclass(frozen=True)
class CodeProbe(Probe):
    """An extraction attack on the codes of a run; it says how many of them ever trained."""

    inner: InversionProbe | ExposureProbe
    name: str
    unit: str
    observer: str
    sees: str
    cost: str

    def missing(self, run: FinishedRun) -> str | None:
        return self.inner.missing(run) if run.codes else NO_CODES

    def measure(self, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
        found = self.inner.measure(run, seed=seed, confidence=confidence)
        if run.codes_trained is None:
            return found
        said = FEWER.format(took_part=run.codes_trained, devices=len(run.codes))
        return replace(found, note=f"{said}; {found.note}")


@dataclass(frozen=True)
class ObservedUpdates(Probe):
    """A probe of single updates, as a run's devices send them or as without their noise."""

    inner: UpdateProbe | None
    noised: bool
    name: str
    unit: str = "example"
    observer: str = "fleet"
    sees: str = UpdateProbe.sees
    cost: str = UpdateProbe.cost

    def missing(self, run: FinishedRun) -> str | None:
        if self.inner is None:
            return NO_TRAINING
        if not run.population.at_hand:
            return KEPT
        if not self.noised and not adds_noise(self.inner.training):
            return NO_NOISE.format(name=self.inner.name)
        return self.inner.missing(run)

    def measure(self, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
        assert self.inner is not None
        training = self.inner.training if self.noised else without_noise(self.inner.training)
        inner = replace(self.inner, training=training)
        found = inner.measure(run, seed=seed, confidence=confidence)
        if self.noised:
            return found
        return replace(found, name=self.name, sees=f"{self.sees}, had the device added no noise")


def adds_noise(training: LocalTraining) -> bool:
    """Whether devices add noise of their own to what they send."""
    return training.example is not None and training.example.noise_multiplier > 0


def _code_probe(kind: type[InversionProbe | ExposureProbe]) -> Callable[[FinishedRun], Probe]:
    def build(run: FinishedRun) -> Probe:
        inner = kind(tuple(run.codes))
        return CodeProbe(inner, inner.name, inner.unit, inner.observer, inner.sees, inner.cost)

    return build


def _update_probe(name: str, *, noised: bool) -> Callable[[FinishedRun], Probe]:
    def build(run: FinishedRun) -> Probe:
        found = None if run.training is None else UpdateProbe(name, run.training, engine=run.engine)
        return ObservedUpdates(found, noised, name if noised else f"{name}{WITHOUT_NOISE}")

    return build


WITHOUT_NOISE = "_without_noise"
PROBES: Mapping[str, Callable[[FinishedRun], Probe]] = {
    "model_inversion": _code_probe(InversionProbe),
    "exposure": _code_probe(ExposureProbe),
    "update_rows": _update_probe("update_rows", noised=True),
    "update_span": _update_probe("update_span", noised=True),
    f"update_rows{WITHOUT_NOISE}": _update_probe("update_rows", noised=False),
    f"update_span{WITHOUT_NOISE}": _update_probe("update_span", noised=False),
}


def listed(asked: object) -> list[str] | None:
    """The names that the setting `attacks` lists, each once; None for "default"."""
    if asked == "default":
        return None
    names = [asked] if isinstance(asked, str) else asked if isinstance(asked, Iterable) else []
    return list(dict.fromkeys(str(name) for name in names))


def choose_probes(asked: object, run: FinishedRun) -> tuple[list[Probe], dict[str, str]]:
    """The probes asked for, and why others are left out, by name.

    "default" is every one that the run can feed. Raises ConfigError for a named one that it cannot.
    """
    names = listed(asked)
    probes = [build(run) for name, build in PROBES.items() if names is None or name in names]
    lacking = {probe.name: why for probe in probes if (why := probe.missing(run)) is not None}
    if names is not None and lacking:
        name, reason = next(iter(lacking.items()))
        raise ConfigError(f"attacks={name} cannot run: {reason}")
    return [probe for probe in probes if probe.name not in lacking], lacking


def other_names(asked: object, known: Sequence[str]) -> object:
    """The setting `attacks` without the probes: for the membership attacks, which are `known`.

    Raises ConfigError, with all names, for one that is neither.
    """
    names = listed(asked)
    if names is None:
        return "default"
    every = (*known, *PROBES)
    if not names:
        raise ConfigError(f"attacks={asked!r} names none: give some of {', '.join(every)}")
    for name in names:
        if name not in every:
            raise ConfigError(f"attacks={name} is unknown: choose from {', '.join(every)}")
    return [name for name in names if name not in PROBES]


def carried_out(probe: Probe, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
    """What a probe found, with its cost and the seconds that all of it took."""
    started = time.perf_counter()
    found = probe.measure(run, seed=seed, confidence=confidence)
    seconds = max(found.seconds, time.perf_counter() - started)
    return replace(found, cost=probe.cost, seconds=seconds)
