"""Attacks on canary devices: a run's own, put in or left out by fair coins.

Andrew et al. 2024, arXiv:2302.03098, with what their estimate lacks for a bound: every score is a
function of what the observer sees and of public facts alone. In which rounds a canary was sampled
is a secret that the claim counts on, so `canary_device_rounds` weighs all rounds by the likelihood
ratio of a sampled Gaussian; `canary_device_known` uses that secret, and is held against a claim
only where the claim counts on no sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import RunError
from sottovoce.privacy.audit.attacks import Attack
from sottovoce.privacy.audit.device_record import DeviceRecord
from sottovoce.privacy.audit.directions import Directions
from sottovoce.privacy.audit.material import FinishedRun, Material, losses
from sottovoce.privacy.audit.outcome import Scored

COINS = "canary devices: each was put in, or left out, by its own fair coin"
CERTAIN = 1 - 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DeviceCanaryAttack(Attack):
    """An attack on canary devices of one `kind`; more than 0.4 of whom are on either side."""

    kind: str = "direction"
    initial: bool = False

    def missing(self, run: FinishedRun) -> str | None:
        record = record_of_run(run)
        if record is None or record.kind != self.kind:
            return f"the run has no canary devices of the kind {self.kind}"
        if self.initial and run.initial_model is None:
            return "the run kept no initial model"
        if not record.inside.any() or record.inside.all():
            return "the coins put all canary devices on one side: give more of them"
        if len(record.rounds) == 0:
            return "the run has no rounds"
        return None

    def scored(self, material: Material) -> Scored:
        record = record_of_run(material.run)
        assert record is not None
        scores = self._scores(record, material)
        ids, inside = np.array(record.ids), record.inside
        kept = np.isfinite(scores)
        return Scored(
            scores[inside & kept], scores[~inside & kept],
            ids[inside & kept].tolist(), ids[~inside & kept].tolist(),
        )

    def _scores(self, record: DeviceRecord, material: Material) -> Floats:
        """(canaries,) scores; not finite for one that the attack has nothing to say of."""
        return likelihood_scores(record)


@dataclass(frozen=True)
class KnownRounds(DeviceCanaryAttack):
    """The mean of a canary's inner products over the rounds in which it was drawn."""

    def not_comparable(self, run: FinishedRun) -> str | None:
        found = run.ledger.tally.compositions("device", "release").values()
        steps = [step for composition in found for step, _ in composition]
        if all(step.kind == "none" for step in steps):
            return None
        return "it knows in which rounds a canary was sampled, which the claim keeps secret"

    def _scores(self, record: DeviceRecord, material: Material) -> Floats:
        return known_round_scores(record)


@dataclass(frozen=True)
class FinalCosine(DeviceCanaryAttack):
    """The cosine of the whole way of the model with each canary's direction."""

    def _scores(self, record: DeviceRecord, material: Material) -> Floats:
        first, last = material.run.initial_model, material.run.model
        assert first is not None
        before = dict(first.named_parameters())
        moved = {
            name: p.detach() - before[name].detach()
            for name, p in last.named_parameters() if name in record.names
        }
        shapes = {name: tensor.shape for name, tensor in moved.items()}
        length = np.sqrt(sum(float(t.double().pow(2).sum()) for t in moved.values()))
        dots = Directions(record.seed, len(record.inside), shapes).dots(moved)
        cosines: Floats = dots / max(float(length), 1e-300)
        return cosines


@dataclass(frozen=True)
class CanaryLoss(DeviceCanaryAttack):
    """What training took off the loss of a text canary's own sentences."""

    def _scores(self, record: DeviceRecord, material: Material) -> Floats:
        from sottovoce.simulations.canary_devices import (
            SENTENCES,
            CanaryDevicePopulation,
            CanaryDevices,
        )

        run, count = material.run, len(record.inside)
        canaries = CanaryDevices(record.kind, count, record.first, record.activity, record.seed)
        said = CanaryDevicePopulation(run.population, canaries).say(
            np.arange(count), [np.arange(SENTENCES)] * count
        )
        assert run.initial_model is not None
        drop = losses(run.task, run.initial_model, said) - losses(run.task, run.model, said)
        means: Floats = drop.reshape(count, SENTENCES).mean(axis=1)
        return means


def record_of_run(run: Any) -> DeviceRecord | None:
    """The canary devices of a run, None where it has none."""
    found = getattr(run, "device_canaries", None)
    if found is not None and not isinstance(found, DeviceRecord):
        raise RunError("device_canaries is no record of canary devices")
    return found


def standardised(record: DeviceRecord) -> tuple[Floats, Floats]:
    """(R, m) inner products centred on the round's median, (R, 1) their deviation.

    Neither uses the coins. The deviation is that of the noise, or the spread that is seen where
    other devices' signals make it wider.
    """
    centred = record.dots - np.median(record.dots, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(centred), axis=1, keepdims=True)
    return centred, np.maximum(np.maximum(record.deviation[:, None], spread), 1e-300)


def likelihood_scores(record: DeviceRecord) -> Floats:
    """(m,) log likelihood ratio of in against out, over all rounds, at the public rate p.

    In a round, x ~ (1 - p) N(0, s^2) + p N(S, s^2) for a canary that is in.
    """
    centred, spread = standardised(record)
    shift = record.clip_norm[:, None] / spread
    ratio = shift * centred / spread - shift**2 / 2
    rate = min(record.rate, CERTAIN)
    if rate <= 0:
        return np.zeros(len(record.inside))
    weighed = np.logaddexp(np.log1p(-rate), np.log(rate) + ratio)
    found: Floats = weighed.sum(axis=0)
    return found


def known_round_scores(record: DeviceRecord) -> Floats:
    """(m,) sum over the rounds in which a canary was drawn, over the root of their number.

    N(0, 1) for those that are out, N(sqrt(k) S / s, 1) for those in; nan for those never drawn.
    """
    centred, spread = standardised(record)
    times = record.drawn.sum(axis=0)
    total = np.where(record.drawn, centred / spread, 0.0).sum(axis=0)
    return np.where(times > 0, total / np.sqrt(np.maximum(times, 1)), np.nan)


_NOISED = "every round's noised sum (with FedAvg: every released model) and each direction"
_ENDS = "the initial and the released model"
DEVICE_ATTACKS = tuple(
    kind(name, "device", "release", sees, cost, "add_remove", COINS, coins=True,
         kind=of, initial=initial)
    for kind, name, sees, cost, of, initial in (
        (DeviceCanaryAttack, "canary_device_rounds", _NOISED,
         "an inner product per canary and round, while the run trains", "direction", False),
        (KnownRounds, "canary_device_known", f"{_NOISED}, and in which rounds it was sampled",
         "nothing more", "direction", False),
        (FinalCosine, "canary_device_final", f"{_ENDS} and each direction",
         "an inner product per canary", "direction", True),
        (CanaryLoss, "canary_device_loss", f"{_ENDS} and each canary's text",
         "two forward passes per example", "text", True),
    )
)
