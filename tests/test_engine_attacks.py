"""Attacks on the engine's guarantee: one example against the whole bound, and noise used twice."""

from __future__ import annotations

import copy
import functools
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from sottovoce.client import native
from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy import EDPSGD, clipped_gradients
from sottovoce.privacy.gradients import gemm
from sottovoce.privacy.gradients.factors import Bag, Dense, Factor, OneHot, Summed, clipped_sum
from sottovoce.privacy.gradients.norms import Memo, squared_norms


def optimizer_of(model: nn.Module, **settings: object) -> EDPSGD:
    return EDPSGD(model, lr=0.1, noise_multiplier=1.0, expected_batch_size=4, **settings)  # type: ignore[arg-type]


def cancelling(length: int, width: int, seed: int) -> Tensor:
    """(1, T, D): all positions nearly alike, all of whose roundings go one way."""
    generator = torch.Generator().manual_seed(seed)
    level, apart = torch.rand(2, generator=generator)
    x = (level + 0.1).expand(1, length, width).clone()
    x[:, 1::2] += 10 ** (-1 - 4 * apart)
    return x


def alternating(length: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    sign = torch.ones(length)
    sign[1::2] = -1
    return 100 * sign.view(1, -1, 1) * torch.rand(1, 1, width, generator=generator)


Factors = Callable[[int], list[Factor]]


def dense(seed: int) -> list[Factor]:
    return [Dense(cancelling(32, 384, seed), alternating(32, 384, seed))]


def long(seed: int) -> list[Factor]:
    return [Dense(cancelling(256, 96, seed), alternating(256, 384, seed))]


def table(seed: int) -> list[Factor]:
    g = alternating(32, 384, seed) * cancelling(32, 384, seed)
    return [OneHot(torch.zeros(1, 32, dtype=torch.int64), g)]


def tied(seed: int) -> list[Factor]:
    x, g = cancelling(4, 384, seed), torch.zeros(1, 4, 384)
    g[:, :, 0] = 100.0
    index = torch.zeros(1, 4, dtype=torch.int64)
    return [Dense(x, g), OneHot(index, -100.0 * cancelling(4, 384, seed).flip(1) * 1.0001)]


def bag(seed: int) -> list[Factor]:
    share = torch.tensor([[1.0, -1.0 + 10.0 ** -(3 + seed % 3)]])
    return [Bag(torch.zeros(1, 2, dtype=torch.int64), share, torch.full((1, 384), 1e4))]


@pytest.mark.parametrize("factors", [dense, long, table, tied, bag])
def test_an_example_whose_positions_cancel_is_released_within_the_bound(factors: Factors) -> None:
    for seed in range(25):
        uses = factors(seed)
        norm = squared_norms(uses, Memo()).sqrt()
        scale = (1.0 / norm).clamp(max=1.0)
        released = clipped_sum(uses, scale, torch.Size((384, uses_width(uses))), 1)
        assert float(released.double().pow(2).sum().sqrt()) <= 1.0 + 2e-6


@pytest.mark.parametrize("factors", [dense, long])
def test_so_it_is_from_a_stack_of_groups_by_the_kernels(
    kernel_level: native.Library, factors: Factors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "compiled", lambda *_: kernel_level)
    for seed in range(10):
        (use,) = factors(seed)
        assert isinstance(use, Dense)
        both = [Dense(torch.cat([use.x, use.x]), torch.cat([use.g, use.g.roll(1, 1)]))]
        scale = (1.0 / squared_norms(both, Memo()).sqrt()).clamp(max=1.0)
        released = clipped_sum(both, scale, torch.Size((384, uses_width(both))), 2)
        assert float(released.double().pow(2).sum((1, 2)).max().sqrt()) <= 1.0 + 2e-6


def uses_width(uses: list[Factor]) -> int:
    first = uses[0]
    return first.x.shape[2] if isinstance(first, Dense) else first.g.shape[-1]  # type: ignore[attr-defined]


def test_a_bias_whose_gradients_cancel_is_released_within_the_bound() -> None:
    for seed in range(25):
        g = alternating(32, 384, seed) * cancelling(32, 384, seed)
        memo = Memo()
        memo.gram(g)
        scale = (1.0 / squared_norms([Summed(g)], memo).sqrt()).clamp(max=1.0)
        released = clipped_sum([Summed(g)], scale, torch.Size((384,)), 1)
        assert float(released.double().pow(2).sum().sqrt()) <= 1.0 + 2e-6


class Neighbour(nn.Module):
    """Every row reads the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, mixes: bool = True) -> Tensor:
        hidden = self.first(x)
        after = torch.cat([hidden[1:], torch.zeros_like(hidden[:1])])
        return self.last(hidden + after if mixes else hidden).squeeze(1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_rows_that_mix_in_one_direction_are_found_in_the_smallest_batches(
    rows: int, turned: bool
) -> None:
    x = torch.randn(rows, 4)
    losses: Callable[[nn.Module], Tensor] = (
        (lambda m: m(x.flip(0)).flip(0)) if turned else (lambda m: m(x))
    )
    with pytest.raises(UnsupportedLayer, match="loss of another"):
        clipped_gradients(Neighbour(), losses, 1.0)


def test_losses_without_code_of_their_own_are_looked_at_every_time() -> None:
    model, x = Neighbour(), torch.randn(4, 4)

    def losses(mixes: bool, tracked: nn.Module) -> Tensor:
        return tracked(x, mixes)  # type: ignore[no-any-return]

    clipped_gradients(model, functools.partial(losses, False), 1.0)
    with pytest.raises(UnsupportedLayer, match="loss of another"):
        clipped_gradients(model, functools.partial(losses, True), 1.0)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(10, 4), nn.Linear(4, 1)

    def score(self, index: Tensor) -> Tensor:
        return self.last(self.table(index).mean(1)).squeeze(1)  # type: ignore[no-any-return]

    def forward(self, index: Tensor) -> Tensor:
        return self.score(index)


@pytest.mark.parametrize("entry", ["forward", "score"])
def test_one_example_after_a_bigger_batch_stays_one(entry: str) -> None:
    optimizer = optimizer_of(Words())
    getattr(optimizer.model, entry)(torch.randint(10, (64, 5)))
    model: Any = optimizer.model
    losses = (model.score(torch.randint(10, (1, 5))) - 1) ** 2
    assert optimizer.step(losses).shape == (1,)


def test_running_statistics_of_an_instance_norm_are_refused() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), nn.Linear(5, 3))
    with pytest.raises(UnsupportedLayer, match="track_running_stats=False"):
        optimizer_of(model)
    optimizer_of(nn.Sequential(nn.InstanceNorm1d(4), nn.Linear(5, 3)))


@pytest.mark.parametrize("trains", [True, False])
def test_freezing_and_unfreezing_after_the_optimizer_was_built_raise(trains: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].requires_grad_(not trains)
    optimizer = optimizer_of(model)
    model[0].requires_grad_(trains)
    with pytest.raises(UnsupportedLayer, match="'0.weight' was (un)?frozen"):
        optimizer.step(lambda tracked: tracked(torch.randn(2, 4)).sum(1))
    with pytest.raises(ValueError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_an_optimizer_is_not_copied_with_its_noise(copied: Callable[[EDPSGD], EDPSGD]) -> None:
    with pytest.raises(ValueError, match="same noise"):
        copied(optimizer_of(nn.Linear(4, 3)))


def test_a_forked_process_draws_noise_of_its_own() -> None:
    draws = optimizer_of(nn.Linear(4, 3))._draws
    draws.at("edp-sgd", 0)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, draws.at("edp-sgd", 0).bytes(8))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 8) != draws.at("edp-sgd", 0).bytes(8)


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.RMSNorm(5), nn.LayerNorm(5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_without_rows_has_sums_of_zero(layer: nn.Module, groups: int) -> None:
    sums, norms = clipped_gradients(layer, lambda m: m(torch.zeros(0, 4, 5)).sum((1, 2)), 1.0,
                                    groups)
    shapes = [(groups, *parameter.shape) for parameter in layer.parameters()]
    assert [tuple(found.shape) for found in sums] == shapes and norms.shape == (0,)
    assert not any(bool(found.any()) for found in sums)


def test_rows_without_positions_have_gradients_of_zero() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    index = torch.zeros(3, 0, dtype=torch.int64)
    _, norms = clipped_gradients(model, lambda m: m(index).sum((1, 2)), 1.0)
    assert norms.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": SubsetRandomSampler(range(10)), "batch_size": 5},
        {"sampler": WeightedRandomSampler([1.0] * 50, 50), "batch_size": 5},
        {"batch_size": None},
        {"batch_size": 500, "drop_last": True},
    ],
)
def test_a_loader_that_poisson_sampling_would_not_follow_is_refused(
    settings: dict[str, object],
) -> None:
    data = TensorDataset(torch.randn(50, 4), torch.zeros(50, dtype=torch.int64))
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="data_loader"):
        EDPSGD.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, **settings),  # type: ignore[arg-type]
            noise_multiplier=1.0,
        )


def test_losses_of_an_empty_poisson_batch_are_a_step_of_noise() -> None:
    optimizer = optimizer_of(nn.Linear(4, 3))
    empty = torch.zeros(0, dtype=torch.int64)
    optimizer.step(lambda m: F.cross_entropy(m(torch.zeros(0, 4)), empty, reduction="none"))
    assert len(optimizer.ledger) == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_train_under_autocast(kind: Any) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reads = nn.Linear(4, 6), kind(6, 5, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.reads(self.first(x))[0].float().sum((1, 2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Reader(), torch.randn(3, 7, 4)
    _, norms = clipped_gradients(model, lambda m: m(x), 1.0)
    with torch.autocast("cpu"):
        _, coarse = clipped_gradients(model, lambda m: m(x), 1.0)
    assert torch.allclose(coarse, norms, rtol=0.05)


def test_a_small_input_times_a_large_gradient_is_measured() -> None:
    """Either squared is beyond float32, their product is not."""
    model = torch.nn.Linear(10_000, 1, bias=False)
    x = torch.full((3, 10_000), 2e-23)
    (found,), norms = clipped_gradients(model, lambda m: 1.5e19 * m(x).squeeze(1), 0.01)
    torch.testing.assert_close(norms, torch.full((3,), 0.03), rtol=1e-4, atol=0)
    assert float(found.norm()) <= 3 * 0.01
