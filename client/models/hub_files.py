"""The files of a pretrained model: a folder, or a name on a hub that becomes one.

Weights are read from safetensors files alone, never from pickles, and no code that comes with a
model is run. Their SHA-256 is part of a run's settings: whoever rebuilds the model later, or on
another machine, gets these weights or an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from sottovoce.client.errors import ConfigError

WEIGHTS, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
WANTED = ["config.json", "model*.safetensors", INDEX, TOKENIZER]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def text_extra(setting: str, library: str) -> ConfigError:
    """What to raise where a library of the `text` extra is absent."""
    return ConfigError(
        f'{setting} needs {library}, which is not installed: pip install "sottovoce[text]"'
    )


def model_folder(path: str) -> Path:
    """The folder of `model.path`: as given, or a hub's files in the cache.

    A name (`org/name`) is looked up on the hub, or in the cache where HF_HUB_OFFLINE=1. Raises
    ConfigError where there is no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(path):
        raise ConfigError(
            f"model.path={path} is no folder: give one that save_pretrained() wrote, or a name on "
            "the hub (org/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise text_extra(f"model.path={path}", "huggingface_hub") from None
    try:
        return Path(snapshot_download(path, allow_patterns=WANTED))
    except Exception as error:  # network, cache and hub have errors of their own
        raise ConfigError(
            f"model.path={path} is no folder and cannot be had from the hub "
            f"({type(error).__name__}): check name and network, or give a folder"
        ) from error


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json of `model.path`; ConfigError where it has none."""
    file = model_folder(path) / TOKENIZER
    if not file.is_file():
        raise ConfigError(
            f"model.path={path} has no {TOKENIZER}: save the tokenizer there "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(…)), or set task.vocabulary.path"
        )
    return file


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, in the order of their names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        shards = json.loads((folder / INDEX).read_bytes())["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    except FileNotFoundError:
        raise ConfigError(
            f"model.path={folder} has no {WEIGHTS}: save the model with save_pretrained(); "
            "pickled weights are not read"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder / INDEX} is malformed: take model.path's files anew") from None
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ConfigError(f"model.path={folder} lacks {absent[0]}: take model.path's files anew")
    return files


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights file; of sharded weights, that of the lines "SHA-256  file name"."""
    files = weight_files(folder)
    if len(files) == 1 and files[0].name == WEIGHTS:
        return _sha256(files[0])
    lines = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def checked_folder(path: str, sha256: str | None) -> tuple[Path, str]:
    """The folder of `model.path` and its weights' SHA-256; ConfigError where another is wanted."""
    folder = model_folder(path)
    found = weights_sha256(folder)
    if sha256 is not None and found != sha256:
        raise ConfigError(
            f"model.path={path} has other weights (SHA-256 {found[:16]}…) than those of "
            f"model.sha256 ({sha256[:16]}…): give the model that the run began with"
        )
    return folder, found


def _sha256(file: Path) -> str:
    status = file.stat()
    return _digest(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed_ns: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
