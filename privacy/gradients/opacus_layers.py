"""What Opacus must be told of a model: recurrent cells of its own, padded embeddings, hooks.

Imported only when the Opacus engine is used.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from sottovoce.client.errors import ConfigError, SottovoceError, UnsupportedLayer

ENGINE = "privacy.example.engine=opacus"

try:
    from opacus.grad_sample.embedding import compute_embedding_grad_sample
    from opacus.grad_sample.grad_sample_module import GradSampleHooks
    from opacus.layers import DPGRU, DPLSTM, DPRNN
except ImportError:
    raise ConfigError(
        f'{ENGINE} needs Opacus, which is not installed: pip install "sottovoce[opacus]"'
    ) from None

# Said of every embedding, whose input has no gradient: the hook does what it should.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

RECURRENT: dict[type[nn.Module], Any] = {nn.LSTM: DPLSTM, nn.GRU: DPGRU, nn.RNN: DPRNN}


class PaddedEmbedding(nn.Embedding):
    """An embedding whose padding row has no gradient, which Opacus' own rule forgets."""


def _padded_sample(layer: Any, activations: list[Tensor], backprops: Tensor) -> Any:
    hidden = (activations[0] == layer.padding_idx).unsqueeze(-1)
    return compute_embedding_grad_sample(layer, activations, backprops.masked_fill(hidden, 0.0))


class Hooks(GradSampleHooks):  # type: ignore[misc]
    """Opacus' hooks, whose failures name the layer."""

    GRAD_SAMPLERS = GradSampleHooks.GRAD_SAMPLERS | {PaddedEmbedding: _padded_sample}

    def capture_backprops_hook(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            super().capture_backprops_hook(module, *args, **kwargs)
        except SottovoceError:
            raise
        except Exception as error:  # whatever a layer's rule or torch.func stumbles over
            paths = [path for path, other in self._module.named_modules() if other is module]
            raise _refusal(paths[0] if paths else "", module, error) from error


def attach(model: nn.Module) -> None:
    """Put Opacus' hooks on the model; UnsupportedLayer names the layer that it cannot take."""
    for path, module in model.named_modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if own and next(module.buffers(), None) is not None:
            raise _refusal(path, module, "a trainable layer with buffers")
    try:
        Hooks(model, loss_reduction="sum", strict=False)
    except NotImplementedError as error:
        raise _refusal("", model, error) from error


def replaced(module: nn.Module) -> nn.Module:
    """`module` with trainable recurrent layers and padded embeddings in Opacus' form.

    The parameters stay the same objects; a shared module stays shared.
    """
    done: dict[int, nn.Module] = {}

    def visit(path: str, current: nn.Module) -> nn.Module:
        if id(current) not in done:
            done[id(current)] = current
            trained = any(p.requires_grad for p in current.parameters(recurse=False))
            if trained and type(current) in RECURRENT:
                done[id(current)] = _cells(path, current)
            elif trained and type(current) is nn.Embedding and current.padding_idx is not None:
                current.__class__ = PaddedEmbedding
            for key, child in list(current.named_children()):
                setattr(current, key, visit(f"{path}.{key}".lstrip("."), child))
        return done[id(current)]

    return visit("", module)


def _cells(path: str, layer: Any) -> nn.Module:
    """Opacus' form of a recurrent layer, on the layer's own parameters."""
    if layer.proj_size or (layer.dropout and layer.num_layers > 1):
        raise _refusal(
            path, layer, "its projection, or dropout inside of it, works otherwise there"
        )
    extra = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
    twin: nn.Module = RECURRENT[type(layer)](
        layer.input_size,
        layer.hidden_size,
        num_layers=layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        bidirectional=layer.bidirectional,
        **extra,
    )
    for name, parameter in layer.named_parameters():
        kind, matrix, cell = name.split("_", 2)  # weight_ih_l0_reverse: l0_reverse.ih.weight
        setattr(twin.get_submodule(f"{cell}.{matrix}"), kind, parameter)
    return twin.train(layer.training)


def _refusal(path: str, module: nn.Module, why: object) -> UnsupportedLayer:
    label = f"{path or 'the model itself'} ({type(module).__name__})"
    reason = " ".join(str(why).split()) or type(why).__name__
    return UnsupportedLayer(
        f"{ENGINE} cannot take {label} apart by example: {reason}; freeze it "
        "(requires_grad_(False)) or replace it"
    )
