"""Evaluation of the global model on devices and examples that never train.

Beside the mean over examples there is the distribution over held-out devices, each with a metric of
its own: a model may serve most people well and some badly. Both come from one pass. The devices are
the same at every evaluation, the first `run.evaluation_devices` of those held out, so that rounds
differ by the model alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.errors import DataError
from sottovoce.client.examples import Examples
from sottovoce.client.tasks import Task
from sottovoce.client.tasks.base import Measured
from sottovoce.simulations.population import Population
from sottovoce.strategies.levels import activity_levels

SUFFIX = "_held_out_examples"
TENTH = 0.1


class Evaluator:
    """Metrics on held-out devices, and on held-out examples (suffix `_held_out_examples`).

    The leading metric also by device: its median, what a tenth of the devices do not reach
    (`_p10`), the mean of the worst tenth (`_worst_decile`), and the mean at each activity level
    (`_by_level`), e.g. `accuracy_worst_decile`.

    Where a population has no held-out devices, the held-out examples lead, without suffix. The
    examples are gathered once; `devices` bounds how many devices, and `examples` how many examples.
    `private`: nothing is measured on examples of devices that train.
    """

    def __init__(
        self, population: Population, task: Task, model: nn.Module, *, devices: int, examples: int,
        private: bool = False,
    ) -> None:
        self.task, self.model = task, model
        self.sets: dict[str, Examples] = {}
        self.levels: NDArray[np.uint8] | None = None
        if population.held_out:
            self.sets[""] = population.held_out_devices(devices)
            self.levels = activity_levels(np.maximum(population.held_out_activity(devices), 1))
        others = None if private else population.held_out_examples(examples)
        if others is not None and len(others):
            self.sets[SUFFIX if self.sets else ""] = others
        if not self.sets and private:
            raise DataError(
                f"population {population.name!r} has no held-out devices, and with "
                "privacy.device.private_metrics=true no others are evaluated on: set "
                "population.held_out_devices or held_out_fraction, as it has them"
            )
        if not self.sets:
            raise DataError(
                f"population {population.name!r} has nothing to evaluate on: set "
                "population.held_out_devices, held_out_fraction or test_path, as it has them"
            )

    def __call__(self, parameters: dict[str, Tensor]) -> dict[str, Any]:
        """Metrics of the model with these parameters, by name; `_by_level` ones as mappings."""
        load_parameters(self.model, parameters)
        found: dict[str, Any] = {}
        for suffix, examples in self.sets.items():
            measured = self.task.measure(self.model, examples)
            found |= {name + suffix: value for name, value in measured.metrics.items()}
            if self.levels is not None and suffix == "":
                found |= device_metrics(self.task, measured, examples, self.levels)
        return found


def device_metrics(
    task: Task, measured: Measured, examples: Examples, levels: NDArray[np.uint8]
) -> dict[str, Any]:
    """The distribution of the leading metric over the devices of `examples`.

    `levels`: (devices,). Devices without examples are left out; a worst tenth has at least one.
    """
    own, known = by_device(task, measured, examples)
    levels = levels[known]
    order = np.sort(own) if task.higher_is_better else -np.sort(-own)
    tail = order[: max(1, round(TENTH * len(order)))]
    tenth = TENTH if task.higher_is_better else 1 - TENTH
    name = task.headline
    return {
        f"{name}_median": float(np.median(own)),
        f"{name}_p10": float(np.quantile(own, tenth)),
        f"{name}_worst_decile": float(tail.mean()),
        f"{name}_by_level": {
            str(level): float(own[levels == level].mean()) for level in np.unique(levels).tolist()
        },
    }


def by_device(
    task: Task, measured: Measured, examples: Examples
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The leading metric of every device with examples, and (devices,) which those are."""
    counts = np.diff(examples.device_offsets)
    device = np.repeat(np.arange(len(counts)), counts)
    score = np.bincount(device, measured.score, len(counts)).astype(np.float64)
    weight = np.bincount(device, measured.weight, len(counts)).astype(np.float64)
    known = weight > 0
    return task.headline_of(score[known], weight[known]), known


def load_parameters(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """The model with its trainable parameters replaced, in place."""
    known = dict(model.named_parameters())
    for name, tensor in parameters.items():
        known[name].data = tensor.detach().clone()
    return model
