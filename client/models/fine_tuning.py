"""From the settings of `model=pretrained` to a model: which weights, and what of them trains.

Adapters, the heads alone, or everything. What does not train is frozen, shared by all devices, and
neither sent nor kept: only what trains travels. Full fine-tuning stacks all weights once for every
device that trains at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sottovoce.client.errors import ConfigError
from sottovoce.client.models.adapters import add_adapters
from sottovoce.client.models.initialise import initialise
from sottovoce.client.models.pretrained import Pretrained, PretrainedCausal, PretrainedEncoder
from sottovoce.client.models.pretrained_base import base_model, longest_row
from sottovoce.client.tasks.base import Task
from sottovoce.client.tokenizer_file import Subwords
from sottovoce.client.vocabulary import FIRST, FileVocabulary


@dataclass(frozen=True)
class PretrainedSettings:
    """Which weights, and what of them trains. Raises ConfigError for an impossible value.

    `path`: a folder, or org/name on the hub. `sha256`: of its weights, None for any. `lora_rank`:
    of the adapters; 0 trains everything. `lora_alpha`: their scale times rank, None for 2 * rank.
    `lora_targets`: names of layers, None for queries and values. `heads_only`: nothing but the
    heads trains. `dropout`: of hidden states.
    """

    path: str
    sha256: str | None = None
    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    heads_only: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise ConfigError(f"model.lora_rank={self.lora_rank} must be at least 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and below 1")
        if isinstance(self.lora_targets, str):
            raise ConfigError(
                f"model.lora_targets={self.lora_targets} must be a list: write "
                f"model.lora_targets=[{self.lora_targets}]"
            )


def make_pretrained(task: Task, *, generator: torch.Generator, **settings: Any) -> Pretrained:
    """The model of `settings` (see `PretrainedSettings`) for a task; `generator` draws what is new.

    Raises ConfigError where files, tokenizer, task and settings do not fit each other.
    """
    targets = settings.get("lora_targets")
    if targets is not None and not isinstance(targets, str):
        settings["lora_targets"] = tuple(targets)
    chosen = PretrainedSettings(**settings)
    if task.causal and chosen.heads_only:
        raise ConfigError(
            f"model.heads_only=true leaves nothing to train for task={task.name}: the head is the "
            "pretrained one; set model.lora_rank"
        )
    subwords = _subwords(task)
    adapted = chosen.lora_rank > 0 and not chosen.heads_only
    base = base_model(
        chosen.path, chosen.sha256, causal=task.causal, dropout=chosen.dropout,
        train=not adapted and not chosen.heads_only,
    )  # fmt: skip
    _check_fit(base, subwords, task, chosen)
    if adapted:
        alpha = 2 * chosen.lora_rank if chosen.lora_alpha is None else chosen.lora_alpha
        add_adapters(
            base, rank=chosen.lora_rank, alpha=alpha, targets=chosen.lora_targets,
            dropout=chosen.dropout, generator=generator,
        )  # fmt: skip
    if task.causal:
        return _sees_only_the_past(PretrainedCausal(base, subwords), chosen.path)
    with torch.random.fork_rng(devices=[]):  # where torch's own first weights come from
        model = PretrainedEncoder(base, subwords, task.outputs, chosen.dropout)
    initialise(model.heads, generator=generator)
    return model


def _subwords(task: Task) -> Subwords:
    vocabulary = task.vocabulary
    if isinstance(vocabulary, FileVocabulary) and vocabulary.subwords is not None:
        return vocabulary.subwords
    raise ConfigError(
        f"model=pretrained reads the pieces of its own tokenizer.json, not {vocabulary.description}"
        ": set task.vocabulary.source=auto"
    )


def _check_fit(base: Any, subwords: Subwords, task: Task, chosen: PretrainedSettings) -> None:
    """Raise ConfigError where the tokenizer is another model's, or rows are too long."""
    rows = base.get_input_embeddings().num_embeddings
    if not 0.9 * rows <= subwords.size <= rows:  # tables are often rounded up, never by much
        raise ConfigError(
            f"task.vocabulary has {subwords.size} pieces and model.path={chosen.path} embeds "
            f"{rows}: take the tokenizer.json of that very model (task.vocabulary.source=auto)"
        )
    frame = 0 if task.causal else len(subwords.before) + len(subwords.after)
    most = longest_row(base)
    if most is not None and task.max_length + frame > most:
        raise ConfigError(
            f"task.max_length={task.max_length} is more than model.path={chosen.path} can read "
            f"({most} positions, {frame} for the frame): set task.max_length={most - frame}"
        )


@torch.no_grad()
def _sees_only_the_past(model: PretrainedCausal, path: str) -> PretrainedCausal:
    """The model; ConfigError where an early logit changes with a later word."""
    one, other = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[4, 5, 6, 4]])
    model.eval()
    before, after = (model({"tokens": t % (FIRST + model.pieces)})["words"] for t in (one, other))
    model.train()
    if not torch.allclose(before[:, :3], after[:, :3], rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"model.path={path} is an encoder, which sees the words it should predict: use "
            "task=intent_slots, or a causal model"
        )
    return model
