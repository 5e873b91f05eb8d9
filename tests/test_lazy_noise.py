"""Noise that waits until a row is read: readings and sums have the law of the eager draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_fleets import DEVICES, fleet, parameters_of
from torch import Tensor

from sottovoce.client import lazy_rows
from sottovoce.client.cohort import chunks, draw_cohort
from sottovoce.client.fleet import ExampleClipping
from sottovoce.client.groups import GroupData
from sottovoce.client.lazy_rows import LazyRows
from sottovoce.client.round_sum import TOUCHED, RoundSum
from sottovoce.privacy.mechanisms.noise_streams import KEY_BYTES, NoiseStreams
from sottovoce.simulations.group_size import Way

RATE, DEVIATION, WIDTH = 0.5, 3.0, 16
VARIANCE = (RATE * DEVIATION) ** 2
# Which rows the batch of each step reads, beside row 0; row 6 is touched but never read here.
STEPS = [[1, 3, 5], [2, 5], [2, 5], [1, 5], [2, 4, 5]]
ROWS = 7
LOUD = ExampleClipping(clip_norm=1e-4, noise_multiplier=1e4)  # noise 1, next to no signal


def repeated(devices: int) -> tuple[GroupData, Tensor]:
    """`devices` with the same readings, and what feeds the table."""
    tokens = torch.tensor([(step * 3)[:3] for step in STEPS]).repeat(devices, 1)
    tokens = torch.cat([tokens, torch.zeros_like(tokens[:1])])
    numbers = np.arange(devices)[:, None] * len(STEPS)
    data = GroupData(
        batch={}, rows=[numbers + step for step in range(len(STEPS))],
        touched=np.tile(np.arange(ROWS), (devices, 1)),
        touched_counts=np.full(devices, ROWS), steps=np.full(devices, len(STEPS)),
    )
    return data, tokens


def lazily(devices: int) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Each reading (step, row) as (devices, D) less the start, and the rows' ends with what is
    owed.
    """
    data, tokens = repeated(devices)
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    streams = NoiseStreams([k.to_bytes(KEY_BYTES, "big") for k in range(devices)])
    lazy = LazyRows(data, tokens, table, RATE, streams, DEVIATION)
    read = {}
    for step, rows in enumerate(STEPS):
        stack = lazy.read(step)
        for place, row in enumerate([0, *rows]):
            read[step, row] = stack[:, place] - table[row]
        lazy.move(torch.zeros_like(stack))
    owed = len(STEPS) * VARIANCE - lazy.materialised
    generator = np.random.default_rng(2)
    rest = torch.from_numpy(generator.standard_normal((devices, ROWS, WIDTH)))
    noise = lazy.finish()[1]
    assert noise is not None
    return read, noise + rest * owed.sqrt().unsqueeze(2)


def eagerly(devices: int) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """The same with every step's noise drawn in every row."""
    drawn = torch.from_numpy(
        np.random.default_rng(3).standard_normal((len(STEPS), devices, ROWS, WIDTH))
    )
    way = -RATE * DEVIATION * drawn.cumsum(0)
    places = [torch.zeros_like(way[0]), *way]
    read = {(s, r): places[s][:, r] for s, rows in enumerate(STEPS) for r in [0, *rows]}
    return read, places[-1]


@pytest.mark.parametrize("path", [lazily, eagerly])
def test_readings_and_ends_have_the_covariance_of_noise_drawn_step_by_step(path) -> None:
    devices = 4000
    read, ends = path(devices)
    names = [*read, *((len(STEPS), row) for row in range(ROWS))]
    values = torch.stack([
        *(tensor.double().flatten() for tensor in read.values()),
        *(ends[:, row].double().flatten() for row in range(ROWS)),
    ])
    found = values @ values.t() / values.shape[1]
    for i, (s, a) in enumerate(names):
        for j, (t, b) in enumerate(names):
            expected = VARIANCE * min(s, t) * (a == b)
            spread = VARIANCE * (2 * max(s, 1) * max(t, 1) / values.shape[1]) ** 0.5
            assert float(found[i, j]) == pytest.approx(expected, abs=6.5 * spread), (s, a, t, b)


def test_a_row_is_drawn_for_the_steps_before_its_last_reading_and_owed_the_others() -> None:
    data, tokens = repeated(3)
    streams = NoiseStreams([bytes([k]) * KEY_BYTES for k in range(3)])
    lazy = LazyRows(data, tokens, torch.zeros(ROWS, WIDTH), RATE, streams, DEVIATION)
    for step in range(len(STEPS)):
        lazy.read(step)
    expected = torch.tensor([4, 3, 4, 0, 4, 4, 0], dtype=torch.float64) * VARIANCE
    assert torch.equal(lazy.materialised, expected.expand(3, ROWS))
    noise = lazy.finish()[1]
    assert noise is not None and not noise[:, [3, 6]].any() and bool(noise[:, [1, 2, 4, 5]].all())


def test_without_noise_rows_move_by_their_gradients_alone() -> None:
    data, tokens = repeated(2)
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    lazy = LazyRows(data, tokens, table, RATE, None, 0.0)
    place = table.expand(2, ROWS, WIDTH).clone()
    generator = torch.Generator().manual_seed(4)
    for step, rows in enumerate(STEPS):
        own = [0, *rows]
        torch.testing.assert_close(lazy.read(step)[:, : len(own)], place[:, own])
        gradients = torch.randn(2, len(own), WIDTH, generator=generator)
        place[:, own] -= RATE * gradients
        lazy.move(gradients)
    signal, noise = lazy.finish()
    assert noise is None and not lazy.materialised.any()
    torch.testing.assert_close(signal, place - table)


def trained_group(number: int, monkeypatch: pytest.MonkeyPatch):
    """A round of a loud fleet as one group: the fleet, its start, readings (places, step, weights)
    and what was trained.
    """
    fast = fleet("bilstm", LOUD, 1e-3, size=len(DEVICES), epochs=2)
    parameters, readings = parameters_of(fast.model), []
    plain = LazyRows.read

    def noted(self: LazyRows, step: int) -> Tensor:
        found = plain(self, step)
        readings.append((self._index, step, found))
        return found

    monkeypatch.setattr(lazy_rows.LazyRows, "read", noted)
    draws = draw_cohort(fast.population, DEVICES, fast.training.plan, number, fast.source)
    (chunk,) = chunks(fast.population, fast.task, draws, len(draws))
    way = Way("grouped", len(draws))
    trained = fast._train_group(parameters, chunk, 0, way, number)
    monkeypatch.setattr(lazy_rows.LazyRows, "read", plain)
    return fast, parameters, readings, trained


def test_a_devices_readings_go_with_its_update_as_the_steps_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the fleet's own training: sum of reading times end over what it should be on average."""
    products = expected = spread = 0.0
    for number in range(1, 25):
        fast, parameters, readings, (_, data, updates) = trained_group(number, monkeypatch)
        table = fast._trainers[Way("grouped", len(DEVICES))].table
        start = parameters[table][torch.from_numpy(data.touched)].flatten(0, 1).double()
        variance = (fast.training.learning_rate * fast.training.step_deviation) ** 2
        assert updates.noise is not None
        ends = (updates.signal[table] + updates.noise[table]).flatten(0, 1).double()
        for index, step, weights in readings:
            filled = index == index[:, :1]  # behind the others: row 0 once more
            filled[:, 0] = False
            flat = ~filled.flatten()
            place = index.flatten()[flat]
            moved = weights.flatten(0, 1)[flat].double() - start[place]
            assert step > 0 or not moved.any()
            total = (moved * ends[place]).sum()
            products += float(total)
            expected += step * variance * moved.numel()
            steps = len(data.rows)  # so often is a row read at most, each time with the same end
            spread += steps * 2 * step * steps * variance**2 * moved.numel()
    assert products == pytest.approx(expected, abs=6 * spread**0.5)
    assert 6 * spread**0.5 < expected / 2


def test_the_sums_noise_has_the_declared_variance_however_often_a_row_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    squares: dict[str, list[Tensor]] = {"never": [], "first step": [], "later": []}
    for number in range(1, 13):
        fast, _, _, (draws, data, updates) = trained_group(number, monkeypatch)
        total = RoundSum(fast.model, fast.training, number)
        total.add(draws, data, updates)
        assert updates.materialised is not None
        known = torch.zeros(len(total.room[TOUCHED]), dtype=torch.float64)
        touched = torch.zeros(len(known), dtype=torch.bool)
        for k, count in enumerate(data.touched_counts.tolist()):
            rows = torch.from_numpy(data.touched[k, :count])
            known[rows] += updates.materialised[k, :count]
            touched[rows] = True
        torch.testing.assert_close(total.room[TOUCHED], known)
        sums = total.reply(np.random.default_rng(number)).sums[total.table].double()
        declared = sum(n * fast.training.noise_variance(lv) for lv, n in total.levels.items())
        for name, rows in (
            ("never", ~touched), ("first step", touched & (known == 0)), ("later", known > 0)
        ):
            squares[name].append(sums[rows].pow(2).flatten() / declared)
    for name, parts in squares.items():
        values = torch.cat(parts)
        assert len(values) > 500, name
        assert float(values.mean()) == pytest.approx(1, abs=6 * (2 / len(values)) ** 0.5), name


def test_noise_does_not_depend_on_how_many_devices_draw_at_once() -> None:
    keys, counts = [bytes([k]) * KEY_BYTES for k in range(4)], [7000, 0, 1, 12_345]
    whole, streams = NoiseStreams(keys).flat(counts, 0.3), NoiseStreams(keys)
    parts = [streams.flat(counts[k : k + 2], 0.3, first=k) for k in (2, 0)]
    assert torch.equal(torch.cat(parts[::-1]), whole)
