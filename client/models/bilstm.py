"""Bidirectional LSTM: Hochreiter and Schmidhuber 1997; Graves and Schmidhuber 2005."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sottovoce.client.models.base import Shape, Sizes, TextModel, real_positions


@dataclass(frozen=True)
class BiLSTMSizes(Sizes):
    """`hidden_size` is that of one direction."""

    embedding_size: int = 64

    @property
    def input_width(self) -> int:
        return self.embedding_size

    @property
    def output_width(self) -> int:
        return 2 * self.hidden_size


class BiLSTM(TextModel):
    """Reads every row in both directions, with two plain LSTMs a layer.

    The second reads the row reversed within its own length: a bidirectional nn.LSTM would begin
    its way back in the padding.
    """

    name: ClassVar[str] = "bilstm"
    causal: ClassVar[bool] = False
    sizes: ClassVar[type[BiLSTMSizes]] = BiLSTMSizes

    def __init__(self, shape: Shape, sizes: BiLSTMSizes) -> None:
        super().__init__(shape, sizes)
        widths = [sizes.input_width] + [sizes.output_width] * (sizes.layers - 1)
        hidden = sizes.hidden_size
        self.onward = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)
        self.back = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for width in widths)

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        features = embedded
        mirror = mirrored_positions(lengths, embedded.shape[1])
        for onward, back in zip(self.onward, self.back, strict=True):
            ahead, _ = onward(features)
            behind, _ = back(reorder(features, mirror))
            features = torch.cat([ahead, reorder(behind, mirror)], dim=2)
        return features


def mirrored_positions(lengths: Tensor, width: int) -> Tensor:
    """(rows, width) position that each swaps with when a row is reversed; padding stays put."""
    position = torch.arange(width, device=lengths.device).expand(len(lengths), width)
    inside = real_positions(lengths, width)
    return torch.where(inside, lengths.unsqueeze(1) - 1 - position, position)


def reorder(features: Tensor, position: Tensor) -> Tensor:
    """(rows, T, D) features, those of each row taken from its `position` (rows, T)."""
    return features.gather(1, position.unsqueeze(2).expand_as(features))
