"""A model under Opacus' hooks, in the shape in which the grouped engine has it.

`track` and `group` are those of `sottovoce.privacy.gradients.grouping`, for any layer that Opacus
can take.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.dropout import RowDropout


class OpacusGrouped:
    """A model under Opacus' hooks, with what `sottovoce.privacy.gradients.grouping.Grouped` has.

    `module`: the model to call. `parameters`: trainable parameters by name in the model's own
    order: the model's own, or, with `groups` = 1, stacks (1, *shape) that may be given new data.
    `tape`: where dropout layers find the rows' seeds.
    """

    freezes_stacks = False

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], groups: int | None
    ) -> None:
        self.module, self.parameters, self.groups = module, parameters, groups
        self.probed = False  # whether rows were seen to be apart
        self.tape = Tape()  # of which only `row_seeds` is used
        self.inner = parameters
        if groups is not None:
            self.inner = {name: nn.Parameter(stack.data[0]) for name, stack in parameters.items()}

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each trainable parameter for one group."""
        skip = 0 if self.groups is None else 1
        return {name: tensor.shape[skip:] for name, tensor in self.parameters.items()}


def track(model: nn.Module) -> OpacusGrouped:
    """The model under Opacus' hooks on its *own* parameters and buffers.

    Raises UnsupportedLayer for a layer that mixes rows or that Opacus cannot take, ConfigError
    where Opacus is not installed.
    """
    return _hooked(model, None)


def group(model: nn.Module, devices: int) -> OpacusGrouped:
    """The model under Opacus' hooks with weights of its own, stacks of one; `devices` must be 1."""
    if devices != 1:
        raise ValueError(f"devices={devices}: the Opacus engine trains one device after another")
    return _hooked(model, devices)


def _hooked(model: nn.Module, devices: int | None) -> OpacusGrouped:
    from sottovoce.privacy.gradients.opacus_layers import attach, replaced

    _refuse_mixing(model)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = own
    if devices is not None:
        parameters = {n: nn.Parameter(p.detach().clone().unsqueeze(0)) for n, p in own.items()}
    grouped = OpacusGrouped(model, parameters, devices)
    kept = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in kept}
    memo |= {id(own[name]): inner for name, inner in grouped.inner.items()}
    grouped.module = replaced(copy.deepcopy(model, memo))
    _seed_dropout(grouped)
    attach(grouped.module)
    if devices is not None:
        grouped.module.register_forward_pre_hook(partial(_follow_stacks, grouped))
    return grouped


def _seed_dropout(grouped: OpacusGrouped) -> None:
    """Dropout layers of the model ask the tape for the rows' seeds, as under the other engine."""
    for module in list(grouped.module.modules()):
        for key, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, key, RowDropout.of(child, grouped.tape))


def _follow_stacks(grouped: OpacusGrouped, module: nn.Module, args: Any) -> None:
    """Before a forward pass: whatever data the stacks have by now is what the model computes on."""
    for name, stack in grouped.parameters.items():
        grouped.inner[name].data = stack.data[0]


def _refuse_mixing(model: nn.Module) -> None:
    for path, module in model.named_modules():
        label = f"{path or 'the model itself'} ({type(module).__name__})"
        single = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        if isinstance(module, nn.modules.batchnorm._NormBase) and not (
            single and not module.track_running_stats
        ):
            raise UnsupportedLayer(
                f"{label} mixes the rows of a batch, which voids per-example privacy: replace it "
                "by GroupNorm or LayerNorm"
            )
