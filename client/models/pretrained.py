"""Pretrained models of `transformers`, as a task's models.

Encoders (BERT, MiniLM, DistilBERT, RoBERTa, …) serve tasks that read whole texts: new linear heads
on the last hidden states, per piece for tags, on the mean of a row for its label (Reimers and
Gurevych 2019, arXiv:1908.10084). Causal models (GPT-2, Llama, …) serve next-word tasks with the
head they were pretrained with.

A task's ids are the tokenizer's own plus four (`sottovoce.client.vocabulary`); here they become
the model's again, and its logits the task's.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.models.base import real_positions
from sottovoce.client.models.pretrained_base import position_tables
from sottovoce.client.tasks.base import Batch, Logits, Output
from sottovoce.client.tokenizer_file import Subwords
from sottovoce.client.vocabulary import EOS, FIRST, PAD, UNK

NEVER = -1e4  # logit of a class that is no target


class Pretrained(nn.Module):
    """What both kinds share: a base model, and the task's ids as the base model's.

    Neither padding nor any other row changes the logits of a row's real positions.
    """

    name: ClassVar[str] = "pretrained"
    sparse_inputs: ClassVar[dict[str, str]] = {}
    specials: Tensor

    def __init__(self, base: Any, subwords: Subwords) -> None:
        super().__init__()
        self.base = base
        config = base.config.get_text_config()
        end = _one(config.eos_token_id)
        pad, unknown = _one(config.pad_token_id), subwords.unknown
        usual = [pad, unknown, _one(config.bos_token_id), end]  # <pad>, <unk>, <bos>, <eos>
        instead = end or 0
        known = [instead if number is None else number for number in usual]
        self.register_buffer("specials", torch.tensor(known), persistent=False)
        takes = "position_ids" in inspect.signature(base.forward).parameters
        self.gives_positions = takes and any(
            table.padding_idx is None and table.weight.requires_grad
            for table in position_tables(base)
        )

    def own_ids(self, tokens: Tensor) -> Tensor:
        """The base model's ids of the task's `tokens`."""
        special = self.specials[tokens.clamp(max=FIRST - 1)]
        return torch.where(tokens < FIRST, special, tokens - FIRST)

    def positions(self, ids: Tensor) -> dict[str, Tensor]:
        """Positions row by row, where their table trains: one row for all would hide whose is what.

        RoBERTa's, which depend on the padding, are left to it.
        """
        if not self.gives_positions:
            return {}
        return {"position_ids": torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)}


class PretrainedEncoder(Pretrained):
    """Framed as in pretraining ([CLS] … [SEP]); heads on hidden states, drawn anew."""

    before: Tensor
    after: Tensor

    def __init__(
        self, base: Any, subwords: Subwords, outputs: tuple[Output, ...], dropout: float
    ) -> None:
        super().__init__(base, subwords)
        self.outputs = outputs
        self.register_buffer("before", torch.tensor(subwords.before).long(), persistent=False)
        self.register_buffer("after", torch.tensor(subwords.after).long(), persistent=False)
        self.dropout = nn.Dropout(dropout)
        width = base.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({o.name: nn.Linear(width, o.classes) for o in outputs})

    def forward(self, batch: Batch) -> Logits:
        tokens, first = batch["tokens"], len(self.before)
        ids, seen = self.framed(tokens, batch["lengths"])
        hidden = self.base(
            input_ids=ids, attention_mask=seen.long(), **self.positions(ids)
        ).last_hidden_state
        hidden = self.dropout(hidden)
        pieces = hidden[:, first : first + tokens.shape[1]]
        return {
            output.name: self.heads[output.name](pieces if output.per_token else mean(hidden, seen))
            for output in self.outputs
        }

    def framed(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, T + frame) ids with the tokenizer's frame around each text, and what is real.

        A row without any real position sees its first one: attention to nothing is no number.
        """
        rows, width = tokens.shape
        first, last = len(self.before), len(self.after)
        texts = self.own_ids(tokens.masked_fill(~real_positions(lengths, width), PAD))
        padding = self.specials[PAD].expand(rows, last)
        ids = torch.cat([self.before.expand(rows, first), texts, padding], 1)
        ends = first + lengths.unsqueeze(1) + torch.arange(last, device=lengths.device)
        ids = ids.scatter(1, ends, self.after.expand(rows, last))
        return ids, real_positions((lengths + first + last).clamp(min=1), ids.shape[1])


class PretrainedCausal(Pretrained):
    """The model with its own head; `<eos>` is the model's end of text."""

    def __init__(self, base: Any, subwords: Subwords) -> None:
        super().__init__(base, subwords)
        self.pieces = subwords.size
        self.end = _one(base.config.get_text_config().eos_token_id)
        if self.end is None or self.end >= self.pieces:
            raise ConfigError(
                f"model.path={base.name_or_path}: eos_token_id={self.end} of its config.json is no "
                "piece of the tokenizer: set it to the end of a text"
            )
        self.unknown = None if subwords.unknown == self.end else subwords.unknown

    def forward(self, batch: Batch) -> Logits:
        ids = self.own_ids(batch["tokens"])
        logits = self.base(input_ids=ids, use_cache=False, **self.positions(ids)).logits
        return {"words": self.classes(logits[..., : self.pieces])}

    def classes(self, logits: Tensor) -> Tensor:
        """(rows, T, 4 + pieces) with <unk> and <eos> in the task's places, and there alone."""
        never = torch.full_like(logits[..., :1], NEVER)
        special = [never] * FIRST
        moved = {UNK: self.unknown, EOS: self.end}
        for place, piece in moved.items():
            if piece is not None:
                special[place] = logits[..., piece : piece + 1]
        all_classes = torch.cat([*special, logits], 2)
        for piece in moved.values():
            if piece is not None:
                all_classes[..., FIRST + piece] = NEVER
        return all_classes


def mean(features: Tensor, seen: Tensor) -> Tensor:
    """(rows, D) mean of the features at the positions that are `seen` (rows, T)."""
    weights = seen.unsqueeze(2).to(features.dtype)
    total: Tensor = (features * weights).sum(1)
    return total / weights.sum(1)


def _one(number: int | list[int] | None) -> int | None:
    """The first of the ids that a configuration gives."""
    if isinstance(number, list):
        return number[0] if number else None
    return number
