"""First weights, drawn from a generator that is passed in: the global one is left alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DRAWS = (Tensor.normal_, Tensor.uniform_)


class Unborn(TorchFunctionMode):
    """A context in which modules are made without memory and without first weights.

    torch draws first weights on the meta device by way of its compiler, whose import takes seconds
    and 100 MB, for nothing. (So does `to_empty`: memory comes by `_apply`.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._device: Any = torch.device("meta")

    def __enter__(self) -> Unborn:
        self._device.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._device.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func in DRAWS or getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def initialise(model: nn.Module, *, generator: torch.Generator) -> None:
    """Draw every parameter of `model`, leaf by leaf in the order of `model.modules()`.

    Linear: uniform within 1/sqrt(inputs) (LeCun et al. 1998), bias 0. LSTM: uniform within
    1/sqrt(hidden), biases 0, but 1 at the forget gate (Jozefowicz et al. 2015). Embedding: normal,
    deviation 0.3. LayerNorm: 1 and 0. Raises TypeError at a layer of another kind.
    """
    with torch.no_grad():
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                _draw(module, generator)


def _draw(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, nn.Linear):
        _uniform(layer.weight, layer.in_features, generator)
        if layer.bias is not None:
            layer.bias.zero_()
    elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        layer.weight.normal_(0.0, 0.3, generator=generator)
    elif isinstance(layer, nn.LayerNorm):
        layer.reset_parameters()
    elif isinstance(layer, nn.LSTM):
        _draw_lstm(layer, generator)
    else:
        raise TypeError(f"{type(layer).__name__} has no initialisation: add one to initialise.py")


def _draw_lstm(layer: nn.LSTM, generator: torch.Generator) -> None:
    for name, parameter in layer.named_parameters():
        if name.startswith("weight"):
            _uniform(parameter, layer.hidden_size, generator)
        else:
            parameter.zero_()
        if name.startswith("bias_ih"):
            parameter[layer.hidden_size : 2 * layer.hidden_size] = 1.0


def _uniform(weight: torch.Tensor, inputs: int, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(inputs)
    weight.uniform_(-bound, bound, generator=generator)
