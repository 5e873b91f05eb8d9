"""LSTM language model: Hochreiter and Schmidhuber 1997; Mikolov et al. 2010."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from sottovoce.client.models.base import Shape, Sizes, TextModel


@dataclass(frozen=True)
class LSTMSizes(Sizes):
    hidden_size: int = 128
    embedding_size: int = 64

    @property
    def input_width(self) -> int:
        return self.embedding_size


class LSTM(TextModel):
    """Reads every row from left to right."""

    name: ClassVar[str] = "lstm"
    causal: ClassVar[bool] = True
    sizes: ClassVar[type[LSTMSizes]] = LSTMSizes

    def __init__(self, shape: Shape, sizes: LSTMSizes) -> None:
        super().__init__(shape, sizes)
        hidden = sizes.hidden_size
        widths = [sizes.input_width] + [hidden] * (sizes.layers - 1)
        self.layers = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        features = embedded
        for layer in self.layers:
            features, _ = layer(features)
        return features
