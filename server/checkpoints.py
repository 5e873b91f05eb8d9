"""Checkpoints: everything a stopped run needs to go on as if it had never stopped.

A checkpoint is a folder `round-000012` with tensors, ledger and a `state.json` that holds the
SHA-256 of every other file. It is written beside its place and renamed into it, so that a killed
process leaves a whole checkpoint or none; one that was damaged later fails its sums, and the one
before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sottovoce.client.errors import RunError
from sottovoce.privacy.accounting.ledger import Ledger

Tensors = dict[str, Tensor]

DRAFTS = (".round-*", *(f".*.{kind}.*" for kind in ("json", "jsonl", "yaml", "safetensors")))


@dataclass
class RunState:
    """What changes from round to round. `round` is the last finished one; 0 before training."""

    round: int
    parameters: Tensors
    optimizer: Tensors = field(default_factory=dict)
    participation: Tensors = field(default_factory=dict)
    mechanism: Tensors = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)


def save_checkpoint(folder: Path, state: RunState, keep: int) -> Path:
    """Write a checkpoint under `folder`; of the older ones keep the first and the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"round-{state.round:06d}"
    parts = {
        "model.safetensors": save(_contiguous(state.parameters)),
        "optimizer.safetensors": save(_contiguous(state.optimizer)),
        "participation.safetensors": save(_contiguous(state.participation)),
        "mechanism.safetensors": save(_contiguous(state.mechanism)),
        "ledger.json": json.dumps(state.ledger.to_json()).encode(),
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    head = {"round": state.round, "parameters": list(state.parameters), "sha256": sums}
    parts["state.json"] = json.dumps(head, indent=1).encode()
    draft = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name, data in parts.items():
        write_synced(draft / name, data)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(draft, target)
    _sync_folder(folder)
    for old in list(_finished(folder))[keep:]:
        if not old.name.endswith("-000000"):
            shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> RunState:
    """Read one checkpoint; RunError names the file that is missing or damaged."""
    try:
        return _state(path, json.loads((path / "state.json").read_bytes()))
    except RunError:
        raise
    except OSError as error:
        name = Path(error.filename or path).name
        reason = f"{name}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise RunError(f"checkpoint {path.name} cannot be read ({reason})")


def _state(path: Path, head: dict[str, Any]) -> RunState:
    parts = {name: (path / name).read_bytes() for name in head["sha256"]}
    for name, data in parts.items():
        if hashlib.sha256(data).hexdigest() != head["sha256"][name]:
            raise RunError(f"checkpoint {path.name} is damaged: {name} does not match its checksum")
    parameters = load(parts["model.safetensors"])
    return RunState(
        round=int(head["round"]),
        parameters={name: parameters[name] for name in head["parameters"]},  # the model's order
        optimizer=load(parts["optimizer.safetensors"]),
        participation=load(parts["participation.safetensors"]),
        mechanism=load(parts.get("mechanism.safetensors", save({}))),  # older ones have none
        ledger=Ledger.from_json(json.loads(parts["ledger.json"])),
    )


def load_latest(folder: Path) -> tuple[RunState, list[str]]:
    """The newest whole checkpoint under `folder`, and a line for each damaged one passed over."""
    complaints: list[str] = []
    for path in _finished(folder):
        try:
            return load_checkpoint(path), complaints
        except RunError as error:
            complaints.append(f"{error}; taking the one before")
    raise RunError(
        f"{folder.parent} has no whole checkpoint to resume from"
        + (f" ({complaints[0].split(';')[0]})" if complaints else "")
        + ": start a new run"
    )


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and force it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, never half."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    write_synced(draft, data)
    os.replace(draft, path)


def discard_drafts(folder: Path) -> None:
    """Remove from `folder` what a killed process was about to put in place."""
    for pattern in DRAFTS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _finished(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("round-*"), reverse=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _contiguous(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
