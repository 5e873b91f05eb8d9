"""Models. A new one, small enough for a device, is a class and a line in `MODELS`.

Pretrained ones of `transformers` are one more: `pretrained`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.models.bag import Bag
from sottovoce.client.models.base import Shape, TextModel
from sottovoce.client.models.bilstm import BiLSTM
from sottovoce.client.models.causal_transformer import CausalTransformer
from sottovoce.client.models.fine_tuning import make_pretrained
from sottovoce.client.models.initialise import Unborn, initialise
from sottovoce.client.models.lstm import LSTM
from sottovoce.client.models.pretrained import Pretrained
from sottovoce.client.models.transformer import Transformer
from sottovoce.client.tasks import TASKS, Task

__all__ = ["MODELS", "Shape", "TextModel", "initialise", "make_model"]

MODELS: dict[str, type[TextModel]] = {
    model.name: model for model in (BiLSTM, Transformer, LSTM, CausalTransformer, Bag)
}


def make_model(name: str, task: Task, *, generator: torch.Generator, **sizes: Any) -> nn.Module:
    """The model called `name`, with the logits that `task` wants, its weights from `generator`.

    `pretrained` brings its weights; `generator` draws what is new. A size that is None takes the
    model's default. Raises ConfigError when there is no such model, it does not fit the task, or
    it has no such size.
    """
    given = {size: value for size, value in sizes.items() if value is not None}
    if name == Pretrained.name:
        return make_pretrained(task, generator=generator, **given)
    model_class = _fitting(name, task)
    known = {field.name for field in fields(model_class.sizes)}
    for size in given.keys() - known:
        raise ConfigError(
            f"model={name} has no model.{size}={given[size]}: it takes {', '.join(sorted(known))}"
        )
    shape = Shape(task.vocabulary.size, task.max_length, task.outputs)
    with Unborn():  # torch's own first weights would come from the global generator
        model = model_class(shape, model_class.sizes(**given))
    with_memory: Any = model._apply
    with_memory(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    initialise(model, generator=generator)
    return model


def _fitting(name: str, task: Task) -> type[TextModel]:
    if name not in MODELS:
        known = ", ".join([*MODELS, Pretrained.name])
        raise ConfigError(f"model={name} does not exist: choose one of {known}")
    model = MODELS[name]
    if model.causal != task.causal:
        tasks = [other for other, kind in TASKS.items() if kind.causal == model.causal]
        models = [other for other, kind in MODELS.items() if kind.causal == task.causal]
        raise ConfigError(
            f"model={name} is for {' or '.join(tasks)}; for {task.name} use {' or '.join(models)}"
        )
    return model
