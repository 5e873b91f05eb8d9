"""Exposure of inserted codes in a finished model: their rank among all codes, in bits.

Carlini et al. 2019, arXiv:1802.08232. The rank is exact where all codes can be tried, else it comes
from drawn ones, and where none of those is as likely, from a fitted law (`tail_fit`). The natural
attack on language models (`next_word`), whose training sees the code as a target. It works on other
tasks too: there a code's loss is that of the canary's labels.

A model that never met the codes gives every rank the same chance: exposure is then above b bits
with probability 2^-b, 1.44 bits in the mean. It estimates memorisation and bounds no epsilon.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.tasks import NextWord, Task
from sottovoce.privacy.audit.code_canaries import CodeCanary, Codes, variants
from sottovoce.privacy.audit.figures import Exposure
from sottovoce.privacy.audit.leakage import ABSENCE, Leakage, Probe
from sottovoce.privacy.audit.material import FinishedRun, losses
from sottovoce.privacy.audit.ranks import exposure
from sottovoce.privacy.audit.tail_fit import LEAST, fitted_exposure

SEES = "the released model, the words around a code, and its labels where it has any"
ENUMERATED = 20_000  # codes that are tried one by one
BY_CHANCE = 1 / math.log(2)  # mean exposure of a code that the model never met
_SAME = 1e-6  # one code in two batches may differ in its last bits


@dataclass(frozen=True)
class ExposureProbe(Probe):
    """`expose` on a run whose training data had `canaries` in them."""

    canaries: tuple[CodeCanary, ...]
    name: str = "exposure"
    unit: str = "example"
    observer: str = "release"
    sees: str = SEES
    cost: str = "a forward pass over a sentence for each possible code, 20,000 at most"

    def missing(self, run: FinishedRun) -> str | None:
        return None if self.canaries else "no code canaries were inserted"

    def measure(self, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
        return expose_from_run(run, self.canaries, seed=seed, confidence=confidence)


def expose_from_run(
    run: FinishedRun, canaries: Sequence[CodeCanary], *, seed: int = 0, confidence: float = 0.95
) -> Leakage:
    """`expose` on the released model of a run that `canaries` were inserted in."""
    words = run.population.words
    return expose(run.task, run.model, words, canaries, seed=seed, confidence=confidence)


def expose(
    task: Task,
    model: nn.Module,
    words: Sequence[str],
    canaries: Sequence[CodeCanary],
    *,
    samples: int = 2000,
    enumerated: int = ENUMERATED,
    seed: int = 0,
    confidence: float = 0.95,
) -> Leakage:
    """Exposure of all `canaries`; the headline `exposure` is the mean over them, in bits.

    `words`: the population's word table. Every code is tried where there are `enumerated` or fewer,
    else `samples` drawn ones. The interval is the mean of the canaries' own. The p-value is of so
    high a mean if no model had met the codes; None where ranks are not exact. An estimate, no
    bound. Raises DataError or ConfigError for canaries or sizes that cannot be measured.
    """
    if not canaries:
        raise DataError("canaries=[] names none: give those that were inserted")
    if samples < LEAST:
        raise ConfigError(f"samples={samples} are too few: give {LEAST} or more")
    started = time.perf_counter()
    generator = np.random.default_rng(seed)
    found = []
    for canary in canaries:
        exact = canary.space <= enumerated
        codes = other_codes(canary) if exact else drawn_codes(canary, samples, generator)
        every = sentence_losses(task, model, words, canary, np.vstack([canary.numbers, codes]))
        found.append(code_exposure(every[0], every[1:], canary.space, confidence, generator))
    exact = all(canary.space <= enumerated for canary in canaries)
    return _summary(canaries, found, exact, time.perf_counter() - started, confidence)


def code_exposure(
    loss: float,
    others: NDArray[np.float64],
    space: int,
    confidence: float,
    generator: np.random.Generator,
) -> Exposure:
    """Exposure of a code of this `loss`, less for likelier, among `space` codes.

    `others`: losses of all other codes, or of a sample of them. By rank; by a fit where a sample
    has none as likely.
    """
    bar = loss + _SAME * max(1.0, abs(loss))
    if len(others) < space - 1 and not (others <= bar).any():
        return fitted_exposure(
            loss, others, candidates=space, confidence=confidence, generator=generator
        )
    return exposure(-bar, -others, candidates=space, confidence=confidence)


def mean_p_value(bits: NDArray[np.float64]) -> float:
    """Probability of so high a mean exposure for codes that the model never met.

    Each exposure, in nats, is then at most an exponential variable, their sum a gamma one: ranks
    are discrete, which only makes the true probability smaller.
    """
    return float(stats.gamma.sf(np.sum(bits) * math.log(2), len(bits)))


def _summary(
    canaries: Sequence[CodeCanary],
    found: Sequence[Exposure],
    exact: bool,
    seconds: float,
    confidence: float,
) -> Leakage:
    bits = np.array([one.bits for one in found])
    ranks = [round(2 ** (one.most - one.bits)) if exact else None for one in found]
    figures = {
        "exposure": float(bits.mean()),
        "highest": float(bits.max()),
        "possible": float(np.mean([one.most for one in found])),
    }
    if exact:
        figures["first"] = float(np.mean([rank == 1 for rank in ranks]))
    return Leakage(
        name="exposure",
        unit="example",
        observer="release",
        sees=SEES,
        figures=figures,
        headline="exposure",
        interval=(
            float(np.mean([one.interval[0] for one in found])),
            float(np.mean([one.interval[1] for one in found])),
        ),
        chance=BY_CHANCE,
        p_value=mean_p_value(bits) if exact else None,
        confidence=confidence,
        seconds=seconds,
        rows=tuple(
            {
                "canary": " ".join(canary.prefix), "code": " ".join(canary.code), "bits": one.bits,
                "interval": list(one.interval), "most": one.most, "rank": rank,
                "method": one.method,
            }
            for canary, one, rank in zip(canaries, found, ranks, strict=True)
        ),
        note="bits estimate memorisation and bound no epsilon; the interval is of how well ranks "
        f"are known, not over other canaries; {ABSENCE}",
    )


def sentence_losses(
    task: Task, model: nn.Module, words: Sequence[str], canary: CodeCanary, codes: Codes
) -> NDArray[np.float64]:
    """(codes,) minus the log-likelihood, in nats, of the sentence with each code.

    Of the whole text for a language model: the paper's log-perplexity, but for its unit, which is
    of no matter to ranks. For other tasks the loss of the canary's labels.
    """
    examples = variants(canary, codes, words, task.schema)
    found = losses(task, model, examples)
    if isinstance(task, NextWord):
        found *= np.minimum(task.layout(examples).lengths + 1, task.max_length)
    return found


def other_codes(canary: CodeCanary) -> Codes:
    """(space - 1, places) every code but the canary's own, in order."""
    sizes = (len(canary.candidates),) * len(canary.code)
    every = np.stack(np.unravel_index(np.arange(canary.space), sizes), axis=1).astype(np.int64)
    others: Codes = every[(every != canary.numbers).any(axis=1)]
    return others


def drawn_codes(canary: CodeCanary, samples: int, generator: np.random.Generator) -> Codes:
    """(samples, places) codes drawn uniformly, with replacement."""
    drawn: Codes = generator.integers(len(canary.candidates), size=(samples, len(canary.code)))
    return drawn
