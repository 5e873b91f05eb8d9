"""A bag of words: Joulin et al. 2016, arXiv:1607.01759, with hidden layers where wanted.

The mean of a row's word vectors passes through `layers` linear layers with ReLU. It knows nothing
of the order of words, so it tags none; and it is the fastest model to simulate by far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.models.base import Shape, Sizes, TextModel
from sottovoce.client.tasks.base import Batch, Logits


@dataclass(frozen=True)
class BagSizes(Sizes):
    """`hidden_size` is that of each of the `layers`; without any, the model is the paper's."""

    hidden_size: int = 128
    embedding_size: int = 64
    fewest_layers: ClassVar[int] = 0

    @property
    def input_width(self) -> int:
        return self.embedding_size

    @property
    def output_width(self) -> int:
        return self.hidden_size if self.layers else self.embedding_size


class Bag(TextModel):
    """The intent of the mean of a row's words. Raises ConfigError where words are to be tagged."""

    name: ClassVar[str] = "bag"
    causal: ClassVar[bool] = False
    sizes: ClassVar[type[BagSizes]] = BagSizes

    def __init__(self, shape: Shape, sizes: BagSizes) -> None:
        super().__init__(shape, sizes)
        if any(output.per_token for output in shape.outputs):
            raise ConfigError(
                "model=bag sees no order of words and cannot tag slots: use a population without "
                "slots, or model=bilstm"
            )
        self.embedding = nn.EmbeddingBag(
            shape.vocabulary_size, sizes.input_width, mode="mean", padding_idx=0
        )
        widths = [sizes.input_width] + [sizes.hidden_size] * sizes.layers
        self.layers = nn.ModuleList(
            nn.Linear(wide, narrow) for wide, narrow in zip(widths, widths[1:], strict=False)
        )

    def forward(self, batch: Batch) -> Logits:
        features = self.dropout(self.encode(self.embedding(batch["tokens"]), batch["lengths"]))
        return {output.name: self.heads[output.name](features) for output in self.outputs}

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Features (rows, output_width) of bags (rows, input_width)."""
        for layer in self.layers:
            embedded = F.relu(layer(embedded))
        return embedded
