"""The task seam: how examples become tensors, what a row of them loses, how a model is measured.

A task says which `outputs` it wants and a model supplies logits for them, so that tasks and models
are written apart: any model that reads in the task's direction fits (`sottovoce.client.models`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples, Schema
from sottovoce.client.tasks.layout import Layout, lay_out
from sottovoce.client.vocabulary import Vocabulary

Batch = dict[str, Tensor]  # every tensor has the rows (examples) first
Logits = dict[str, Tensor]

IGNORED = -100  # label of a position that has none
_LOGITS_AT_ONCE = 2**24  # per evaluation batch: 64 MB, and small enough for one pass to stay quick


@dataclass(frozen=True)
class Output:
    """Logits that a task asks of a model: (rows, T, classes) if `per_token`, or (rows, classes)."""

    name: str
    classes: int
    per_token: bool


@dataclass(frozen=True)
class Measured:
    """What one pass over examples found.

    `metrics`: over all of them, by name. `score`, `weight`: (examples,) float64, of the leading
    metric: what `Task.headline_of` makes of their sums over any part of the examples is that part's
    leading metric.
    """

    metrics: dict[str, float]
    score: NDArray[np.float64]
    weight: NDArray[np.float64]


class Labelled(Protocol):
    """What a task must know of a population."""

    @property
    def name(self) -> str: ...

    @property
    def schema(self) -> Schema: ...


class Task(ABC):
    """One kind of learning problem over a population's examples.

    `words` is the population's word table; each word is looked up in the vocabulary once, here.
    `max_length` is the most positions of a row; what lies beyond is cut, and an example is never
    split in two: it stays the unit of example-level privacy.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    higher_is_better: ClassVar[bool]
    causal: ClassVar[bool]  # whether a position may see only what stands before it

    def __init__(
        self, vocabulary: Vocabulary, schema: Schema, words: Sequence[str], *, max_length: int
    ) -> None:
        if max_length < 1:
            raise ConfigError(f"task.max_length={max_length} must be at least 1")
        self.vocabulary = vocabulary
        self.schema = schema
        self.max_length = max_length
        self._pieces = vocabulary.ids(words)

    @property
    @abstractmethod
    def outputs(self) -> tuple[Output, ...]:
        """The logits that `row_losses` and `evaluate` read."""

    @abstractmethod
    def check(self, population: Labelled) -> None:
        """Raise DataError when the population lacks what the task needs."""

    @abstractmethod
    def collate(self, examples: Examples) -> Batch:
        """One row per example, right padded to the longest (<= `max_length`); int64 tensors.

        Has at least `tokens` (rows, T) and `lengths` (rows,), the positions that count.
        """

    @abstractmethod
    def row_losses(self, logits: Logits, batch: Batch) -> Tensor:
        """(rows,) loss of each row in nats; 0 where `lengths` is 0, however the row is filled."""

    @abstractmethod
    def measure(self, model: nn.Module, examples: Examples, *, batch_size: int = 1024) -> Measured:
        """`model` on `examples`; the same whatever `batch_size`, which bounds memory."""

    def evaluate(
        self, model: nn.Module, examples: Examples, *, batch_size: int = 1024
    ) -> dict[str, float]:
        """Metrics of `model` on `examples` as a whole: those of `measure`."""
        return self.measure(model, examples, batch_size=batch_size).metrics

    def headline_of(
        self, score: NDArray[np.float64], weight: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The leading metric of parts of the examples, from the sums of `Measured` over each."""
        found: NDArray[np.float64] = score / weight
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows,) loss of each row: depends on that row alone, and not on how far it is padded."""
        return self.row_losses(model(batch), batch)

    def layout(self, examples: Examples) -> Layout:
        """The pieces of `examples`, cut at `max_length`."""
        return lay_out(self._pieces, examples, self.max_length)

    def evaluation_batches(
        self, examples: Examples, batch_size: int
    ) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """All examples as (rows, batch): longest first, so that little of a batch is padding."""
        if len(examples) == 0:
            raise DataError("nothing to evaluate on: 0 examples; hold out more devices")
        lengths = self.layout(examples).lengths
        order = np.argsort(-lengths, kind="stable")
        classes = sum(output.classes for output in self.outputs)
        start = 0
        while start < len(order):
            affordable = _LOGITS_AT_ONCE // (classes * (int(lengths[order[start]]) + 1))
            rows = order[start : start + max(1, min(batch_size, affordable))]
            yield rows, self.collate(examples.take(rows))
            start += len(rows)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[torch.device]:
    """The model without dropout or gradients; yields the device that its parameters are on."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: values.to(device) for name, values in batch.items()}
