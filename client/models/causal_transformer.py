"""Transformer language model: Radford et al. 2019."""

from __future__ import annotations

from typing import ClassVar

from sottovoce.client.models.transformer import Transformer


class CausalTransformer(Transformer):
    """Every position sees itself and those before it, which no padding is."""

    name: ClassVar[str] = "causal_transformer"
    causal: ClassVar[bool] = True
