"""Folders as `save_pretrained` writes them, of models so small that a test can train them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = (
    "play some jazz in the kitchen set a timer for ten minutes what is the weather like tomorrow "
    "turn on the lights call mum remind me to buy milk add this song to my playlist please hey"
)
FRAME = {"[CLS]": 2, "[SEP]": 3}
END = "<|endoftext|>"


def encoder_folder(folder: Path, kind: str = "Bert", **changes: Any) -> Path:
    """An encoder of two layers and its WordPiece tokenizer; every dropout is 0.1."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["[PAD]", "[UNK]", *FRAME]
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=specials, show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"),
    )  # fmt: skip
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=list(FRAME.items())
    )
    settings = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 40, "max_position_embeddings": 40,
        "pad_token_id": 0, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    } | changes  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings)
    return _saved(folder, getattr(transformers, f"{kind}Model")(config), tokenizer)


def causal_folder(folder: Path, kind: str = "GPT2", **changes: Any) -> Path:
    """A causal model of two layers and its byte-level tokenizer."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([WORDS], trainer)
    settings = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 40, "max_position_embeddings": 40,
        "bos_token_id": 0, "eos_token_id": 0,
    } | changes  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings)
    name = f"{kind}{'LMHeadModel' if kind in ('GPT2', 'Bert') else 'ForCausalLM'}"
    return _saved(folder, getattr(transformers, name)(config), tokenizer)


def _saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    """The weights are drawn anew, far enough from zero for every part to matter."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
