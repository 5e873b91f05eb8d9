"""Layers of `transformers` and `peft` that are their own classes, by name.

A class is known by its name and by the package that it comes from, so that neither package is
imported for models that do not use it. Names stand for a formula: each is compared with the
package's own class in the tests.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.convolution import TrackedConv1D
from sottovoce.privacy.layers.linear import Leaf, TrackedEmbedding
from sottovoce.privacy.layers.normalisation import (
    TrackedGemmaRMSNorm,
    TrackedHubRMSNorm,
    TrackedLateRMSNorm,
    TrackedT5LayerNorm,
)


class TrackedScaledEmbedding(TrackedEmbedding):
    """A word embedding times a constant: Gemma's, in the table's type, and BART's."""

    def __init__(self, layer: Any, tape: Tape, names: dict[str, str]) -> None:
        super().__init__(layer, tape, names)
        scale = layer.embed_scale
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale

    def forward(self, index: Tensor) -> Tensor:
        scale = self.embed_scale
        factor = scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale
        return super().forward(index) * factor


HUB: dict[str, type[Leaf]] = {
    "Conv1D": TrackedConv1D,
    **dict.fromkeys(
        (
            "GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding",
            "Gemma3TextScaledWordEmbedding", "VaultGemmaTextScaledWordEmbedding",
            "BartScaledWordEmbedding", "MBartScaledWordEmbedding",
        ),
        TrackedScaledEmbedding,
    ),
    "T5LayerNorm": TrackedT5LayerNorm,
    "MT5LayerNorm": TrackedT5LayerNorm,
    "UMT5LayerNorm": TrackedT5LayerNorm,
    "LongT5LayerNorm": TrackedT5LayerNorm,
    **dict.fromkeys(
        (
            "GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "VaultGemmaRMSNorm",
            "RecurrentGemmaRMSNorm", "T5GemmaRMSNorm", "Qwen3NextRMSNorm",
        ),
        TrackedGemmaRMSNorm,
    ),
    **dict.fromkeys(("Olmo2RMSNorm", "Olmo3RMSNorm", "GptOssRMSNorm"), TrackedLateRMSNorm),
    **dict.fromkeys(
        (
            "LlamaRMSNorm", "MistralRMSNorm", "MinistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm",
            "Qwen2RMSNorm", "Qwen2MoeRMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm", "SmolLM3RMSNorm",
            "GraniteRMSNorm", "GlmRMSNorm", "Glm4RMSNorm", "OlmoeRMSNorm",
            "DeepseekV2RMSNorm", "DeepseekV3RMSNorm", "EuroBertRMSNorm", "ArceeRMSNorm",
            "ApertusRMSNorm", "Exaone4RMSNorm", "Lfm2RMSNorm",
        ),
        TrackedHubRMSNorm,
    ),
}


def hub_leaf(module: nn.Module) -> type[Leaf] | None:
    """The tracked form of a layer of `transformers`, or None where there is none."""
    kind = type(module)
    return HUB.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


def refuse_hub_layer(path: str, module: nn.Module, label: str) -> None:
    """Raise UnsupportedLayer where a trainable layer's use, not its kind, has no per-row form."""
    if path.rpartition(".")[2] == "relative_attention_bias" and isinstance(module, nn.Embedding):
        raise UnsupportedLayer(
            f"{label} is one table for all rows, added to every row's attention: freeze it "
            "(requires_grad_(False))"
        )
    if "lora_embedding" in path:
        raise UnsupportedLayer(
            f"{label} holds LoRA's matrices of an embedding as raw parameters: leave embeddings "
            "out of target_modules, or train them whole with modules_to_save"
        )
