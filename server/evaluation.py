"""Evaluation of the global model on devices and examples that never train."""

from __future__ import annotations

from torch import Tensor, nn

from sottovoce.client.errors import DataError
from sottovoce.client.examples import Examples
from sottovoce.client.tasks import Task
from sottovoce.simulations.population import Population

SUFFIX = "_held_out_examples"


class Evaluator:
    """Metrics on held-out devices, and on held-out examples (suffix `_held_out_examples`).

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
        if population.held_out:
            self.sets[""] = population.held_out_devices(devices)
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

    def __call__(self, parameters: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of the model with these parameters, by name."""
        load_parameters(self.model, parameters)
        return {
            name + suffix: value
            for suffix, examples in self.sets.items()
            for name, value in self.task.evaluate(self.model, examples).items()
        }


def load_parameters(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """The model with its trainable parameters replaced, in place."""
    known = dict(model.named_parameters())
    for name, tensor in parameters.items():
        known[name].data = tensor.detach().clone()
    return model
