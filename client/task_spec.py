"""What a run asks of a device, in one blob: task, model, local training, and what is promised.

The specification travels once for a run and is named by its SHA-256. It holds settings and public
tables (vocabulary, label sets), never weights and never code: task and model are those that this
package knows by name, a pretrained base is one that the device has already, found by the SHA-256 of
its weights. Reading it is strict: a server's mistake or malice ends in a DataError, not in memory
or time without bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Schema
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.spec_parts import (
    MODEL_NAMES,
    check_model,
    check_promises,
    check_task,
    read_training,
)
from sottovoce.client.strict_fields import Fields, read_json
from sottovoce.client.tasks import Task, make_task
from sottovoce.client.vocabulary import Vocabulary

if TYPE_CHECKING:
    from sottovoce.simulations.experiment import Experiment

SPEC_BYTES = 16 << 20  # a large tokenizer, and room
MOST_ROUNDS = 1_000_000
MOST_TENSORS = 4096
MOST_VALUES = 1 << 32  # of all tensors together: a policy bounds them closer
MOST_AXES = 8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TaskSpec:
    """A run as its devices see it.

    `task`: name, vocabulary (`Vocabulary.to_json`), schema (`intents`, `slots`), max_length.
    `model`: name and sizes; of a pretrained one `sha256`, not its path. `training`: the fields of
    `LocalTraining`. `privacy`: what holds for the run: `example` and `device` (None where a layer
    is off), `max_participations`, `delta`. `parameters`: name and shape of all that trains, in the
    order of the model. `reports_clipped`: whether a device says if its update was clipped.
    """

    run: str
    rounds: int
    task: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]
    privacy: dict[str, Any]
    parameters: tuple[tuple[str, Shape], ...]
    reports_clipped: bool = False

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal specifications have equal bytes."""
        return json.dumps(
            asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> TaskSpec:
        """The specification in `data`.

        Raises DataError for unknown entries, wrong types, absurd sizes, and for promises on privacy
        that are not what `training` does.
        """
        fields = Fields(read_json(data, "the task's specification", SPEC_BYTES), "specification")
        found = cls(
            run=fields.text("run"),
            rounds=fields.whole("rounds", 1, MOST_ROUNDS),
            task=check_task(fields.part("task")),
            model=check_model(fields.part("model")),
            training=fields.part("training").values,
            privacy=fields.part("privacy").values,
            parameters=_parameters(fields),
            reports_clipped=fields.flag("reports_clipped"),
        )
        fields.done()
        training = found.local_training()
        check_promises(fields.part("privacy"), training)
        if found.reports_clipped and (training.example is not None or not found.clips):
            raise DataError(
                "specification.reports_clipped asks for a bit on examples that the noise on the "
                "device does not cover"
            )
        return found

    @property
    def model_bytes(self) -> int:
        """Bytes of all that trains, in float32."""
        return 4 * sum(math.prod(shape) for _, shape in self.parameters)

    @property
    def clips(self) -> bool:
        """Whether updates are clipped for a claim on whole devices."""
        return self.training.get("update_clip_norm") is not None

    def build_task(self, words: Sequence[str] = ()) -> Task:
        """The task over a device's own word table. Raises DataError, ConfigError."""
        schema = self.task["schema"]
        return make_task(
            self.task["name"],
            vocabulary=Vocabulary.from_json(self.task["vocabulary"]),
            schema=Schema(tuple(schema["intents"]), tuple(schema["slots"])),
            words=words,
            max_length=self.task["max_length"],
        )

    def build_model(self, models: Path | None = None, task: Task | None = None) -> nn.Module:
        """The model, its weights arbitrary but for a pretrained base from the folder `models`.

        Raises DataError where what trains is not `parameters`, before anything of that size is
        allocated; ConfigError for a model that this device does not have or know.
        """
        from sottovoce.client.spec_models import own_model

        return own_model(self, self.build_task() if task is None else task, models)

    def local_training(self) -> LocalTraining:
        """What a device does with its examples. Raises DataError, ConfigError."""
        return read_training(Fields(self.training, "specification.training"))


def _parameters(fields: Fields) -> tuple[tuple[str, Shape], ...]:
    listed = fields.take("parameters")
    if not isinstance(listed, list) or not 0 < len(listed) <= MOST_TENSORS:
        raise DataError(f"specification.parameters must be a list of 1 to {MOST_TENSORS} tensors")
    found = tuple(_parameter(entry) for entry in listed)
    if len({name for name, _ in found}) < len(found):
        raise DataError("specification.parameters names a tensor twice")
    if sum(math.prod(shape) for _, shape in found) > MOST_VALUES:
        raise DataError(f"specification.parameters has more than {MOST_VALUES} values")
    return found


def _parameter(entry: Any) -> tuple[str, Shape]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise DataError("specification.parameters must hold pairs of name and shape")
    name, shape = entry
    if not isinstance(name, str) or not 0 < len(name) <= 300:
        raise DataError("specification.parameters has a tensor without a usable name")
    if not isinstance(shape, list) or len(shape) > MOST_AXES:
        raise DataError(f"specification.parameters: {name} has no usable shape")
    for side in shape:
        if isinstance(side, bool) or not isinstance(side, int) or not 0 < side <= MOST_VALUES:
            raise DataError(f"specification.parameters: {name} has no usable shape")
    return name, tuple(shape)


def task_spec(experiment: Experiment, run: str) -> TaskSpec:
    """The specification of a run with the settings of `experiment`.

    Raises ConfigError for settings that real devices cannot follow.
    """
    from sottovoce.simulations.experiment import public_deltas

    config, training = experiment.config, experiment.training
    _check_for_devices(experiment)
    schema, model = experiment.population.schema, experiment.initial_model()
    device, example = config.privacy.device, config.privacy.example
    bounds = [layer.get("max_participations") for layer in (device, example) if layer.enabled]
    found = TaskSpec(
        run=run,
        rounds=int(config.rounds),
        task={
            "name": experiment.task.name,
            "vocabulary": experiment.vocabulary.to_json(),
            "schema": {"intents": list(schema.intents), "slots": list(schema.slots)},
            "max_length": experiment.task.max_length,
        },
        model=_model_settings(config.model),
        training=written_training(training),
        privacy={
            "example": None if training.example is None else {
                "noise_multiplier": training.example.noise_multiplier,
                "clip_norm": training.example.clip_norm,
            },
            "device": None if not device.enabled else {
                "noise_multiplier": device.get("noise_multiplier"),
                "clip_norm": training.update_clip_norm,
                "epsilon": device.get("epsilon"),
            },
            "max_participations": min((b for b in bounds if b is not None), default=None),
            "delta": public_deltas(config, len(experiment.population)),
        },
        parameters=tuple(
            (name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad
        ),
        reports_clipped=bool(device.enabled and device.get("clipping") == "adaptive"),
    )  # fmt: skip
    size = len(found.to_bytes())
    if size > SPEC_BYTES:
        raise ConfigError(
            f"vocabulary and label sets take {size} bytes: devices read at most {SPEC_BYTES}; use "
            "task.vocabulary.source=hash or a smaller file"
        )
    return found


def written_training(training: LocalTraining) -> dict[str, Any]:
    """The fields of `training` but its figures' bounds: a device reports none."""
    values = asdict(training)
    del values["metric_bounds"]
    return values


def _model_settings(settings: Any) -> dict[str, Any]:
    """Name and sizes that are set; of a pretrained model never where its files lie."""
    kept = {name: value for name, value in settings.items() if value is not None and name != "path"}
    return {name: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
            for name, v in kept.items()}


def _check_for_devices(experiment: Experiment) -> None:
    config = experiment.config
    if config.privacy.example.get("engine", "grouped") != "grouped":
        raise ConfigError(
            "privacy.example.engine=opacus is for simulation: devices do without Opacus; use "
            "grouped"
        )
    if config.model.name not in MODEL_NAMES:
        raise ConfigError(f"model={config.model.name} is not known to devices")
    if config.model.name == "pretrained" and config.model.get("sha256") is None:
        raise ConfigError(
            "model.sha256 is missing: devices find a pretrained model by the SHA-256 of its weights"
        )
