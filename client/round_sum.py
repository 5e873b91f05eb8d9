"""The sum of a round: what a fleet adds up over its devices, and the noise that it adds once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.cohort import Draw
from sottovoce.client.figures import bounded_figures
from sottovoce.client.fleet import FleetReply, LocalTraining
from sottovoce.client.groups import GroupData, LocalUpdates
from sottovoce.client.training import sparse_table

Figures = tuple[dict[int, int], int, dict[str, float]]  # devices by level, dropped, totals
Room = dict[str, Tensor]  # what a sum is kept in: float64, see `room_shapes`

# In a room, beside the parameters: what was subtracted for touched rows, and what devices lent.
TOUCHED, LENT = "", " "


class RoundSum:
    """The sum of clipped updates, with the noise that no device's training ever sees.

    A device's noise on an embedding row that its text never touched does not enter its training,
    only the sum; neither does that of its last step (`LocalUpdates.owed`), nor that on a row after
    it was read last (`LocalUpdates.materialised` says what was drawn). Independent Gaussians
    add up to one of their summed variance, so those draws are made once for the sum: exact in
    distribution.

    `room`: tensors to sum in, whose content is lost; None for new ones.
    """

    def __init__(
        self,
        model: nn.Module,
        training: LocalTraining,
        server_round: int,
        room: Room | None = None,
    ) -> None:
        self.round, self.training = server_round, training.at(server_round)
        self.table = sparse_table(model, training)[0]
        self.room = new_room(room_shapes(model, training)) if room is None else room
        for tensor in self.room.values():
            tensor.zero_()
        self.sums = {n: t for n, t in self.room.items() if n not in (TOUCHED, LENT)}
        self.touched, self.lent = self.room[TOUCHED], self.room[LENT]
        self._variances: dict[int, float] = {}
        self.levels: dict[int, int] = {}
        self.dropped = 0
        self.totals = dict.fromkeys(
            ("examples", "loss", "clipped_examples", "clipped_devices", "norm"), 0.0
        )

    def add(self, draws: list[Draw], data: GroupData, updates: LocalUpdates) -> None:
        """Add a trained group's updates, those that are finite."""
        here, keep = len(draws), updates.finite
        kept = slice(None) if bool(keep.all()) else keep
        touched = torch.from_numpy(data.touched)[kept]
        parts = [updates.signal] if updates.noise is None else [updates.signal, updates.noise]
        for name, total in self.sums.items():
            if name == self.table:
                whole = parts[0][name] if len(parts) == 1 else parts[0][name] + parts[1][name]
                _scatter(total, touched.flatten(), whole[kept].flatten(0, 1))
                continue
            for part in parts:
                total += (keep.float() @ part[name].reshape(here, -1)).view(total.shape)
        levels, owed = self.note(draws, updates)
        if self.table is not None:
            drawn = updates.materialised
            drawn = None if drawn is None else drawn[kept]
            self._owe(levels, touched, data.touched_counts[keep.numpy()], owed, drawn)

    def note(self, draws: list[Draw], updates: LocalUpdates) -> tuple[NDArray[np.int64], Tensor]:
        """Count a group whose updates are in `sums`, and what was drawn of their rows in `touched`.

        Levels (n,) of its n finite devices and what each of them owes (n,).
        """
        keep = updates.finite
        levels = np.array([draw.level for draw in draws], dtype=np.int64)[keep.numpy()]
        for level, devices in enumerate(np.bincount(levels).tolist()):
            if devices:
                self.levels[level] = self.levels.get(level, 0) + devices
        owed = torch.zeros(len(levels), dtype=torch.float64)
        if updates.owed is not None:
            owed = updates.owed[keep]
            self.lent += owed.sum()
        self._count(updates, keep)
        return levels, owed

    def _owe(
        self,
        levels: NDArray[np.int64],
        touched: Tensor,
        counts: NDArray[np.int64],
        owed: Tensor,
        drawn: Tensor | None,
    ) -> None:
        """Note the rows that devices of `levels` touched, the first `counts` of each.

        `drawn`: (n, U) variance that their noise in those rows has; None: all of it but `owed`.
        """
        variances = np.array([self._variance(level) for level in levels.tolist()])
        if variances.any():
            own = torch.arange(touched.shape[1]) < torch.from_numpy(counts).unsqueeze(1)
            each = (torch.from_numpy(variances) - owed).unsqueeze(1).expand(own.shape)
            each = each if drawn is None else drawn
            self.touched.index_add_(0, touched[own], each[own])

    def _variance(self, level: int) -> float:
        if level not in self._variances:
            self._variances[level] = self.training.noise_variance(level)
        return self._variances[level]

    def merge(self, figures: Figures, room: Room) -> None:
        """Add another sum of the same round, given as its figures and its room."""
        for name, tensor in room.items():
            self.room[name] += tensor
        levels, dropped, totals = figures
        for level, devices in levels.items():
            self.levels[level] = self.levels.get(level, 0) + devices
        self.dropped += dropped
        for name, value in totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    @property
    def figures(self) -> Figures:
        """What is in the sum beside its tensors."""
        return self.levels, self.dropped, self.totals

    def _count(self, updates: LocalUpdates, keep: Tensor) -> None:
        here = len(keep)
        self.dropped += here - int(keep.sum())
        bounds, clip_norm = self.training.metric_bounds, self.training.update_clip_norm
        if bounds is not None and clip_norm is not None:
            for name, value in bounded_figures(updates, keep, bounds, clip_norm).items():
                self.totals[name] = self.totals.get(name, 0.0) + value
        self.totals["examples"] += updates.examples
        self.totals["loss"] += updates.loss
        self.totals["clipped_examples"] += updates.clipped_examples
        self.totals["clipped_devices"] += int(updates.clipped[:here][keep].sum())
        self.totals["norm"] += float(updates.norms[:here][keep].double().sum())

    def reply(self, generator: np.random.Generator) -> FleetReply:
        """The finished sum in float32. `generator`: source of the untouched rows' noise."""
        owed = sum(count * self._variance(level) for level, count in self.levels.items())
        for name, tensor in self.sums.items():
            variance = self.lent
            if name == self.table:
                variance = (owed - self.touched).clamp_min(0).unsqueeze(1)
            if bool((variance > 0).any()):
                drawn = generator.standard_normal(tuple(tensor.shape), dtype=np.float32)
                tensor += torch.from_numpy(drawn) * variance.sqrt()
        sums = {name: tensor.float() for name, tensor in self.sums.items()}
        return FleetReply(sums, self.levels, self.dropped, self.totals)


def _scatter(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add `values` (n, D) to the table's `rows` (n,), by way of a short sum where that is cheap."""
    if values.numel() > table.numel():
        table += torch.zeros(table.shape).index_add_(0, rows, values)
    else:
        table.index_add_(0, rows, values.double())


def room_shapes(model: nn.Module, training: LocalTraining) -> dict[str, torch.Size]:
    """Shapes of the tensors that a sum takes up: trained parameters, and what noise it owes."""
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    table = sparse_table(model, training)[0]
    rows = shapes[table][:1] if table else torch.Size([0])
    return shapes | {TOUCHED: rows, LENT: torch.Size([1])}


def new_room(shapes: dict[str, torch.Size]) -> Room:
    """Private memory for a sum."""
    return {name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes.items()}
