"""Which embedding table can be cut down to the rows that a device's text touches."""

from __future__ import annotations

from torch import nn

from sottovoce.client.fleet import LocalTraining


def sparse_table(model: nn.Module, training: LocalTraining) -> tuple[str | None, str | None]:
    """Name of the token embedding's parameter and of the batch entry that feeds it.

    (None, None) when the model names none, when its table is frozen or shared with another layer,
    which would see the cut, when another row than 0, which alone keeps its number, stands for
    padding, or when `training` moves rows that the text does not touch.
    """
    inputs: dict[str, str] = getattr(model, "sparse_inputs", {})
    for module, entry in inputs.items() if training.keeps_untouched_rows else ():
        layer = model.get_submodule(module)
        weight = layer.weight
        users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
        renumbered = getattr(layer, "padding_idx", None) not in (None, 0)
        if not isinstance(weight, nn.Parameter) or renumbered:
            continue
        if weight.requires_grad and len(users) == 1:
            return f"{module}.weight", entry
    return None, None
