"""The attacks: what each one sees, whom it compares, and how it scores them.

An attack gives every candidate a score, higher for "was in the training data". It names its unit
and its observer, so that its bound is compared only with a claim made for the same two. A new
attack is one class and one entry in `ATTACKS`.

The first family reads losses (Yeom et al. 2018, arXiv:1709.01604): data that the model was trained
on tends to lose less. Natural data are weak canaries, so that these attacks find gross leaks and
certify little.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.audit.material import FinishedRun, Losses, Material, device_means
from sottovoce.privacy.audit.outcome import Facts, Scored
from sottovoce.privacy.audit.roc import Scores

KEPT = "real devices keep their examples, so that nobody can score them"


@dataclass(frozen=True)
class Attack(Facts, ABC):
    """One way to tell members from non-members; its `Facts` are what the report says of it."""

    @property
    def optional(self) -> bool:
        """Whether it is so costly that nobody gets it unasked."""
        return False

    @abstractmethod
    def scored(self, material: Material) -> Scored:
        """Scores of members and of non-members, with their ids."""

    def missing(self, run: FinishedRun) -> str | None:
        """What the run lacks for this attack, None where nothing."""
        return None

    def not_comparable(self, run: FinishedRun) -> str | None:
        """Why the bound must not be held against a claim, None where it may."""
        return None


@dataclass(frozen=True)
class LossAttack(Attack):
    """Loss under the released model, or what training took off it if `relative`.

    A device scores the mean over (at most 64 of) its examples, so that busy devices are not
    counted twice. On the example level one example speaks for each device.
    """

    relative: bool = False
    participants: bool = False

    def missing(self, run: FinishedRun) -> str | None:
        if not run.population.at_hand:
            return KEPT
        if self.relative and run.initial_model is None:
            return "the run kept no initial model"
        if self.participants and run.participants is None:
            return "the run does not say which devices took part"
        if self.unit == "device" and run.population.held_out == 0:
            return "the population holds no devices out"
        if self.unit == "example" and getattr(run, "canaries", None) is not None:
            return "the run has example canaries, which tell more"
        if self.unit == "example" and run.population.held_out_examples(1) is None:
            return "the population holds no examples of training devices out"
        return None

    def not_comparable(self, run: FinishedRun) -> str | None:
        if self.participants:
            return (
                "members are devices that took part; the claim counts on the chance of not taking "
                "part, and busy devices took part more often"
            )
        return foreign_non_members(run, self.unit)

    def scored(self, material: Material) -> Scored:
        if self.unit == "device":
            inside = material.participants if self.participants else material.training_devices
            outside = material.held_out_devices
        else:
            inside, outside = material.training_examples, material.held_out_examples
        return Scored(self._score(inside), self._score(outside), inside.ids, outside.ids)

    def _score(self, table: Losses) -> Scores:
        found = table.scores(relative=self.relative)
        return device_means(found, table.offsets) if self.unit == "device" else found


_RELEASED = "the released model and each candidate's data"
_COMPARED = "the released and the initial model and each candidate's data"
ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        LossAttack("device_loss", "device", "release", _RELEASED, "a forward pass per example"),
        LossAttack("device_loss_drop", "device", "release", _COMPARED,
                   "two forward passes per example", relative=True),
        LossAttack("participant_loss", "device", "release", _RELEASED,
                   "a forward pass per example", participants=True),
        LossAttack("example_loss", "example", "release", _RELEASED, "a forward pass per example"),
        LossAttack("example_loss_drop", "example", "release", _COMPARED,
                   "two forward passes per example", relative=True),
    )
}


def choose_attacks(asked: object, run: FinishedRun, *, costly: bool = False) -> list[Attack]:
    """The attacks asked for: "default" is every one that the run has the data for.

    `costly`: by default too, those that are `optional`.

    Raises ConfigError for an unknown name, and for a named attack that the run cannot feed.
    """
    if asked == "default":
        fit = [attack for attack in ATTACKS.values() if attack.missing(run) is None]
        return [attack for attack in fit if costly or not attack.optional]
    listed = [asked] if isinstance(asked, str) else asked
    names = [str(name) for name in listed] if isinstance(listed, Iterable) else []
    if not names:
        raise ConfigError(f"attacks={asked!r} names none: give some of {', '.join(ATTACKS)}")
    for name in names:
        if name not in ATTACKS:
            raise ConfigError(f"attacks={name} is unknown: choose from {', '.join(ATTACKS)}")
        reason = ATTACKS[name].missing(run)
        if reason is not None:
            raise ConfigError(f"attacks={name} cannot run: {reason}")
    return [ATTACKS[name] for name in dict.fromkeys(names)]


def foreign_non_members(run: FinishedRun, unit: str) -> str | None:
    """Why held-out data differ from training data by more than a coin, None where they do not."""
    test = run.population.describe().get("test") if unit == "example" else None
    if not test:
        return None
    return f"non-members come from another file, {test}: what tells them apart may be the file"
