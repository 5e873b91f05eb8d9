"""Local training of K devices at once; an edge device is K = 1.

Each device starts from the global model and takes its own number of steps

    theta <- theta - lr (signal + noise),    signal = (sum of its clipped example gradients) / B

and what it hands over is clip(signal part) + noise part (see `LocalUpdates`). The embedding table
is cut down to the rows that a device's text touches: all other rows have zero gradient, so the
cut changes nothing, and their noise is drawn once for the whole sum (`UntouchedNoise`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.fleet import LocalTraining
from sottovoce.client.tasks import Batch, Task
from sottovoce.privacy.engine import backward, clip_factors
from sottovoce.privacy.grouping import Grouped, group

PASS_COST = 24


@dataclass
class GroupData:
    """The batches of K devices. `null` rows stand for nobody: they fill uneven steps.

    `batch`: collated examples of all K devices, the null row last; its `lengths` are the positions
    that count in each row. `rows`: for each step, (K, B) indices into the batch, each device's from
    its shortest example to its longest, filled up in front with the null row (length 0).
    `touched`: (K, U) embedding rows that each device uses, row 0 first, padded with 0;
    `touched_counts`: (K,). `steps`: (K,) steps of each.
    """

    batch: Batch
    rows: list[NDArray[np.int64]]
    touched: NDArray[np.int64]
    touched_counts: NDArray[np.int64]
    steps: NDArray[np.int64]


@dataclass
class LocalUpdates:
    """What K devices hand over, the embedding table in its cut-down form.

    `signal`: by name (K, *shape), the data-dependent part, already clipped. `noise`: the same
    shapes, or None. `finite`: (K,) bool. `norms`: (K,) of the unclipped signal.
    """

    signal: dict[str, Tensor]
    noise: dict[str, Tensor] | None
    finite: Tensor
    norms: Tensor
    clipped: Tensor
    loss: float
    examples: int
    clipped_examples: int


class GroupTrainer:
    """Trains K devices together on stacked weights; reused for group after group.

    `table`: name of the embedding parameter that is cut down, or None when the model has none
    that is fed by tokens alone.
    """

    def __init__(self, model: nn.Module, task: Task, training: LocalTraining, devices: int) -> None:
        self.task, self.training, self.devices = task, training, devices
        self.grouped: Grouped = group(model, devices)
        self.table, self.table_input = sparse_table(model)
        self.grouped.module.train()

    def train(
        self,
        parameters: dict[str, Tensor],
        data: GroupData,
        generators: list[np.random.Generator] | None,
    ) -> LocalUpdates:
        """Local training of the group from the global `parameters`.

        `generators`: one for each device, the source of its noise; None for no noise.
        """
        self._load(parameters, data)
        tally = _Tally()
        signal = {name: torch.zeros_like(p) for name, p in self.grouped.parameters.items()}
        noise = {name: torch.zeros_like(p) for name, p in signal.items()} if generators else None
        saturated = torch.zeros(self.devices, dtype=torch.bool)
        for step, rows in enumerate(data.rows):
            active = torch.from_numpy(data.steps > step)
            part = self._step_signal(data, rows, tally)
            if self.training.example is not None:
                saturated |= self._project(part, data.steps)
            for name, gradient in part.items():
                signal[name].sub_(gradient)
            drawn = self._step_noise(data, active, generators) if generators else None
            self._descend(part, drawn)
            if noise is not None and drawn is not None:
                for name, draw in drawn.items():
                    noise[name].sub_(draw)
        return self._finish(signal, noise, saturated, tally)

    def _load(self, parameters: dict[str, Tensor], data: GroupData) -> None:
        with torch.no_grad():
            for name, stack in self.grouped.parameters.items():
                if name == self.table:
                    stack.data = parameters[name][torch.from_numpy(data.touched)]
                else:
                    stack.copy_(parameters[name].expand_as(stack))

    def _step_signal(
        self, data: GroupData, rows: NDArray[np.int64], tally: _Tally
    ) -> dict[str, Tensor]:
        """Learning rate times the (clipped) gradient sums over the batch size, by name."""
        signal = {n: torch.zeros_like(p.data) for n, p in self.grouped.parameters.items()}
        null = len(data.batch["lengths"]) - 1
        present = rows != null
        weights = present.astype(np.float32)
        factor = self.training.learning_rate
        if self.training.example is None:
            weights /= np.maximum(present.sum(axis=1, keepdims=True), 1)
        else:
            factor /= self.training.plan.batch_size
        lengths = data.batch["lengths"].numpy()[rows]
        for part in length_buckets(lengths):
            index = torch.from_numpy(rows[:, part].reshape(-1))
            sums = self._backward(
                shortened(data.batch, index),
                torch.from_numpy(weights[:, part].reshape(-1)),
                torch.from_numpy(present[:, part].reshape(-1)),
                tally,
            )
            for name, total in sums.items():
                signal[name].add_(total, alpha=factor)
        return signal

    def _backward(
        self, batch: Batch, weights: Tensor, present: Tensor, tally: _Tally
    ) -> dict[str, Tensor]:
        example = self.training.example
        clip = None if example is None else example.clip_norm
        losses = self.task.losses(self.grouped.module, batch)
        result = backward(self.grouped, losses * weights, clip, self.devices)
        tally.add(losses.detach(), present, result.norms, clip)
        return result.sums

    def _project(self, part: dict[str, Tensor], steps: NDArray[np.int64]) -> Tensor:
        """Clip each device's step to S / steps, before its noise. Returns who was clipped."""
        bound = self.training.update_clip_norm
        if bound is None:
            return torch.zeros(self.devices, dtype=torch.bool)
        share = bound / torch.from_numpy(np.maximum(steps, 1)).to(torch.float32)
        norms = stacked_norms(part)
        _scale(part, clip_factors(norms, share, self.devices))
        return norms > share

    def _step_noise(
        self, data: GroupData, active: Tensor, generators: list[np.random.Generator]
    ) -> dict[str, Tensor]:
        """One step's noise for each active device: its touched rows first, then the rest."""
        example = self.training.example
        assert example is not None
        deviation = example.noise_multiplier * example.clip_norm / self.training.plan.batch_size
        drawn = {name: torch.zeros_like(p.data) for name, p in self.grouped.parameters.items()}
        for k in torch.nonzero(active).flatten().tolist():
            for name, tensor in drawn.items():
                target = tensor[k, : data.touched_counts[k]] if name == self.table else tensor[k]
                generators[k].standard_normal(dtype=np.float32, out=target.numpy())
        return {n: t.mul_(deviation * self.training.learning_rate) for n, t in drawn.items()}

    def _descend(self, part: dict[str, Tensor], drawn: dict[str, Tensor] | None) -> None:
        with torch.no_grad():
            for name, stack in self.grouped.parameters.items():
                stack.sub_(part[name])
                if drawn is not None:
                    stack.sub_(drawn[name])

    def _finish(
        self,
        signal: dict[str, Tensor],
        noise: dict[str, Tensor] | None,
        saturated: Tensor,
        tally: _Tally,
    ) -> LocalUpdates:
        norms = stacked_norms(signal)
        finite = torch.isfinite(norms)
        bound = self.training.update_clip_norm
        if not bool(finite.all()):
            for tensor in signal.values():
                tensor[~finite] = 0.0
        if bound is not None and self.training.example is None:
            saturated = norms > bound
            _scale(signal, clip_factors(norms, bound, self.devices))
        return LocalUpdates(
            signal, noise, finite, norms, saturated, tally.loss, tally.examples, tally.clipped
        )


class _Tally:
    """Running totals over the examples of a group."""

    def __init__(self) -> None:
        self.loss, self.examples, self.clipped = 0.0, 0, 0

    def add(self, losses: Tensor, present: Tensor, norms: Tensor, clip: float | None) -> None:
        self.loss += float(torch.where(present, losses, 0.0).nan_to_num().sum())
        self.examples += int(present.sum())
        if clip is not None:
            self.clipped += int((norms > clip).sum())


def sparse_table(model: nn.Module) -> tuple[str | None, str | None]:
    """Name of the token embedding's parameter and of the batch entry that feeds it.

    (None, None) when the model names none, or when its table is frozen or shared with another
    layer, which would see the cut.
    """
    inputs: dict[str, str] = getattr(model, "sparse_inputs", {})
    for module, entry in inputs.items():
        weight = model.get_submodule(module).weight
        users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
        if isinstance(weight, nn.Parameter) and weight.requires_grad and len(users) == 1:
            return f"{module}.weight", entry
    return None, None


def stacked_norms(tensors: dict[str, Tensor]) -> Tensor:
    """(K,) L2 norm of each device's tensors, over all names together."""
    squares = [tensor.flatten(1).pow(2).sum(1) for tensor in tensors.values()]
    return torch.stack(squares).sum(0).sqrt()


def _scale(tensors: dict[str, Tensor], factors: Tensor) -> None:
    for tensor in tensors.values():
        tensor.mul_(factors.view(-1, *[1] * (tensor.dim() - 1)))


def length_buckets(lengths: NDArray[np.int64]) -> list[slice]:
    """Columns of a step cut in two where that saves the most padding.

    `lengths`: (K, B), ascending along each row. Clipped sums add up over any division of the
    rows, so a cut changes nothing but cost, taken as rows times longest row; a pass of its own
    costs about as much as `PASS_COST` positions of every device.
    """
    columns = lengths.shape[1]
    if columns == 0:
        return []
    longest = np.maximum(lengths.max(axis=0), 1)
    cuts = np.arange(1, columns)
    costs = cuts * longest[cuts - 1] + (columns - cuts) * longest[-1] + PASS_COST
    if not len(cuts) or costs.min() >= columns * longest[-1]:
        return [slice(0, columns)]
    at = int(cuts[costs.argmin()])
    return [slice(0, at), slice(at, columns)]


def shortened(batch: Batch, index: Tensor) -> Batch:
    """The batch's rows at `index`, without the padding that none of them needs."""
    lengths = batch["lengths"][index]
    longest = max(int(lengths.max()), 1)
    return {
        name: tensor[:, :longest][index] if tensor.dim() > 1 else tensor[index]
        for name, tensor in batch.items()
    }
