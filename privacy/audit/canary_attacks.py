"""Attacks on example canaries: a score for every candidate, by what the released model says of it.

loss                 a candidate that was in loses less (Yeom et al. 2018, arXiv:1709.01604)
loss drop            what training took off it
gradient             how far the model moved along the candidate's own descent direction
                     (Nasr et al. 2023, arXiv:2302.07956)
gradient norm        what was learnt has little left to teach (Nasr et al. 2019, arXiv:1812.00910)
RMIA                 against strangers and reference models (Zarifzadeh et al. 2023,
                     arXiv:2312.03262)
offline LiRA         against the distribution of reference models (Carlini et al. 2021,
                     arXiv:2112.03570)
Min-K%++             the least expected words of a text, for language models (Zhang et al. 2024,
                     arXiv:2404.02936)

Each sees released models only (observer `release`), asks about one example, and its coins are the
candidates' own: add/remove.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from sottovoce.privacy.audit.attacks import Attack
from sottovoce.privacy.audit.canary_gradients import norms, projections
from sottovoce.privacy.audit.canary_view import CanaryView, by_coin, canaries_of
from sottovoce.privacy.audit.claims import ADD_REMOVE
from sottovoce.privacy.audit.material import FinishedRun, Material, losses
from sottovoce.privacy.audit.outcome import Scored
from sottovoce.privacy.audit.roc import Scores

SHARE = 0.2  # of a text's words that Min-K%++ looks at
SCALING = 0.3  # of offline RMIA: how reference models without the candidate stand for those with
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class CanaryAttack(Attack):
    """Scores every candidate by `score`, which never sees a coin.

    `initial`: needs the initial model. `task`: the only task that it fits. `references`: trains
    reference models.
    """

    relation: str = ADD_REMOVE
    note: str = "candidates with coins of their own; a canary is part of its device's data"
    coins: bool = True
    score: Callable[[CanaryView], Scores] = lambda view: -view.final
    initial: bool = False
    task: str | None = None
    references: bool = False

    @property
    def optional(self) -> bool:
        return self.references

    def missing(self, run: FinishedRun) -> str | None:
        if canaries_of(run) is None:
            return "the run has no canaries (audit.canaries)"
        if (self.initial or self.references) and run.initial_model is None:
            return "the run kept no initial model"
        if self.task is not None and run.task.name != self.task:
            return f"the task is not {self.task}"
        return None

    def scored(self, material: Material) -> Scored:
        return by_coin(self.score(material.canaries), material.run)


def rmia(view: CanaryView) -> Scores:
    """(candidates,) share of strangers that a candidate's likelihood ratio beats.

    Offline: without models that were trained with the candidate, its probability on average is
    ((1 + a) p_out + 1 - a) / 2 with a = `SCALING`.
    """
    shadows = view.shadows
    outside = _mean_probability([losses(view.task, m, view.candidates) for m in shadows.models])
    ratio = np.exp(-view.final) / (((1 + SCALING) * outside + 1 - SCALING) / 2)
    own = np.exp(-losses(view.task, view.model, shadows.strangers))
    usual = _mean_probability([losses(view.task, m, shadows.strangers) for m in shadows.models])
    others = np.sort(own / usual)
    beaten = np.searchsorted(others, ratio, side="right") / len(others)
    finer: Scores = beaten + 1e-6 * stats.rankdata(ratio) / len(ratio)  # ties, by the ratio itself
    return finer


def offline_lira(view: CanaryView) -> Scores:
    """(candidates,) standard deviations above what reference models say of a candidate.

    The logit of the probability; one variance for all, as there are few models.
    """
    found = [losses(view.task, m, view.candidates) for m in view.shadows.models]
    outside = np.stack([_logit(values) for values in found])
    spread = np.sqrt(np.mean(np.var(outside, axis=0))) if len(outside) > 1 else np.std(outside)
    above: Scores = _logit(view.final) - outside.mean(axis=0)
    return above / max(float(spread), LEAST_PROBABILITY)


def least_expected(view: CanaryView) -> Scores:
    """(candidates,) mean of the lowest `SHARE` of a text's words, each standardised.

    A word's log-probability less the mean of such, over their standard deviation, under the
    model's own distribution there.
    """
    scores = np.empty(len(view.candidates))
    for rows, batch in view.batches(view.model):
        log_p = view.model(batch)["words"].double().log_softmax(dim=2)
        p = log_p.exp()
        mean = (p * log_p).sum(2)
        spread = ((p * log_p.square()).sum(2) - mean.square()).clamp(min=LEAST_PROBABILITY).sqrt()
        said = log_p.gather(2, batch["targets"].clamp(min=0).unsqueeze(2)).squeeze(2)
        standard, lengths = ((said - mean) / spread).cpu().numpy(), batch["lengths"].cpu().numpy()
        for row, values, length in zip(rows, standard, lengths, strict=True):
            kept = np.sort(values[:length])[: max(1, round(SHARE * length))]
            scores[row] = kept.mean()
    return scores


def _logit(nats: Scores) -> Scores:
    p = np.clip(np.exp(-nats), LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    found: NDArray[np.float64] = special.logit(p)
    return found


def _mean_probability(nats: list[Scores]) -> Scores:
    mean: Scores = np.mean([np.exp(-values) for values in nats], axis=0)
    return np.maximum(mean, LEAST_PROBABILITY)


_RELEASED = "the released model and each candidate"
_COMPARED = "the released and the initial model and each candidate"
_REFERRED = "the released model, each candidate, and training data without any candidate"
CANARY_ATTACKS = (
    CanaryAttack("canary_loss", "example", "release", _RELEASED, "a forward pass per candidate"),
    CanaryAttack("canary_loss_drop", "example", "release", _COMPARED,
                 "two forward passes per candidate",
                 score=lambda view: view.initial - view.final, initial=True),
    CanaryAttack("canary_gradient", "example", "release", _COMPARED,
                 "two backward passes per candidate", score=projections, initial=True),
    CanaryAttack("canary_gradient_norm", "example", "release", _RELEASED,
                 "a backward pass per candidate", score=lambda view: -norms(view)),
    CanaryAttack("canary_min_k", "example", "release", _RELEASED,
                 "a forward pass per candidate", score=least_expected, task="next_word"),
    CanaryAttack("canary_rmia", "example", "release", _REFERRED,
                 "reference models to train", score=rmia, references=True),
    CanaryAttack("canary_lira", "example", "release", _REFERRED,
                 "reference models to train", score=offline_lira, references=True),
)
