"""A pretrained model of `transformers` as its folder has it; frozen, it is shared by all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.models.hub_files import checked_folder, text_extra

POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")


def base_model(path: str, sha256: str | None, *, causal: bool, dropout: float, train: bool) -> Any:
    """The model of `model.path`, its weights in float32.

    `causal`: with its language-model head (AutoModelForCausalLM), else the bare encoder without a
    pooler (AutoModel). `train`: parameters of its own, all trainable; else frozen ones, shared by
    every caller. `dropout`: of hidden states; attention's is 0, for it would depend on the batch.
    Raises ConfigError where files are absent, are not those of `sha256`, or lack weights.
    """
    folder, found = checked_folder(path, sha256)
    base = _loaded(folder, found, causal, dropout)
    shared = () if train else chain(base.parameters(), base.buffers())
    own = copy.deepcopy(base, {id(tensor): tensor for tensor in shared})
    return own.requires_grad_(True) if train else own


@lru_cache(maxsize=2)
def _loaded(folder: Path, sha256: str, causal: bool, dropout: float) -> Any:
    """`sha256` is there to tell folders with new weights apart."""
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    except ImportError:
        raise text_extra(f"model.path={folder}", "transformers") from None
    kind: Any = AutoModelForCausalLM if causal else AutoModel
    with quiet(), torch.random.fork_rng(devices=[]):
        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            set_dropout(config, dropout)
            if config.is_encoder_decoder:
                raise ConfigError("it is an encoder-decoder: give an encoder or a causal model")
            base, report = kind.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True,
                trust_remote_code=False, dtype=torch.float32, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # of many kinds, with texts of many lines
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"model.path={folder} cannot be loaded ({reason})") from error
    if getattr(base, "pooler", None) is not None:
        base.pooler = None  # our heads read the last hidden states
    absent = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if absent:
        raise ConfigError(
            f"model.path={folder} lacks weights of {type(base).__name__} ({absent[0]}, "
            f"{len(absent)} in all): give a model that was pretrained as one"
        )
    return base.requires_grad_(False)


def set_dropout(config: Any, rate: float) -> None:
    """Every dropout of the configuration, under whichever name: `rate`, and 0 inside attention."""
    parts = {id(part): part for part in (config, config.get_text_config())}
    for part in parts.values():
        for name, value in part.to_dict().items():
            if ("drop" in name) and isinstance(value, int | float) and not isinstance(value, bool):
                inside = name.startswith("att") or "layerdrop" in name or "layer_drop" in name
                setattr(part, name, 0.0 if inside else rate)


def longest_row(base: Any) -> int | None:
    """Positions that the model knows; None where it has no bound."""
    most: int | None = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    for table in position_tables(base):
        if most is not None and table.padding_idx is not None:  # RoBERTa counts from there
            most -= table.padding_idx + 1
    return most


def position_tables(base: nn.Module) -> list[nn.Embedding]:
    """The tables of learned positions."""
    return [
        module
        for path, module in base.named_modules()
        if path.rpartition(".")[2] in POSITION_TABLES and isinstance(module, nn.Embedding)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports of loading; what matters of them is checked here."""
    from transformers import utils

    logging: Any = utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
