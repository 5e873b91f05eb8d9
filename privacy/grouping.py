"""Swapping a model's leaves for tracked ones, shared or stacked for many devices.

Every operation that treats rows independently works on a stack of devices as it is, so only
layers with trainable parameters are replaced, and any model made of known leaves can be grouped.
Frozen layers stay shared: with adapters, the base model sees one big batch.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.layers import Leaf, TrackedEmbedding, TrackedLayerNorm, TrackedLinear
from sottovoce.privacy.recurrent import TrackedLSTM
from sottovoce.privacy.tape import Tape

LEAVES: dict[type[nn.Module], type[Leaf]] = {
    nn.Linear: TrackedLinear,
    nn.Embedding: TrackedEmbedding,
    nn.LayerNorm: TrackedLayerNorm,
    nn.LSTM: TrackedLSTM,
}

REMEDIES = (
    "freeze it (requires_grad_(False)), or train device by device with "
    "privacy.example.engine=opacus"
)


class Grouped:
    """A model whose trainable leaves are tracked.

    `module`: the model to call, with rows of all groups as its batch. `parameters`: trainable
    parameters by name, in the model's own order; each is the model's own (shared) or a stack
    (groups, *shape). `tape`: where a backward pass leaves its factors.
    """

    def __init__(
        self, module: nn.Module, tape: Tape, parameters: dict[str, nn.Parameter], groups: int | None
    ) -> None:
        self.module, self.tape, self.parameters, self.groups = module, tape, parameters, groups

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each trainable parameter for one group."""
        skip = 0 if self.groups is None else 1
        return {name: tensor.shape[skip:] for name, tensor in self.parameters.items()}


def track(model: nn.Module) -> Grouped:
    """The model with tracked leaves on the model's *own* parameters and buffers.

    Nothing is copied but the modules' shells: an optimiser step on the result moves `model`.
    Raises UnsupportedLayer for a trainable layer without a tracked form.
    """
    return _swap(model, None)


def group(model: nn.Module, devices: int) -> Grouped:
    """The model with one stack of weights for each of `devices` groups of rows.

    Every trainable parameter becomes (devices, *shape), each slice a copy of the model's; buffers
    and frozen parameters are shared.
    """
    return _swap(model, devices)


def ungroup(grouped: Grouped, device: int) -> dict[str, Tensor]:
    """The trainable parameters of one device of a `group`, by name."""
    return {name: stack.detach()[device] for name, stack in grouped.parameters.items()}


def _swap(model: nn.Module, devices: int | None) -> Grouped:
    _refuse_unknown(model)
    memo: dict[int, Any] = {}
    by_id: dict[int, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_id[id(parameter)] = name
            stacked = parameter
            if devices is not None:
                copies = parameter.detach().expand(devices, *parameter.shape).clone()
                stacked = nn.Parameter(copies)
            parameters[name] = stacked
            memo[id(parameter)] = stacked
        else:
            memo[id(parameter)] = parameter
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    tape = Tape()
    names = {id(memo[key]): name for key, name in by_id.items()}
    module = _replace(copy.deepcopy(model, memo), tape, names)
    module.register_forward_pre_hook(partial(_note_rows, tape), with_kwargs=True)
    return Grouped(module, tape, parameters, devices)


def _replace(module: nn.Module, tape: Tape, names: dict[int, str]) -> nn.Module:
    """`module` with every trainable leaf in it replaced; a shared module stays shared."""
    done: dict[int, nn.Module] = {}

    def visit(current: nn.Module) -> nn.Module:
        if id(current) not in done:
            done[id(current)] = current
            own = {
                key: names[id(value)]
                for key, value in current.named_parameters(recurse=False)
                if id(value) in names
            }
            if own:
                done[id(current)] = LEAVES[type(current)](current, tape, own)
            else:
                for key, child in list(current.named_children()):
                    setattr(current, key, visit(child))
        return done[id(current)]

    return visit(module)


def _note_rows(tape: Tape, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell the tape the first dimension of the first tensor that the model is called with."""
    values = [*args, *kwargs.values()]
    flat = [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
    first = next((value for value in flat if isinstance(value, Tensor) and value.dim()), None)
    tape.rows = None if first is None else first.shape[0]


def _refuse_unknown(model: nn.Module) -> None:
    for path, module in model.named_modules():
        label = f"{path or 'the model itself'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        ):
            raise UnsupportedLayer(
                f"{label} mixes the rows of a batch, which voids per-example privacy: replace it "
                "by GroupNorm or LayerNorm"
            )
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and type(module) not in LEAVES:
            raise UnsupportedLayer(
                f"{label} has trainable parameters but no tracked form: {REMEDIES}"
            )
        if own and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
            raise UnsupportedLayer(
                f"{label} has hooks, which a tracked leaf would skip: remove them"
            )
