"""The model of a task's specification, built on a device that has weights of its own at most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.models import MODELS, Shape, make_model
from sottovoce.client.models.hub_files import weights_sha256
from sottovoce.client.models.initialise import Unborn
from sottovoce.client.spec_parts import PRETRAINED
from sottovoce.client.tasks import Task

if TYPE_CHECKING:
    from sottovoce.client.task_spec import TaskSpec


class MissingModel(ConfigError):
    """A pretrained model that this device does not have, or cannot run."""


def own_model(spec: TaskSpec, task: Task, models: Path | None) -> nn.Module:
    """The model of `spec` for its `task`; see `TaskSpec.build_model`."""
    name = spec.model["name"]
    sizes = {size: value for size, value in spec.model.items() if size != "name"}
    sizes = {size: value for size, value in sizes.items() if value is not None}
    if name == PRETRAINED:
        sizes["path"] = str(pretrained_folder(models, sizes["sha256"]))
    else:
        model_class = MODELS[name]
        shape = Shape(task.vocabulary.size, task.max_length, task.outputs)
        with Unborn():
            _check(spec, model_class(shape, model_class.sizes(**sizes)))
    model = make_model(name, task, generator=torch.Generator().manual_seed(0), **sizes)
    _check(spec, model)
    return model


def _check(spec: TaskSpec, model: nn.Module) -> None:
    found = [(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
    if found != list(spec.parameters):
        raise DataError(
            f"specification.parameters are not those of model={spec.model['name']} in this version "
            "of sottovoce: update this device or its server"
        )


def pretrained_folder(models: Path | None, sha256: str) -> Path:
    """The folder among `models` whose weights have that SHA-256; MissingModel if there is none."""
    if models is None:
        raise MissingModel("a task needs a pretrained model: start with --models FOLDER")
    for folder in sorted(path for path in models.expanduser().glob("*") if path.is_dir()):
        try:
            if weights_sha256(folder) == sha256:
                return folder
        except (ConfigError, OSError):
            continue
    raise MissingModel(
        f"no folder in {models} has the weights with SHA-256 {sha256[:16]}…: put the pretrained "
        "model of the task there"
    )
