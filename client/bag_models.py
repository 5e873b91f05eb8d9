"""Which models are a bag of words with linear layers behind it, as `BagTrainer` trains them.

Not the class of a model decides but what its `forward` does: it is traced (torch.fx), and every
operation must be one of

    words -> EmbeddingBag (sum or mean) -> [Linear -> ReLU] any number of times -> Linear -> intent
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sottovoce.client.fleet import LocalTraining
from sottovoce.client.tables import sparse_table
from sottovoce.client.tasks import IntentSlots, Task

RELUS = (F.relu, torch.relu, torch.relu_)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class BagModel:
    """A traced model. `table`: name of the words' parameter. `padding`: the word that counts as
    none, or None. `mean`: whether a bag is its words' mean, else their sum. `layers`: names of each
    linear layer's weight and bias (None without one), from the words on.
    """

    table: str
    padding: int | None
    mean: bool
    layers: tuple[tuple[str, str | None], ...]

    @property
    def names(self) -> list[str]:
        """All parameters."""
        return [self.table, *(name for pair in self.layers for name in pair if name is not None)]


def bag_model(model: nn.Module, task: Task, training: LocalTraining) -> BagModel | None:
    """What `model` is, where all of it can be trained so; else None."""
    if not any(type(module) is nn.EmbeddingBag for module in model.modules()):
        return None
    if not (_plain_task(task) and plain_training(training) and _plain_parameters(model)):
        return None
    found = _traced(model)
    if found is None or sparse_table(model, training) != (found.table, "tokens"):
        return None
    named = [name for name, _ in model.named_parameters()]  # a shared one has one name
    return found if sorted(named) == sorted(found.names) else None


def plain_training(training: LocalTraining) -> bool:
    """Whether steps are those of plain SGD, of examples that are clipped one by one if at all."""
    example = training.example
    if not training.plain:
        return False
    return example is None or (
        example.mode == "per_example" and example.threshold in ("fixed", "automatic")
    )


def _plain_task(task: Task) -> bool:
    """Whether a row's loss is the cross-entropy of its intent, and nothing else."""
    kind = type(task)
    return (
        isinstance(task, IntentSlots) and kind.row_losses is IntentSlots.row_losses
        and kind.losses is Task.losses and [output.name for output in task.outputs] == ["intent"]
    )


def _plain_parameters(model: nn.Module) -> bool:
    hooked = any(getattr(m, name, None) for m in model.modules() for name in HOOKS)
    return not hooked and all(
        p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu"
        for p in model.parameters()
    )


def _traced(model: nn.Module) -> BagModel | None:
    if "forward" in vars(model):  # which a trace would pass over
        return None
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # whatever a forward that looks at its values may raise
        return None
    layers: list[tuple[str, str | None]] = []
    modules, bag, place = dict(model.named_modules()), None, "start"
    before: fx.Node | None = None
    for node in graph.nodes:
        kind = None if node.op == "placeholder" else _kind(node, modules)
        if kind == "tokens" and not node.users:
            continue  # another entry of the batch, which nobody looks at
        if node.op == "placeholder" and place == "start":
            place = "batch"
        elif kind == "tokens" and place == "batch" and node.args == (before, "tokens"):
            place = "words"
        elif kind == "bag" and place == "words" and _only(node, before):
            bag, place = node.target, "features"
        elif kind == "linear" and place == "features" and _only(node, before):
            bias = modules[node.target].bias is not None
            layers.append((f"{node.target}.weight", f"{node.target}.bias" if bias else None))
            place = "outputs"
        elif kind == "relu" and place == "outputs" and _relu(node, before):
            place = "features"
        elif kind == "same" and _only(node, before):
            pass
        elif node.op == "output" and place == "outputs" and node.args == ({"intent": before},):
            place = "end"
        else:
            return None
        before = node
    if place != "end" or bag is None:
        return None
    own = modules[bag]
    return BagModel(f"{bag}.weight", own.padding_idx, own.mode == "mean", tuple(layers))


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """What a node of the graph does: the sort of operation, or None for any other."""
    if node.op == "call_function":
        return "relu" if node.target in RELUS else (
            "tokens" if node.target is operator.getitem else None)
    if node.op == "call_method":
        return "relu" if node.target in ("relu", "relu_") else None
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if module is None or "forward" in vars(module):
        return None
    if type(module) is nn.EmbeddingBag:
        known = module.mode in ("sum", "mean") and module.max_norm is None
        return "bag" if known and not module.scale_grad_by_freq else None
    if type(module) is nn.Dropout:
        return "same" if module.p == 0 else None
    return {nn.Linear: "linear", nn.ReLU: "relu", nn.Identity: "same"}.get(type(module))


def _only(node: fx.Node, before: Any) -> bool:
    return node.args == (before,) and not node.kwargs


def _relu(node: fx.Node, before: Any) -> bool:
    return node.args == (before,) and set(node.kwargs) <= {"inplace"}


def shapes(found: BagModel, parameters: dict[str, Tensor]) -> list[int]:
    """Widths: of words, of hidden layers, of the classes."""
    return [parameters[found.table].shape[1], *(parameters[w].shape[0] for w, _ in found.layers)]
