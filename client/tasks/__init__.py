"""Tasks: what a model learns on a device. A new one is a class and a line in `TASKS`."""

from __future__ import annotations

from collections.abc import Sequence

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Schema
from sottovoce.client.tasks.base import Batch, Logits, Output, Task
from sottovoce.client.tasks.intent_slots import IntentSlots
from sottovoce.client.tasks.next_word import NextWord
from sottovoce.client.vocabulary import Vocabulary

__all__ = ["TASKS", "Batch", "IntentSlots", "Logits", "NextWord", "Output", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (IntentSlots, NextWord)}


def make_task(
    name: str,
    *,
    vocabulary: Vocabulary,
    schema: Schema,
    words: Sequence[str],
    max_length: int,
) -> Task:
    """The task called `name` over a population's word table; ConfigError if there is none."""
    if name not in TASKS:
        raise ConfigError(f"task={name} does not exist: choose one of {', '.join(TASKS)}")
    return TASKS[name](vocabulary, schema, words, max_length=max_length)
