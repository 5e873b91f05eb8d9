"""What all text models share: embedded tokens in, one linear head per output of the task.

A model is built of leaf modules with the rows (examples) first and of operations that treat rows
alone, so that its leaves can be swapped for grouped ones that train many devices at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.tasks.base import Batch, Logits, Output


@dataclass(frozen=True)
class Shape:
    """What a task fixes of a model: ids it reads, longest row, logits it wants."""

    vocabulary_size: int
    max_length: int
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes that every model has; each model has its own dataclass with its own defaults.

    Raises ConfigError for a size below 1 or a dropout outside of [0, 1).
    """

    hidden_size: int = 64
    layers: int = 1
    dropout: float = 0.0
    fewest_layers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for size in fields(self):
            value, least = getattr(self, size.name), 1
            if size.name == "layers":
                least = self.fewest_layers
            if size.name != "dropout" and value < least:
                raise ConfigError(f"model.{size.name}={value} must be at least {least}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} must be at least 0 and below 1")

    @property
    def input_width(self) -> int:
        """Features of an embedded token."""
        return self.hidden_size

    @property
    def output_width(self) -> int:
        """Features per position that `encode` returns."""
        return self.hidden_size


class TextModel(nn.Module, ABC):
    """Embedding, encoder, heads. `forward(batch)` reads `tokens` and `lengths`.

    Neither padding nor any other row changes the logits of a row's real positions; what stands at
    padding is finite and meaningless. A row of length 0 has finite logits.
    """

    name: ClassVar[str]
    causal: ClassVar[bool]  # whether a position sees only what stands before it
    sizes: ClassVar[type[Sizes]]
    sparse_inputs: ClassVar[dict[str, str]] = {"embedding": "tokens"}

    def __init__(self, shape: Shape, sizes: Sizes) -> None:
        super().__init__()
        self.outputs = shape.outputs
        self.embedding: nn.Module = nn.Embedding(shape.vocabulary_size, sizes.input_width)
        self.dropout = nn.Dropout(sizes.dropout)
        self.heads = nn.ModuleDict(
            {output.name: nn.Linear(sizes.output_width, output.classes) for output in shape.outputs}
        )

    @abstractmethod
    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Features (rows, T, output_width) of embedded tokens (rows, T, input_width)."""

    def forward(self, batch: Batch) -> Logits:
        tokens, lengths = batch["tokens"], batch["lengths"]
        features = self.encode(self.dropout(self.embedding(tokens)), lengths)
        features = self.dropout(features)
        return {
            output.name: self.heads[output.name](
                features if output.per_token else max_pool(features, lengths)
            )
            for output in self.outputs
        }


def real_positions(lengths: Tensor, width: int) -> Tensor:
    """(rows, width) True where a row of that length has a token."""
    return torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)


def max_pool(features: Tensor, lengths: Tensor) -> Tensor:
    """(rows, D) largest value of each feature over a row's real positions; 0 where it has none."""
    inside = real_positions(lengths, features.shape[1]).unsqueeze(2)
    lowest = torch.finfo(features.dtype).min
    highest = features.masked_fill(~inside, lowest).amax(1)
    return highest.masked_fill((lengths == 0).unsqueeze(1), 0.0)
