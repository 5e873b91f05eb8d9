"""Joint intent classification and slot tagging: the language understanding of a voice assistant.

The loss of an utterance is the cross-entropy of its intent plus the mean cross-entropy of its
words' BIO tags; a word of several pieces is tagged at its first. Joint training: Liu and Lane 2016,
arXiv:1609.01454. Slot F1 is that of conlleval (Tjong Kim Sang and Buchholz 2000), by seqeval.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.errors import DataError
from sottovoce.client.examples import Examples, gather_ranges
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
from sottovoce.client.tasks.layout import pad, tensor


class IntentSlots(Task):
    """Intent of an utterance and BIO tag of each of its words.

    A population with intents but no slots is a plain classification task: no tagging output, no
    slot metrics. Without intents it is refused by `check`.
    """

    name: ClassVar[str] = "intent_slots"
    headline: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        intent = Output("intent", len(self.schema.intents), per_token=False)
        slots = Output("slots", len(self.schema.slots), per_token=True)
        return (intent, slots) if self.schema.slots else (intent,)

    def check(self, population: Labelled) -> None:
        if not population.schema.intents:
            raise DataError(
                f"task=intent_slots needs `intent` and `slots`: population={population.name} has "
                "no intents; use task=next_word"
            )

    def collate(self, examples: Examples) -> Batch:
        """`tokens`, `slots`: (rows, T); `lengths`, `intent`: (rows,).

        `slots` is -100 at padding and at every piece of a word but its first.
        """
        intent, slots = self._labels(examples)
        layout = self.layout(examples)
        batch = {
            "tokens": tensor(pad(layout.ids, layout.lengths, fill=0)),
            "lengths": tensor(layout.lengths),
            "intent": tensor(intent),
        }
        if slots is not None:
            tags = np.where(layout.first, slots[layout.word], IGNORED)
            batch["slots"] = tensor(pad(tags, layout.lengths, fill=IGNORED))
        return batch

    def row_losses(self, logits: Logits, batch: Batch) -> Tensor:
        real = (batch["lengths"] > 0).to(logits["intent"].dtype)
        losses = F.cross_entropy(logits["intent"], batch["intent"], reduction="none") * real
        if "slots" not in logits:
            return losses
        rows, width, classes = logits["slots"].shape
        inside = torch.arange(width, device=losses.device) < batch["lengths"].unsqueeze(1)
        tags = batch["slots"].masked_fill(~inside, IGNORED)
        per_token = F.cross_entropy(
            logits["slots"].reshape(-1, classes),
            tags.reshape(-1),
            reduction="none",
            ignore_index=IGNORED,
        )
        tagged = (tags != IGNORED).sum(1).clamp(min=1)
        return losses + per_token.view(rows, width).sum(1) / tagged

    def measure(self, model: nn.Module, examples: Examples, *, batch_size: int = 1024) -> Measured:
        """`loss`, `accuracy` of intents, and with slots `slot_f1`, `exact_match`.

        `slot_f1`: micro-averaged over entities. `exact_match`: share of utterances with the right
        intent and all tags right. A word beyond `max_length` counts as tagged "O".
        """
        losses, intents, tags = self._predict(model, examples, batch_size)
        intent, slots = self._labels(examples)
        right = intents == intent
        metrics = {"loss": float(losses.mean()), "accuracy": float(right.mean())}
        if slots is not None:
            wrong_tags = np.concatenate(([0], np.cumsum(tags != slots)))
            exact = right & (np.diff(wrong_tags[examples.offsets]) == 0)
            metrics["slot_f1"] = self._slot_f1(slots, tags, examples.offsets)
            metrics["exact_match"] = float(exact.mean())
        return Measured(metrics, right.astype(np.float64), np.ones(len(right)))

    def _predict(
        self, model: nn.Module, examples: Examples, batch_size: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """(examples,) losses, (examples,) intents and (words,) tags that the model gives."""
        losses = np.zeros(len(examples))
        intents = np.zeros(len(examples), dtype=np.int64)
        tags = np.zeros(len(examples.tokens), dtype=np.int64)
        with evaluation_mode(model) as device:
            for rows, batch in self.evaluation_batches(examples, batch_size):
                batch = to_device(batch, device)
                logits: Logits = model(batch)
                losses[rows] = self.row_losses(logits, batch).cpu().numpy()
                intents[rows] = logits["intent"].argmax(1).cpu().numpy()
                if "slots" in logits:
                    layout = self.layout(examples.take(rows))
                    words, _ = gather_ranges(examples.offsets, rows)
                    best = logits["slots"].argmax(2)[batch["slots"] != IGNORED]
                    tags[words[layout.word[layout.first]]] = best.cpu().numpy()
        return losses, intents, tags

    def _labels(self, examples: Examples) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        if examples.intent is None or (self.schema.slots and examples.slots is None):
            missing = "intent" if examples.intent is None else "slots"
            raise DataError(f"task=intent_slots: examples without `{missing}`; use task=next_word")
        return examples.intent, examples.slots if self.schema.slots else None

    def _slot_f1(
        self,
        truth: NDArray[np.integer],
        predicted: NDArray[np.integer],
        offsets: NDArray[np.int64],
    ) -> float:
        # Not at the top: a device that only trains does without seqeval.
        from seqeval.metrics import f1_score

        names = np.array(self.schema.slots, dtype=object)
        cuts = offsets[1:-1]
        true_tags = [row.tolist() for row in np.split(names[truth], cuts)]
        predicted_tags = [row.tolist() for row in np.split(names[predicted], cuts)]
        return float(f1_score(true_tags, predicted_tags, average="micro", zero_division=0))
