"""The noise of K devices' local steps, shaped like their gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from sottovoce.client.fleet import LocalTraining
from sottovoce.client.groups import GroupData
from sottovoce.privacy.mechanisms.noise_streams import NoiseStreams

Tensors = dict[str, Tensor]


class StepNoise:
    """Draws the noise of one step after another.

    `streams`: one for each device, None where there is no noise. `like`: tensors (K, *shape) by
    name. `table`: the one that is cut down, which gets noise in the rows that a device touches
    only; None where it draws its own (`LazyRows`). What a device draws does not depend on the
    others. `lends`: the noise of a device's last step is not drawn but owed.
    """

    def __init__(
        self,
        streams: NoiseStreams | None,
        data: GroupData,
        like: Tensors,
        table: str | None,
        *,
        lends: bool,
    ) -> None:
        self._streams, self._lends = streams, lends and streams is not None
        self._table = table
        self._steps = data.steps - 1 if self._lends else data.steps
        self._touched = data.touched_counts
        self._shapes = {name: tensor.shape for name, tensor in like.items()}
        self._sizes = {n: math.prod(s[1:]) for n, s in self._shapes.items() if n != table}

    def draw(self, number: int, devices: int, deviation: float | Tensor) -> Tensors | None:
        """Noise in step `number` by name (n, *shape): of the first n of `devices`, who draw any.

        None where nobody does. `deviation`: of all devices, or of each (devices,).
        """
        here = int((self._steps[:devices] > number).sum())
        if self._streams is None or not here:
            return None
        own = deviation[:here] if isinstance(deviation, Tensor) else deviation
        sizes = [*self._sizes.values()]
        flat = self._streams.draw([sum(sizes)] * here, own)
        parts = zip(self._sizes, torch.split(flat, sizes, dim=1), strict=True)
        drawn = {name: part.view(here, *self._shapes[name][1:]) for name, part in parts}
        if self._table is not None:
            _, rows, *rest = self._shapes[self._table]
            found = self._streams.draw((self._touched[:here] * math.prod(rest)).tolist(), own)
            if found.shape[1] < rows * math.prod(rest):
                found = pad(found, (0, rows * math.prod(rest) - found.shape[1]))
            drawn[self._table] = found.view(here, rows, *rest)
        return {name: drawn[name] for name in self._shapes}

    def owed(self, training: LocalTraining) -> Tensor | None:
        """(K,) variance of what each device left to draw, in every coordinate of its update."""
        if not self._lends:
            return None
        variance = (training.learning_rate * training.step_deviation) ** 2  # the last weight is 1
        return torch.from_numpy(self._steps >= 0).double() * variance
