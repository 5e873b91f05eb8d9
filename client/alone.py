"""Local training of one device after another by plain autograd, where no examples are clipped.

No row's gradient is looked at, so any model will do, torch's fused kernels (its LSTM and GRU among
them) are used as they are, and one device's weights stay in the processor's cache. All devices'
weights lie in one stack, which a device's steps move in place.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.descents import finished
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.groups import DeviceNoise, GroupData, LocalUpdates, shortened
from sottovoce.client.tables import sparse_table
from sottovoce.client.tasks import Task

Tensors = dict[str, Tensor]


class LoneTrainer:
    """Trains the devices of a group by plain SGD, one after another.

    `table`: name of the embedding parameter that is cut down to a device's own rows, or None;
    `table_input`: the batch entry that feeds it. Frozen parameters and buffers are the model's
    own. Raises ValueError where examples are clipped or the optimiser is another.
    """

    def __init__(self, model: nn.Module, task: Task, training: LocalTraining) -> None:
        if training.example is not None or not training.plain:
            raise ValueError("LoneTrainer takes plain SGD without example privacy alone")
        self.task, self.training = task, training
        shared = (*(p for p in model.parameters() if not p.requires_grad), *model.buffers())
        memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
        self.module = copy.deepcopy(model, memo).train()
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.table, self.table_input = sparse_table(model, training)

    def train(
        self, parameters: Tensors, data: GroupData, server_round: int, noise: DeviceNoise
    ) -> LocalUpdates:
        """As `GroupTrainer.train`; there is no noise."""
        devices = len(data.steps)
        origin = {
            name: F.embedding(torch.from_numpy(data.touched), parameters[name])
            if name == self.table
            else parameters[name].expand(devices, *parameters[name].shape)
            for name in self.parameters
        }
        weights = {name: start.clone() for name, start in origin.items()}
        losses = torch.zeros(devices, dtype=torch.float64)
        visits = np.zeros(devices, dtype=np.int64)
        null = len(data.batch["lengths"]) - 1
        for k in range(devices):
            for name, parameter in self.parameters.items():
                own = weights[name][k]
                parameter.data = own[: data.touched_counts[k]] if name == self.table else own
            steps = [rows[k] for rows in data.rows[: data.steps[k]]]
            found = [self._step(data, rows[rows != null]) for rows in steps]
            visits[k] = sum(len(each) for each in found)
            losses[k] = torch.cat(found).double().nan_to_num().sum() if visits[k] else 0.0
        signal = {name: weights[name].sub_(start) for name, start in origin.items()}
        norms, finite, clipped = finished(signal, self.training.update_clip_norm)
        return LocalUpdates(
            signal, None, finite, norms, clipped, losses, torch.from_numpy(visits), 0
        )

    def _step(self, data: GroupData, rows: NDArray[np.int64]) -> Tensor:
        """One step along the mean gradient of `rows`; their losses (rows,)."""
        if not len(rows):
            return torch.zeros(0)
        losses = self.task.losses(self.module, shortened(data.batch, rows))
        tensors = list(self.parameters.values())
        grads = torch.autograd.grad(losses.mean(), tensors, allow_unused=True)
        used = [(p, g) for p, g in zip(tensors, grads, strict=True) if g is not None]
        with torch.no_grad():
            torch._foreach_add_(
                [p for p, _ in used], [g for _, g in used], alpha=-self.training.learning_rate
            )
        return losses.detach()
