"""Low-rank adapters: Hu et al. 2021, arXiv:2106.09685, by `peft`.

A frozen matrix W acts as W + (alpha / rank) B A; A is drawn, B begins at zero, so that an adapted
model first computes what the pretrained one does. Only A and B train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.models.hub_files import text_extra

# Queries and values (as in the paper), as architectures call them; else all that is fused.
USUAL_TARGETS = (
    ("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("query_proj", "value_proj"),
    ("q", "v"), ("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",),
)  # fmt: skip


def add_adapters(
    base: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None,
    dropout: float,
    generator: torch.Generator,
) -> None:
    """Put adapters on the layers called `targets`, in place, and let nothing else of `base` train.

    `targets`: last parts of layers' names; None takes queries and values. `generator` draws A:
    uniform within 1/sqrt(inputs), as peft does. Raises ConfigError where no layer is so called.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise text_extra(f"model.lora_rank={rank}", "peft") from None
    names = list(targets) if targets is not None else usual_targets(base)
    kinds = {type(m).__name__ for n, m in base.named_modules() if n.rpartition(".")[2] in names}
    settings: Any = LoraConfig(
        r=rank, target_modules=names, lora_dropout=dropout, fan_in_fan_out=kinds == {"Conv1D"}
    )
    settings.lora_alpha = alpha  # which peft declares to be whole, and does not ask to be
    try:
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(settings, base)
    except ValueError as error:
        raise ConfigError(
            f"model.lora_targets={names} cannot be adapted ({str(error).split('. ')[0]}): name "
            "linear layers of the model"
        ) from None
    _begin(base, generator)


def usual_targets(base: nn.Module) -> list[str]:
    """The names under which `base` keeps its queries and values; ConfigError if unknown."""
    present = {
        path.rpartition(".")[2]
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    for names in USUAL_TARGETS:
        if present.issuperset(names):
            return list(names)
    raise ConfigError(
        f"model.lora_targets is not known for {type(base).__name__}: name linear layers, as in "
        f"model.lora_targets=[{','.join(sorted(present)[:2])}]"
    )


def _begin(base: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_A" in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.uniform_(-bound, bound, generator=generator)
