"""What extraction attacks and update probes found: measured leakage, never a bound on epsilon.

Membership attacks end in a lower bound on epsilon (`sottovoce.privacy.audit.bounds`). Extraction
asks another question: which secrets can be read back, and how much more often than by guessing? Its
figures are of another type, so that no verdict can hold them against a claim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from scipy import stats

from sottovoce.privacy.audit.bounds import binomial_interval

if TYPE_CHECKING:
    from sottovoce.privacy.audit.material import FinishedRun

ABSENCE = "absence of a finding is not proof: another attack may find what this one did not"


@dataclass(frozen=True)
class Leakage:
    """What one attack read back.

    `figures`: by name. `headline`: the one that `interval` and `chance` are about: its confidence
    interval, and what a guess without the model or the update would reach. `p_value`: of so high
    a headline by chance. `cost`: the probe's work in words. `rows`: one a canary or a
    position, for a table. All of them None or empty where the attack does not apply, and
    `not_applicable` says why.
    """

    name: str
    unit: str
    observer: str
    sees: str
    figures: Mapping[str, float] = field(default_factory=dict)
    headline: str | None = None
    interval: tuple[float, float] | None = None
    chance: float | None = None
    p_value: float | None = None
    confidence: float = 0.95
    seconds: float = 0.0
    rows: tuple[Mapping[str, Any], ...] = ()
    note: str = ABSENCE
    not_applicable: str | None = None
    cost: str = ""

    @property
    def value(self) -> float | None:
        """The headline figure."""
        return None if self.headline is None else self.figures[self.headline]

    @property
    def above_chance(self) -> bool:
        """Whether chance alone is refuted at the attack's confidence."""
        return self.p_value is not None and self.p_value <= 1 - self.confidence

    def __str__(self) -> str:
        if self.not_applicable is not None:
            return f"{self.name}: not applicable, {self.not_applicable}"
        text = f"{self.name}: {self.headline} {self.value:.3g}"
        if self.interval is not None:
            text += f" [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"
        if self.chance is not None:
            text += f", by chance {self.chance:.3g}"
        return f"{text} ({self.unit}, observer {self.observer}; no bound on epsilon)"

    def record(self) -> dict[str, Any]:
        """JSON values, for `audit.json`."""
        values = asdict(self)
        values["rows"] = [dict(row) for row in self.rows]
        values["interval"] = None if self.interval is None else list(self.interval)
        return {**values, "value": self.value, "above_chance": self.above_chance}


class Probe(ABC):
    """An attack that reads data back: the sibling of `sottovoce.privacy.audit.attacks.Attack`.

    `unit`, `observer`, `sees`, `cost` mean what they mean there.
    """

    name: str
    unit: str
    observer: str
    sees: str
    cost: str

    @abstractmethod
    def measure(self, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
        """Attack `run`."""

    def missing(self, run: FinishedRun) -> str | None:
        """What the run lacks for this attack, None where nothing."""
        return None


def share(hits: int, trials: int, confidence: float) -> tuple[float, tuple[float, float]]:
    """`hits` of `trials` as a rate with its Clopper-Pearson interval; (0, (0, 1)) without trials.

    *Assumes*: trials are independent, which canaries of one model are but for what they share.
    """
    return hits / max(1, trials), binomial_interval(hits, trials, confidence)


def chance_p_value(hits: int, trials: int, chance: float) -> float:
    """Probability of `hits` or more right guesses of `trials` by chance alone.

    Exact where secrets were drawn uniformly and apart from the model, whatever the guesses depend
    on: a model that never met the secrets says nothing of them.
    """
    return float(stats.binom.sf(hits - 1, trials, chance)) if trials else 1.0
