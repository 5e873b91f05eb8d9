"""Next-word prediction: the language model of a keyboard.

A text w1 … wn is read as <bos> w1 … wn and predicted as w1 … wn <eos>; both are cut at `max_length`
positions. Long texts are cut, not split: a text stays one example, which is what example-level
privacy protects. Accuracy follows Hard et al. 2018, arXiv:1811.03604.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.examples import Examples
from sottovoce.client.tasks.base import (
    IGNORED,
    Batch,
    Labelled,
    Logits,
    Measured,
    Output,
    Task,
    evaluation_mode,
    to_device,
)
from sottovoce.client.tasks.layout import real_positions, tensor
from sottovoce.client.vocabulary import BOS, EOS, PAD, UNK


class NextWord(Task):
    """The next word (or piece of one) at every position of a text."""

    name: ClassVar[str] = "next_word"
    headline: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    causal: ClassVar[bool] = True

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output("words", self.vocabulary.size, per_token=True),)

    def check(self, population: Labelled) -> None:
        """Any text will do."""

    def collate(self, examples: Examples) -> Batch:
        """`tokens`, `targets`: (rows, T), -100 in `targets` at padding; `lengths`: (rows,).

        `lengths` counts targets, <eos> included; an empty text has one.
        """
        layout = self.layout(examples)
        lengths = np.minimum(layout.lengths + 1, self.max_length)
        width = max(1, int(lengths.max(initial=0)))
        targets = np.full((len(lengths), width), IGNORED, dtype=np.int64)
        targets[real_positions(layout.lengths, width)] = layout.ids
        uncut = np.flatnonzero(layout.lengths < self.max_length)
        targets[uncut, layout.lengths[uncut]] = EOS
        tokens = np.full_like(targets, PAD)
        tokens[:, 0] = BOS
        real = real_positions(lengths, width)
        np.copyto(tokens[:, 1:], targets[:, :-1], where=real[:, 1:])
        return {"tokens": tensor(tokens), "targets": tensor(targets), "lengths": tensor(lengths)}

    def row_losses(self, logits: Logits, batch: Batch) -> Tensor:
        """(rows,) mean cross-entropy over the row's targets."""
        return self._token_losses(logits, batch).sum(1) / batch["lengths"].clamp(min=1)

    def _token_losses(self, logits: Logits, batch: Batch) -> Tensor:
        """(rows, T) cross-entropy of each target, 0 at padding."""
        rows, width, classes = logits["words"].shape
        inside = torch.arange(width, device=batch["lengths"].device) < batch["lengths"][:, None]
        losses = F.cross_entropy(
            logits["words"].reshape(-1, classes),
            batch["targets"].masked_fill(~inside, IGNORED).reshape(-1),
            reduction="none",
            ignore_index=IGNORED,
        )
        return losses.view(rows, width)

    def measure(self, model: nn.Module, examples: Examples, *, batch_size: int = 1024) -> Measured:
        """`loss`, `perplexity`, `top1_accuracy`, `top3_accuracy`, `tokens`.

        `loss`: mean over examples, as trained. `perplexity`: exp of the mean cross-entropy over all
        `tokens` targets, <eos> and, where the vocabulary has it, <unk> included. Accuracies: over
        real words only, neither <unk> nor <eos>.
        """
        losses, targets = np.zeros(len(examples)), np.zeros(len(examples))
        words, first, among_three = 0, 0, 0
        with evaluation_mode(model) as device:
            for rows, batch in self.evaluation_batches(examples, batch_size):
                batch = to_device(batch, device)
                logits: Logits = model(batch)
                losses[rows] = self.row_losses(logits, batch).cpu().numpy()
                targets[rows] = batch["lengths"].cpu().numpy()
                hits = _hits(logits["words"], batch["targets"])
                words += len(hits)
                first += int(hits[:, 0].sum())
                among_three += int(hits.sum())
        sums = losses * targets
        return Measured({
            "loss": float(losses.mean()),
            "perplexity": float(
                self.headline_of(sums.sum(keepdims=True), targets.sum(keepdims=True))[0]
            ),
            "top1_accuracy": first / max(1, words),
            "top3_accuracy": among_three / max(1, words),
            "tokens": float(targets.sum()),
        }, sums, targets)

    def headline_of(
        self, score: NDArray[np.float64], weight: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.exp(np.minimum(score / weight, 700.0))  # finite if diverged
        return found

    def unigram_perplexity(self, train: Examples, evaluation: Examples) -> float:
        """Perplexity on `evaluation` of word frequencies in `train`, each count one too many.

        The same ids, cut and targets as `evaluate`, so that a language model can be set beside it.
        It reads the training text: a yardstick for public data, not something to release.
        """
        counts = self._target_counts(train)
        never_targets = {PAD, BOS} if self.vocabulary.has_unknown else {PAD, BOS, UNK}
        possible = self.vocabulary.size - len(never_targets)
        log_probability = np.log((counts + 1) / (counts.sum() + possible))
        seen = self._target_counts(evaluation)
        return float(np.exp(-(seen * log_probability).sum() / seen.sum()))

    def _target_counts(self, examples: Examples) -> NDArray[np.int64]:
        layout = self.layout(examples)
        counts = np.bincount(layout.ids, minlength=self.vocabulary.size)
        counts[EOS] += int((layout.lengths < self.max_length).sum())
        return counts


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """(real words, 3) whether the first, second and third guess is the target."""
    scored = (targets != IGNORED) & (targets != UNK) & (targets != EOS)
    guesses = logits.topk(min(3, logits.shape[2]), dim=2).indices
    hits: Tensor = (guesses == targets.unsqueeze(2))[scored]
    return hits
