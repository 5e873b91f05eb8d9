"""Transformer encoder: Vaswani et al. 2017; pre-norm: Xiong et al. 2020, arXiv:2002.04745.

Attention is written with four linear layers, not nn.MultiheadAttention, whose weights are used
outside of a layer and in one packed matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.models.base import Shape, Sizes, TextModel, real_positions


@dataclass(frozen=True)
class TransformerSizes(Sizes):
    """`hidden_size` is the width of a position; `heads` divides it."""

    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} must be a multiple of "
                f"model.heads={self.heads}"
            )


class Transformer(TextModel):
    """Every position sees all real positions of its row."""

    name: ClassVar[str] = "transformer"
    causal: ClassVar[bool] = False
    sizes: ClassVar[type[TransformerSizes]] = TransformerSizes

    def __init__(self, shape: Shape, sizes: TransformerSizes) -> None:
        super().__init__(shape, sizes)
        width, heads = sizes.hidden_size, sizes.heads
        self.positions = nn.Embedding(shape.max_length, width)
        self.blocks = nn.ModuleList(Block(width, heads, sizes.dropout) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(width)
        self.max_length = shape.max_length

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        rows, length, _ = embedded.shape
        # Beyond max_length there is only padding, whose position does not matter.
        position = torch.arange(length, device=lengths.device).clamp(max=self.max_length - 1)
        features = embedded + self.positions(position.expand(rows, length))
        mask = None if self.causal else visible_keys(lengths, length)
        for block in self.blocks:
            features = block(features, mask)
        normal: Tensor = self.norm(features)
        return normal


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what it reads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.forward_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (rows, T, width). `mask`: (rows, 1, 1, T) keys to see, or None: those before."""
        x = x + self.dropout(self.mix(self.attend(self.attention_norm(x), mask)))
        result: Tensor = x + self.dropout(self.feed_forward(self.forward_norm(x)))
        return result

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        return mixed.transpose(1, 2).flatten(2)

    def feed_forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.narrow(F.gelu(self.widen(x)))
        return result


def visible_keys(lengths: Tensor, width: int) -> Tensor:
    """(rows, 1, 1, width) True at real positions, and at the first of a row that has none.

    A row that sees nothing at all would be a softmax over nothing: NaN.
    """
    return real_positions(lengths.clamp(min=1), width)[:, None, None, :]
