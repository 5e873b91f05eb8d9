"""A cut embedding table whose rows get their noise when they are read, and not before.

By plain SGD a row at theta_0 is, before step s, at

    theta_0 - lr (g_0 + ... + g_{s-1}) - lr (e_0 + ... + e_{s-1}),    e_j ~ N(0, sigma^2) per step,

and its text alone says in which steps the row is read: before its first reading and after its last
nobody sees it. So no e_j is drawn by itself. A reading in step s, the last one before it having
been in step r (or none: r = 0), draws one Gaussian of variance (s - r) (lr sigma)^2 for all of
e_r ... e_{s-1}; and the T - r noises after a row's last reading in step r are owed to the sum.

*Guarantee*: weights as they are read, and the finished sum, have the joint law that drawing every
e_j of every step would give. Proof, row by row (rows are independent): the readings s_1 < s_2 < ...
cut the steps 0 ... T - 1 into stretches that share no e_j. The sums over the stretches are hence
independent Gaussians whose variance is a stretch's length times (lr sigma)^2, whatever is known of
the others; and weights at s_i, like the sum, are functions of the signal and of whole stretches
only. A stretch is drawn when it ends, or by whoever adds updates up. To read a row more often than
needed only cuts a stretch in two. Devices' own claims (`LocalTraining.noise_variance`) are
unchanged: `materialised` + what is owed is T (lr sigma)^2 in every row.
*Assumes*: plain SGD, where all of a round's steps have the same, public deviation; readings in a
step depend on that step's batch, not on the noise that is still to be drawn; the owed part is added
before anybody sees the sum (`RoundSum`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.groups import GroupData
from sottovoce.privacy.mechanisms.noise_streams import NoiseStreams

Ints = NDArray[np.int64]


class LazyRows:
    """The cut table of K devices on its way from the global `table` (V, D).

    `tokens`: what feeds the table, (batch rows, ...), numbered within each device's touched rows.
    `rate`: learning rate. `streams`: one for each device, None where there is no noise, of
    `deviation` in a step's gradient. Row 0, which stands for padding, counts as read in every step.
    """

    def __init__(
        self,
        data: GroupData,
        tokens: Tensor,
        table: Tensor,
        rate: float,
        streams: NoiseStreams | None,
        deviation: float,
    ) -> None:
        self._devices, self._rows = data.touched.shape
        self._width, self._rate, self._deviation = table.shape[1], rate, deviation
        self._tokens, self._streams = tokens, streams
        self._origin = F.embedding(torch.from_numpy(data.touched.reshape(-1)), table)
        self._cells = self._read_in(data, tokens.numpy())
        self._last = np.zeros(len(self._origin), dtype=np.int64)
        self._signal = torch.zeros_like(self._origin)
        self._noise = None if streams is None else torch.zeros_like(self._origin)
        self._rank = self._index = torch.zeros(0, dtype=torch.int64)

    def read(self, number: int) -> Tensor:
        """(n, R, D): the rows that each device reads in step `number`, as they are by then.

        n devices take the step. Rows come in the order of the table, row 0 first, and what is
        filled up behind them is never read.
        """
        cells = self._cells[number]
        device = cells // self._rows
        counts = np.bincount(device)
        if self._noise is not None and number > 0:
            self._draw(number, cells, counts)
        first = np.cumsum(counts) - counts
        rank = np.arange(len(cells)) - first[device]
        index = np.empty((len(counts), int(counts.max())), dtype=np.int64)
        index[:] = np.arange(len(counts))[:, None] * self._rows
        index[device, rank] = cells
        self._index, ranks = torch.from_numpy(index), np.zeros(len(self._origin), dtype=np.int64)
        ranks[cells] = rank
        self._rank = torch.from_numpy(ranks)
        weights = F.embedding(self._index, self._origin)
        for moved in (self._signal, self._noise) if number > 0 else ():
            if moved is not None:
                weights += F.embedding(self._index, moved)
        return weights

    def renumbered(self, rows: Ints, devices: Ints | None, width: int | None = None) -> Tensor:
        """Tokens of batch `rows` (n, B), end to end, numbered as in the latest `read`.

        `devices`: (n,) whose rows those are; None: of the first n. `width`: tokens that are kept
        of each row.
        """
        kept = self._tokens if width is None else self._tokens[:, :width]
        tokens = kept[torch.from_numpy(rows.reshape(-1))]
        owner = torch.arange(len(rows)) if devices is None else torch.from_numpy(devices)
        offset = (owner * self._rows).repeat_interleave(rows.shape[1])
        return self._rank[tokens + offset.view(-1, *[1] * (tokens.dim() - 1))]

    def move(self, gradients: Tensor) -> None:
        """A step along `gradients` (n, R, D), laid out as in the latest `read`; used up."""
        moves = gradients.mul_(-self._rate).flatten(0, 1)
        self._signal.index_add_(0, self._index.flatten(), moves)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Signal and drawn noise, (K, U, D) each."""
        shape = (self._devices, self._rows, self._width)
        return self._signal.view(shape), None if self._noise is None else self._noise.view(shape)

    @property
    def materialised(self) -> Tensor:
        """(K, U) variance of the noise that was drawn, in each coordinate of a row."""
        drawn = torch.from_numpy(self._last).double() if self._noise is not None else (
            torch.zeros(len(self._last), dtype=torch.float64))
        return (drawn * (self._rate * self._deviation) ** 2).view(self._devices, self._rows)

    def _draw(self, number: int, cells: Ints, counts: Ints) -> None:
        """Draw what came upon rows since they were read last."""
        assert self._streams is not None and self._noise is not None
        drawn = self._streams.flat(
            (counts * self._width).tolist(), self._rate * self._deviation
        ).view(-1, self._width)
        waited = torch.from_numpy(number - self._last[cells])
        if bool((waited > 1).any()):
            drawn *= waited.float().sqrt().unsqueeze(1)
        self._noise.index_add_(0, torch.from_numpy(cells), drawn)
        self._last[cells] = number

    def _read_in(self, data: GroupData, tokens: Ints) -> list[Ints]:
        """For each step the rows that are read, as ascending places in all devices' tables."""
        null, size = len(tokens) - 1, self._devices * self._rows
        marks = np.zeros((len(data.rows), size), dtype=bool)
        for number, rows in enumerate(data.rows):
            device, column = np.nonzero(rows != null)
            offset = (device * self._rows).reshape(-1, *[1] * (tokens.ndim - 1))
            marks[number, (tokens[rows[device, column]] + offset).ravel()] = True
            here = int((data.steps > number).sum())
            marks[number, np.arange(here) * self._rows] = True
        return [np.flatnonzero(each) for each in marks]
