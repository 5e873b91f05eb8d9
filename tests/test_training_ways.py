"""Every way to train a group gives the same updates: together, alone, in one pass or in several."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fleets import CLIPPED, DEVICES, NOISED, assert_same, fleet, parameters_of, slow_sum
from torch import nn

from sottovoce.client.alone import LoneTrainer
from sottovoce.client.errors import UnsupportedLayer
from sottovoce.client.memory import keep_freed_memory
from sottovoce.client.step_parts import Part, by_size
from sottovoce.privacy.gradients.engine import backward, descend
from sottovoce.privacy.gradients.grouping import group
from sottovoce.privacy.layers import native_lstm
from sottovoce.simulations.group_size import ALONE, TRIALS, GroupSize, Way, possible_ways

MODELS = ["bilstm", "transformer", "lstm", "causal_transformer"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_devices_one_after_another_sum_up_to_the_slow_loop(model: str, clip: float | None) -> None:
    fast = fleet(model, None, clip, epochs=2)
    fast.size.chosen = Way(ALONE, 4)
    reply = fast.train(parameters_of(fast.model), DEVICES, 3)
    assert isinstance(fast._trainers[Way(ALONE, 4)], LoneTrainer)
    assert_same(reply.sums, slow_sum(fast, DEVICES, 3), 1e-4)
    together = fleet(model, None, clip, 3, epochs=2).train(parameters_of(fast.model), DEVICES, 3)
    assert_same(reply.sums, together.sums, 1e-4)
    assert reply.totals == pytest.approx(together.totals, rel=1e-4)


def test_a_layer_without_a_tracked_form_trains_alone_or_not_at_all() -> None:
    fast = fleet("bilstm", None, None)
    odd = nn.Sequential(nn.Bilinear(2, 2, 2))
    assert possible_ways(odd, fast.training, "grouped", 8) == [Way(ALONE, 16)]
    clipped = replace(fast.training, example=CLIPPED)
    with pytest.raises(UnsupportedLayer, match="Bilinear"):
        group(odd, 1)
    assert ALONE not in {way.engine for way in possible_ways(odd, clipped, "grouped", 8)}


@pytest.mark.parametrize("kernel", [False, True])
def test_an_lstm_trains_in_groups_where_it_has_a_kernel(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_lstm, "suited", lambda *_: kernel)
    fast = fleet("lstm", None, None)
    ways = possible_ways(fast.model, fast.training, "grouped", 8)
    assert ways[0] == (Way("grouped", 32) if kernel else Way(ALONE, 16))
    assert {way.engine for way in ways} == {"grouped", ALONE}


def test_clipped_examples_or_another_optimiser_are_not_trained_alone() -> None:
    fast = fleet("bilstm", NOISED, None)
    with pytest.raises(ValueError, match="plain SGD without example privacy"):
        LoneTrainer(fast.model, fast.task, fast.training)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_in_place_takes_away_the_gradient(model: str) -> None:
    fast = fleet(model, None, None)
    batch = fast.task.collate(fast.population.examples(DEVICES[:1]))
    rows = torch.arange(6) % len(batch["lengths"])
    some = {name: tensor[rows] for name, tensor in batch.items()}
    grouped = group(fast.model, 3)
    weights = {name: stack.detach().clone() for name, stack in grouped.parameters.items()}
    sums = backward(grouped, fast.task.losses(grouped.module, some), None, 3).sums
    moved = {name: stack.clone() for name, stack in weights.items()}
    descend(grouped, fast.task.losses(grouped.module, some), moved, 0.3)
    for name, start in weights.items():
        torch.testing.assert_close(moved[name], start - 0.3 * sums[name], rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=9),
    cost=st.floats(0, 30),
    depth=st.integers(0, 3),
)
def test_a_step_in_parts_has_every_row_once(sizes: list[int], cost: float, depth: int) -> None:
    width = max(sizes)
    rows = np.full((len(sizes), width), -1)
    for k, size in enumerate(sizes):
        rows[k, width - size :] = 100 * k + np.arange(size)
    present = rows >= 0
    whole = Part(0, rows, present, present.astype(np.float32))
    parts = by_size(whole, cost, depth)
    assert parts[0].chosen is None and len(parts) <= depth + 1
    found = []
    for part in parts:
        places = np.arange(len(sizes)) if part.chosen is None else part.chosen
        assert np.array_equal(part.present, part.rows >= 0)
        assert all(
            set(row // 100) <= {place, -1} for row, place in zip(part.rows, places, strict=True)
        )
        found += part.rows[part.present].tolist()
    assert sorted(found) == rows[present].tolist()
    assert sum(part.rows.size for part in parts) + (len(parts) - 1) * cost <= rows.size + 1e-9


@pytest.mark.parametrize("example", [CLIPPED, NOISED])
def test_passes_over_uneven_batches_change_nothing(example: object) -> None:
    replies = []
    for rows in (0.0, 1e9):  # every possible pass, and one alone
        fast = fleet("bilstm", example, 0.05, len(DEVICES))
        trainer = fast._trainer(fast.size.next())
        trainer._pass_rows = rows
        replies.append(fast.train(parameters_of(fast.model), DEVICES, 2))
    assert_same(replies[0].sums, replies[1].sums)
    assert replies[0].totals == pytest.approx(replies[1].totals, rel=1e-4)


def test_the_fastest_way_is_chosen_and_the_first_one_where_bytes_must_not_depend_on_a_clock() -> (
    None
):
    ways = [Way("grouped", 16), Way("grouped", 1), Way(ALONE, 16)]
    assert GroupSize(ways, fixed=True).next() == ways[0]
    size = GroupSize(ways, fixed=False)
    for turn in range(TRIALS * len(ways)):
        way = size.next()
        busy = turn in (len(ways), 2 * len(ways) + 2)  # a slow moment hits any way
        size.measured(way, 10, 9.0 if busy else 1.0 if way == ways[2] else 2.0)
    assert size.chosen == ways[2] and size.devices == 16


def test_freed_memory_is_kept_where_the_c_library_is_glibc() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
