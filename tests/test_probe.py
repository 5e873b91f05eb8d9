"""Models that mix rows are found out on their first pass, whatever their shapes say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import clipped_loop
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy import clipped_gradients
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import track

ROWS = WIDTH = 4


class Model(nn.Module):
    """Two layers and something between them that may treat rows as it should not."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)).tanh()).pow(2).sum((1, 2))


class TimeFirst(nn.Module):
    """The rows come second in an RNN and in the layer after it."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.rnn, self.last = kind(WIDTH, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x.transpose(0, 1))[0]).pow(2).sum((0, 2))


class Placed(nn.Module):
    """One position table for all rows, read by (T,) indices."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.last = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.place(torch.arange(x.shape[1]))).pow(2).sum((1, 2))


def batch(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)


MIXING = {
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "batch norm": lambda x: F.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape),
    "roll": lambda x: x.roll(1, 0),
    "reverse": lambda x: x.flip(0),
    "turned": lambda x: x.transpose(0, 1),
    "softmax": lambda x: x.softmax(0),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_rows_is_refused(name: str) -> None:
    model = Model(MIXING[name]).double()
    with pytest.raises(UnsupportedLayer, match="nothing may mix them"):
        clipped_gradients(model, lambda m: m(batch(ROWS, ROWS)), 1.0)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("length", [ROWS, ROWS + 1])
def test_time_in_place_of_the_rows_is_refused(kind: type[nn.GRU], length: int) -> None:
    model = TimeFirst(kind).double()
    with pytest.raises(UnsupportedLayer, match="must be the rows"):
        clipped_gradients(model, lambda m: m(batch(ROWS, length)), 1.0)


def test_positions_as_many_as_rows_are_refused_until_they_are_known_as_positions() -> None:
    model = Placed().double()
    square = batch(ROWS, ROWS)
    with pytest.raises(UnsupportedLayer, match="nothing may mix them"):
        clipped_gradients(model, lambda m: m(square), 1.0)
    tracked = track(model)
    backward(tracked, tracked.module(batch(ROWS, ROWS - 1)), 1.0, 1)
    result = backward(tracked, tracked.module(square), 0.1, 1)
    sums, norms = clipped_loop(model, lambda m, r: m(square[r : r + 1])[0], range(ROWS), 0.1)
    assert torch.allclose(result.norms, norms)
    for total, expected in zip(result.sums.values(), sums, strict=True):
        assert torch.allclose(total[0], expected, rtol=1e-5)


def test_the_look_changes_no_result_and_comes_once() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(WIDTH, 3, 2, batch_first=True), nn.Linear(3, 2)]).double()
    x, looks = batch(ROWS, 5), []

    def losses() -> Tensor:
        rnn, last = tracked.module
        return last(rnn(x)[0]).pow(2).sum((1, 2))

    tracked = track(model)
    record = tracked.tape.record
    tracked.tape.record = lambda *a: looks.append(tracked.tape.listener) or record(*a)
    first, second = (backward(tracked, losses(), 0.1, 1) for _ in range(2))
    assert torch.equal(first.norms, second.norms)
    assert all(torch.equal(first.sums[n], second.sums[n]) for n in first.sums)
    assert sum(look is not None for look in looks) == len(looks) // 2  # two looks, two passes


def test_a_single_row_is_not_looked_at() -> None:
    tracked = track(Model(MIXING["roll"]).double())
    backward(tracked, tracked.module(batch(1, 3)), 1.0, 1)
    assert not tracked.probed
    with pytest.raises(UnsupportedLayer, match="nothing may mix them"):
        backward(tracked, tracked.module(batch(2, 3)), 1.0, 1)
