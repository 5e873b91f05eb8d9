"""The parts of a task's specification, read strictly: task, model, training, promises."""

from __future__ import annotations

import math
from dataclasses import fields as dataclass_fields
from functools import partial
from typing import Any, get_args

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import DataError
from sottovoce.client.example_clipping import ExampleClipping
from sottovoce.client.fleet import DeviceOptimizer, LocalTraining
from sottovoce.client.models import MODELS
from sottovoce.client.strict_fields import Fields
from sottovoce.client.tasks import TASKS
from sottovoce.client.vocabulary import SOURCES
from sottovoce.privacy.gradients.clipping import Mode, Threshold

PRETRAINED = "pretrained"
MODEL_NAMES = (*MODELS, PRETRAINED)

MOST_WORDS = 2_000_000
MOST_LABELS = 100_000
LONGEST_ROW = 8192
LARGEST_SIZE = 1 << 16
MOST_LAYERS = 128
MOST_EXAMPLES = 1 << 24
LARGE = 1e9


def check_task(fields: Fields) -> dict[str, Any]:
    """The task's settings, as they came."""
    fields.one_of("name", tuple(TASKS))
    fields.whole("max_length", 1, LONGEST_ROW)
    schema = fields.part("schema")
    schema.texts("intents", MOST_LABELS)
    schema.texts("slots", MOST_LABELS)
    schema.done()
    _check_vocabulary(fields.part("vocabulary"))
    fields.done()
    return fields.values


def _check_vocabulary(fields: Fields) -> None:
    source = fields.one_of("source", tuple(SOURCES))
    if source == "hash":
        fields.whole("buckets", 1, MOST_EXAMPLES)
    elif source == "file":
        if "/" in fields.text("path") or "\0" in fields.text("path"):
            raise DataError(f"{fields.where}.path must be the name of a file alone")
        fields.text("content", 1 << 26)
    else:
        fields.texts("words", MOST_WORDS, longest=1000)
    fields.done()


def check_model(fields: Fields) -> dict[str, Any]:
    """The model's settings, as they came."""
    if fields.one_of("name", MODEL_NAMES) == PRETRAINED:
        _check_pretrained(fields)
        return fields.values
    sizes = MODELS[fields.values["name"]].sizes
    for size in dataclass_fields(sizes):
        if size.name == "dropout":
            fields.maybe(size.name, lambda name: fields.number(name, 0, 1))
        else:
            most = MOST_LAYERS if size.name in ("layers", "heads") else LARGEST_SIZE
            least = sizes.fewest_layers if size.name == "layers" else 1
            whole = partial(fields.whole, least=least, most=most)
            fields.maybe(size.name, whole)
    fields.done()
    return fields.values


def _check_pretrained(fields: Fields) -> None:
    sha256 = fields.text("sha256", 64)
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise DataError(f"{fields.where}.sha256 must be 64 hexadecimal digits")
    fields.maybe("lora_rank", lambda name: fields.whole(name, 0, 4096))
    fields.maybe("lora_alpha", lambda name: fields.number(name, 0, LARGE))
    fields.maybe("lora_targets", lambda name: fields.texts(name, 100))
    fields.maybe("heads_only", fields.flag)
    fields.maybe("dropout", lambda name: fields.number(name, 0, 1))
    fields.done()


def read_training(fields: Fields) -> LocalTraining:
    """`LocalTraining` of its written fields.

    Raises DataError, also where noised steps are not Poisson sampled or the other way round: the
    rates that an accountant reads would not be those that are run.
    """
    plan = fields.part("plan")
    batches = BatchPlan(
        batch_size=plan.whole("batch_size", 1, MOST_EXAMPLES),
        local_epochs=plan.whole("local_epochs", 1, 10_000),
        max_examples=plan.whole("max_examples", 1, MOST_EXAMPLES),
        poisson=plan.flag("poisson"),
    )
    plan.done()
    found = LocalTraining(
        learning_rate=fields.number("learning_rate", 0, LARGE),
        plan=batches,
        example=fields.maybe("example", lambda name: _example(fields.part(name))),
        update_clip_norm=fields.maybe("update_clip_norm", lambda name: _positive(fields, name)),
        optimizer=_optimizer(fields.part("optimizer")),
    )
    fields.done()
    if batches.poisson != (found.example is not None):
        raise DataError(
            f"{fields.where}: steps with example privacy, and no others, take Poisson batches"
        )
    return found


def _positive(fields: Fields, name: str) -> float:
    value = fields.number(name, 0, LARGE)
    if value <= 0:
        raise DataError(f"{fields.where}.{name}=0 must be above 0")
    return value


def _example(fields: Fields) -> ExampleClipping:
    found = ExampleClipping(
        clip_norm=_positive(fields, "clip_norm"),
        noise_multiplier=fields.number("noise_multiplier", 0, LARGE),
        mode=fields.one_of("mode", get_args(Mode)),  # type: ignore[arg-type]
        threshold=fields.one_of("threshold", get_args(Threshold)),  # type: ignore[arg-type]
        micro_batch_size=fields.number("micro_batch_size", 1, LARGE),
        target_quantile=fields.number("target_quantile", 0, 1),
        quantile_learning_rate=fields.number("quantile_learning_rate", 0, LARGE),
        count_noise=fields.maybe("count_noise", lambda name: fields.number(name, 0, LARGE)),
        noise_decay=fields.number("noise_decay", 1e-9, 1),
        rounds=fields.maybe("rounds", lambda name: fields.whole(name, 1, 1_000_000)),
    )
    fields.done()
    return found


def _optimizer(fields: Fields) -> DeviceOptimizer:
    found = DeviceOptimizer(
        name=fields.one_of("name", ("sgd", "adam")),
        momentum=fields.number("momentum", 0, 1),
        proximal=fields.number("proximal", 0, LARGE),
        weight_decay=fields.number("weight_decay", 0, LARGE),
        beta1=fields.number("beta1", 0, 1),
        beta2=fields.number("beta2", 0, 1),
        eps_floor=fields.maybe("eps_floor", lambda name: fields.number(name, 0, LARGE)),
    )
    fields.done()
    return found


def check_promises(fields: Fields, training: LocalTraining) -> None:
    """Raise DataError unless the promises on privacy are what `training` does."""
    example = fields.maybe("example", fields.part)
    if (example is None) != (training.example is None):
        raise DataError(f"{fields.where}.example is not what specification.training does")
    if example is not None and training.example is not None:
        for name in ("noise_multiplier", "clip_norm"):
            if not math.isclose(example.number(name, 0, LARGE), getattr(training.example, name)):
                raise DataError(f"{example.where}.{name} is not that of specification.training")
        example.done()
    device = fields.maybe("device", fields.part)
    if (device is None) != (training.update_clip_norm is None):
        raise DataError(f"{fields.where}.device is not what specification.training does")
    if device is not None:
        device.number("clip_norm", 0, LARGE)
        device.maybe("noise_multiplier", lambda name: device.number(name, 0, LARGE))
        device.maybe("epsilon", lambda name: device.number(name, 0, LARGE))
        device.done()
    fields.maybe("max_participations", lambda name: fields.whole(name, 1, 1_000_000))
    delta = fields.part("delta")
    for unit in ("device", "example"):
        delta.maybe(unit, lambda name: delta.number(name, 0, 1))
    delta.done()
    fields.done()
