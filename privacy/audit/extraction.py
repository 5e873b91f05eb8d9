"""Extraction of inserted codes from a finished model, against guessing.

`extract` inverts the model for every canary (`model_inversion`) and counts: places read right,
whole codes read right, Hamming distance. Codes were drawn uniformly and apart from everything, so
that a model which never learned them says nothing of them, and right places are binomial: the
p-value is exact however biased the attack's guesses are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.tasks import Batch, Task
from sottovoce.client.vocabulary import FIRST
from sottovoce.privacy.audit.code_canaries import CodeCanary, Codes, variants
from sottovoce.privacy.audit.leakage import ABSENCE, Leakage, Probe, chance_p_value, share
from sottovoce.privacy.audit.material import FinishedRun
from sottovoce.privacy.audit.model_inversion import Inversion, invert
from sottovoce.privacy.audit.soft_inputs import SoftInput, find_soft_input

NAME = "model_inversion"
SEES = "the released model, the words before a code, and its labels"


@dataclass(frozen=True)
class InversionProbe(Probe):
    """`extract` on a run whose training data had `canaries` in them."""

    canaries: tuple[CodeCanary, ...]
    how: Inversion = Inversion()
    name: str = NAME
    unit: str = "example"
    observer: str = "release"
    sees: str = SEES
    cost: str = "a few hundred forward and backward passes over a sentence, for each restart"

    def missing(self, run: FinishedRun) -> str | None:
        if run.task.causal or not run.task.schema.intents:
            return f"the task {run.task.name} has no labels to invert"
        return None if self.canaries else "no code canaries were inserted"

    def measure(self, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
        return extract_from_run(
            run, self.canaries, how=self.how, seed=seed, confidence=confidence
        )


def extract_from_run(run: FinishedRun, canaries: Sequence[CodeCanary], **options: Any) -> Leakage:
    """`extract` on the released model of a run that `canaries` were inserted in."""
    return extract(run.task, run.model, run.population.words, canaries, **options)


def extract(
    task: Task,
    model: nn.Module,
    words: Sequence[str],
    canaries: Sequence[CodeCanary],
    *,
    how: Inversion | None = None,
    whole_vocabulary: bool = False,
    seed: int = 0,
    confidence: float = 0.95,
) -> Leakage:
    """Read the codes of `canaries` out of `model`.

    `words`: the population's word table. `whole_vocabulary`: every id of the vocabulary is a
    candidate, not only the canary's own words; chance is then 1 / ids for whoever does not know
    the words, and the p-value is still against guessing among the canary's words. Headline:
    `accuracy`, the share of places read right. Raises DataError where a code cannot be told apart
    by the vocabulary or does not fit in `task.max_length`.

    The unit is the example: the secret is in one sentence, however often it was said.
    """
    if not canaries:
        raise DataError("canaries=[] names none: give those that were inserted")
    if not task.schema.intents or task.causal:
        raise ConfigError(
            f"task={task.name} has no labels to invert: use `sottovoce.privacy.audit.code_exposure`"
        )
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, canary in enumerate(canaries):
        groups[(len(canary.prefix), len(canary.code), canary.candidates)].append(number)
    rows: list[dict[str, Any]] = [{} for _ in canaries]
    for members in groups.values():
        group = [canaries[i] for i in members]
        found = _extract_alike(task, model, words, group, how, whole_vocabulary, generator)
        for i, row in zip(members, found, strict=True):
            rows[i] = row
    seconds = time.perf_counter() - started
    return summary(rows, seconds=seconds, confidence=confidence)


def summary(rows: Sequence[dict[str, Any]], *, seconds: float, confidence: float) -> Leakage:
    """Figures over canaries. `rows`: of each, `hits` (a bool a place), `chance` and `blind`.

    `chance`: of a right place for whoever knows the attack's candidates; `blind`: for whoever knows
    the canary's words, which is what the p-value is about.
    """
    hits = np.concatenate([row["hits"] for row in rows])
    whole = [all(row["hits"]) for row in rows]
    accuracy, interval = share(int(hits.sum()), len(hits), confidence)
    exact, exact_interval = share(sum(whole), len(whole), confidence)
    wrong = [sum(not hit for hit in row["hits"]) for row in rows]
    figures = {"accuracy": accuracy, "exact": exact, "hamming": float(np.mean(wrong))}
    figures |= {"exact_low": exact_interval[0], "exact_high": exact_interval[1]}
    figures["hamming_by_chance"] = float(
        np.mean([len(row["hits"]) * (1 - row["chance"]) for row in rows])
    )
    for place in range(max(len(row["hits"]) for row in rows)):
        there = [row["hits"][place] for row in rows if place < len(row["hits"])]
        figures[f"accuracy_{place + 1}"] = float(np.mean(there))
    blind = max(row["blind"] for row in rows)
    return Leakage(
        name=NAME,
        unit="example",
        observer="release",
        sees=SEES,
        figures=figures,
        headline="accuracy",
        interval=interval,
        chance=float(np.mean([row["chance"] for row in rows])),
        p_value=chance_p_value(int(hits.sum()), len(hits), blind),
        confidence=confidence,
        seconds=seconds,
        rows=tuple(rows),
        note=f"intervals take places for independent; {ABSENCE}",
    )


def _extract_alike(
    task: Task,
    model: nn.Module,
    words: Sequence[str],
    canaries: Sequence[CodeCanary],
    how: Inversion | None,
    whole_vocabulary: bool,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Rows of the table, for canaries that differ in words, codes and labels only."""
    first = canaries[0]
    ids, places = candidate_ids(task, words, first)
    blank = np.zeros((1, len(first.code)), dtype=np.int64)
    parts = [task.collate(variants(canary, blank, words, task.schema)) for canary in canaries]
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    truth = np.stack([canary.numbers for canary in canaries])
    tried = torch.arange(FIRST, task.vocabulary.size) if whole_vocabulary else ids
    unknown = _soft_input(model, batch, places, tried)
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in batch.items()}
    guesses, losses = invert(task, model, batch, unknown, how or Inversion(), generator=generator)
    guessed = tried[guesses.cpu()].numpy()
    hits = guessed == ids.numpy()[truth]
    blind = float(np.unique(ids.numpy(), return_counts=True)[1].max() / len(ids))
    return [
        {
            "canary": " ".join(canary.prefix),
            "code": " ".join(canary.code),
            "guess": " ".join(_spoken(canary, ids, guess)),
            "hits": hit.tolist(),
            "loss": float(loss),
            "chance": 1 / len(tried) if whole_vocabulary else blind,
            "blind": blind,
        }
        for canary, guess, hit, loss in zip(canaries, guessed, hits, losses, strict=True)
    ]


def candidate_ids(task: Task, words: Sequence[str], canary: CodeCanary) -> tuple[Tensor, Tensor]:
    """(candidates,) the vocabulary's id of each candidate; (places,) where in a row the code is.

    Hashed words may share an id; then they are one to the model and to every attack. Raises
    DataError unless every candidate is one piece, the code fits, and two ids differ.
    """
    every = np.repeat(np.arange(len(canary.candidates))[:, None], len(canary.code), axis=1)
    tokens = task.collate(variants(canary, every, words, task.schema))["tokens"]
    places = torch.nonzero((tokens != tokens[:1]).any(0)).flatten()
    if len(places) != len(canary.code):
        raise DataError(
            f"of the {len(canary.code)} words of a code {len(places)} can be told apart in a row: "
            "give candidates that the vocabulary has as one piece each, or raise task.max_length"
        )
    return tokens[:, int(places[0])], places


def _soft_input(model: nn.Module, batch: Batch, places: Tensor, tried: Tensor) -> SoftInput:
    """Where the places of the first row enter the model, with the embedding of all `tried` ids."""
    rows = {name: tensor[:1].repeat_interleave(len(tried), 0) for name, tensor in batch.items()}
    rows["tokens"][:, places] = tried.unsqueeze(1)
    device = next(model.parameters()).device
    return find_soft_input(model, {name: tensor.to(device) for name, tensor in rows.items()})


def _spoken(canary: CodeCanary, ids: Tensor, guess: Codes) -> list[str]:
    """The guessed ids as words; an id that no candidate has is its number."""
    known = {int(number): word for word, number in zip(canary.candidates, ids, strict=True)}
    return [known.get(int(number), f"#{number}") for number in guess]
