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
from sottovoce.privacy.gradients import gemm
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.attention import TrackedMultiheadAttention
from sottovoce.privacy.layers.bags import TrackedEmbeddingBag
from sottovoce.privacy.layers.convolution import TrackedConv1d
from sottovoce.privacy.layers.dropout import RowDropout
from sottovoce.privacy.layers.gru import TrackedGRU
from sottovoce.privacy.layers.hub import hub_leaf, refuse_hub_layer
from sottovoce.privacy.layers.linear import (
    FrozenLinear,
    Leaf,
    TrackedEmbedding,
    TrackedLayerNorm,
    TrackedLinear,
)
from sottovoce.privacy.layers.lstm import TrackedLSTM
from sottovoce.privacy.layers.normalisation import TrackedGroupNorm, TrackedRMSNorm

# By exact type: a subclass may compute something else.
LEAVES: dict[type[nn.Module], type[Leaf]] = {
    nn.Linear: TrackedLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: TrackedLinear,
    nn.Embedding: TrackedEmbedding,
    nn.EmbeddingBag: TrackedEmbeddingBag,
    nn.LayerNorm: TrackedLayerNorm,
    nn.RMSNorm: TrackedRMSNorm,
    nn.GroupNorm: TrackedGroupNorm,
    nn.Conv1d: TrackedConv1d,
    nn.LSTM: TrackedLSTM,
    nn.GRU: TrackedGRU,
    nn.MultiheadAttention: TrackedMultiheadAttention,
}

# Leaves that read the parameters of their children themselves.
WHOLE = (nn.MultiheadAttention,)

REMEDIES = (
    "freeze it (requires_grad_(False)), or train device by device with "
    "privacy.example.engine=opacus"
)


class Grouped:
    """A model whose trainable leaves are tracked.

    `module`: the model to call, with rows of all groups as its batch. `parameters`: trainable
    parameters by name, in the model's own order; each is the model's own (shared) or a stack
    (groups, *shape), and may be given data of either form. `tape`: where a backward pass leaves
    its factors.
    """

    def __init__(
        self, module: nn.Module, tape: Tape, parameters: dict[str, nn.Parameter], groups: int | None
    ) -> None:
        self.module, self.tape, self.parameters, self.groups = module, tape, parameters, groups
        self.probed = False  # whether its rows have been seen to be apart
        self.frozen_stacks: list[nn.Parameter] = []
        skip = 0 if groups is None else 1
        self._dims = {name: tensor.dim() - skip for name, tensor in parameters.items()}

    @property
    def freezes_stacks(self) -> bool:
        """Whether a frozen parameter is stacked beside a trainable one of its layer."""
        return bool(self.frozen_stacks)

    def resize(self, groups: int) -> None:
        """Frozen stacks for another number of groups."""
        for parameter in self.frozen_stacks:
            parameter.data = parameter.data[:1].expand(groups, *parameter.shape[1:])

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each trainable parameter for one group."""
        dims = self._dims
        return {n: tensor.shape[tensor.dim() - dims[n] :] for n, tensor in self.parameters.items()}


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
    refuse_unknown(model)
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
    module = _replace(copy.deepcopy(model, memo), tape, names, devices)
    module.register_forward_pre_hook(partial(_note_rows, tape), with_kwargs=True)
    module.register_forward_hook(partial(_pass_over, tape), always_call=True)
    grouped = Grouped(module, tape, parameters, devices)
    for inner in module.modules() if devices is not None else ():
        own = list(inner.parameters(recurse=False))
        if any(p.requires_grad for p in own):
            grouped.frozen_stacks += [p for p in own if not p.requires_grad]
    return grouped


def _replace(
    module: nn.Module, tape: Tape, names: dict[int, str], devices: int | None
) -> nn.Module:
    """`module` with every trainable leaf in it replaced; a shared module stays shared."""
    done: dict[int, nn.Module] = {}

    def visit(current: nn.Module) -> nn.Module:
        if id(current) not in done:
            done[id(current)] = current
            own = {
                key: names[id(value)]
                for key, value in current.named_parameters(recurse=isinstance(current, WHOLE))
                if id(value) in names
            }
            kind = leaf_type(current) if own else None
            if kind is not None:
                if devices is not None:
                    _stack_frozen(current, names, devices)
                done[id(current)] = kind(current, tape, own)
            elif type(current) is nn.Linear and gemm.onednn_is_faster() and not has_hooks(current):
                done[id(current)] = FrozenLinear(current)
            elif type(current) is nn.Dropout:
                done[id(current)] = RowDropout.of(current, tape)
            else:
                for key, child in list(current.named_children()):
                    setattr(current, key, visit(child))
                _keep_off_fused_kernels(current)
        return done[id(current)]

    return visit(module)


def leaf_type(module: nn.Module) -> type[Leaf] | None:
    """The tracked form of a layer, or None where there is none."""
    return LEAVES.get(type(module)) or hub_leaf(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after the module that a stand-in would skip."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _stack_frozen(leaf: nn.Module, names: dict[int, str], devices: int) -> None:
    """Frozen parameters beside a stacked one, seen as a stack too; nothing is copied."""
    for module in leaf.modules():
        own = dict(module.named_parameters(recurse=False))
        if any(id(parameter) in names for parameter in own.values()):
            for key, parameter in own.items():
                if id(parameter) not in names:
                    stack = parameter.detach().expand(devices, *parameter.shape)
                    module.register_parameter(key, nn.Parameter(stack, requires_grad=False))


def _keep_off_fused_kernels(module: nn.Module) -> None:
    """Torch's encoder has kernels for eval mode that read the weights past tracked leaves."""
    if any(isinstance(inner, Leaf) for inner in module.modules()):
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _note_rows(tape: Tape, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell the tape the first dimension of the first tensor that the model is called with.

    Named inputs of `transformers` come first: position ids may have one row for all.
    """
    tape.inside += 1
    if args and isinstance(args[0], Tensor):
        tape.rows = args[0].shape[0] if args[0].dim() else None
        return
    named = [kwargs[key] for key in ("input_ids", "inputs_embeds") if key in kwargs]
    values = [*args, *named, *kwargs.values()]
    flat = [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
    first = next((value for value in flat if isinstance(value, Tensor) and value.dim()), None)
    tape.rows = None if first is None else first.shape[0]


def _pass_over(tape: Tape, module: nn.Module, args: Any, result: Any) -> None:
    tape.inside -= 1


def refuse_unknown(model: nn.Module) -> None:
    """Raise UnsupportedLayer for a trainable layer that no tracked leaf can stand in for.

    A parameter beside its leaf is none of those: BERT's head for masked words keeps the bias of
    the linear layer inside it. Should it be used there, the backward pass finds out.
    """
    held = {
        id(parameter)
        for module in model.modules()
        if leaf_type(module) is not None
        for parameter in module.parameters(recurse=False)
    }
    for path, module in model.named_modules():
        label = f"{path or 'the model itself'} ({type(module).__name__})"
        _refuse_statistics(module, label)
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            _refuse_sequence_first(module, label)
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            refuse_hub_layer(path, module, label)
        if any(id(parameter) not in held for parameter in own):
            raise UnsupportedLayer(
                f"{label} has trainable parameters but no tracked form: {REMEDIES}"
            )
        if own and has_hooks(module):
            raise UnsupportedLayer(
                f"{label} has hooks, which a tracked leaf would skip: remove them"
            )


def _refuse_statistics(module: nn.Module, label: str) -> None:
    """Raise UnsupportedLayer for a norm that mixes rows, or keeps what it saw of them unnoised."""
    if not isinstance(module, nn.modules.batchnorm._NormBase):
        return
    if not isinstance(module, nn.modules.instancenorm._InstanceNorm):
        raise UnsupportedLayer(
            f"{label} mixes the rows of a batch, which voids per-example privacy: replace it "
            "by GroupNorm or LayerNorm"
        )
    if module.track_running_stats:
        raise UnsupportedLayer(
            f"{label} keeps running means of the batches, which the model would publish without "
            "noise: build it with track_running_stats=False"
        )


def _refuse_sequence_first(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, label: str
) -> None:
    attention: nn.MultiheadAttention = layer.self_attn
    if not attention.batch_first and any(p.requires_grad for p in layer.parameters()):
        raise UnsupportedLayer(
            f"{label} has batch_first=False, which gives its linear layers time in place of the "
            "rows: build it with batch_first=True"
        )
