"""Optimisers on noised gradients, and what they leave of a device's bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sottovoce.client.batches import BatchPlan
from sottovoce.client.descents import LocalDescent, stacked_norms
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import DeviceOptimizer, ExampleClipping, LocalTraining
from sottovoce.privacy.optimizer.descent import SGD, AdamBC, Descent, make_descent

SHAPES = {"w": (3, 4), "b": (5,), "scalar": ()}
STEPS = 7


def gradients(seed: int, *lead: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn((*lead, *shape), generator=generator) for n, shape in SHAPES.items()}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def descended(descent: Descent, *lead: int) -> dict[str, Tensor]:
    place = {name: torch.ones((*lead, *shape)) for name, shape in SHAPES.items()}
    for seed in range(STEPS):
        for name, move in descent.step(gradients(seed, *lead)).items():
            place[name] -= move
    return place


def by_torch(optimizer: type[torch.optim.Optimizer], **settings: object) -> dict[str, Tensor]:
    place = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    other = optimizer(list(place.values()), **settings)  # type: ignore[call-arg]
    for seed in range(STEPS):
        for name, gradient in gradients(seed).items():
            place[name].grad = gradient
        other.step()
    return {name: p.detach() for name, p in place.items()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


# -- against torch and the paper -------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_sgd_is_torchs(momentum: float) -> None:
    assert_close(
        descended(SGD(0.1, momentum)), by_torch(torch.optim.SGD, lr=0.1, momentum=momentum)
    )


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.6)])
def test_adam_without_noise_is_torchs(betas: tuple[float, float]) -> None:
    """With eps=0 there and a floor below every second moment here, both divide by sqrt(v^)."""
    assert_close(
        descended(AdamBC(0.1, *betas, eps_floor=1e-30)),
        by_torch(torch.optim.Adam, lr=0.1, betas=betas, eps=0.0),
    )


def test_adam_takes_the_noise_out_of_the_second_moment() -> None:
    """Tang et al. 2023, algorithm 1, one coordinate at a time in plain Python."""
    beta1, beta2, floor, variance = 0.8, 0.9, 0.05, 0.4
    found = descended(AdamBC(0.1, beta1, beta2, eps_floor=floor, noise_variance=variance))["b"]
    floored = 0
    for at in range(5):
        m = v = 0.0
        place = 1.0
        for t in range(1, STEPS + 1):
            g = float(gradients(t - 1)["b"][at])
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            second = v / (1 - beta2**t) - variance
            floored += second < floor
            place -= 0.1 * m / (1 - beta1**t) / max(second, floor) ** 0.5
        assert float(found[at]) == pytest.approx(place, rel=1e-4, abs=1e-5)
    assert 0 < floored < 5 * STEPS


def test_the_correction_finds_the_gradients_own_size_under_its_noise() -> None:
    """Without it a coordinate moves by lr g / sqrt(g^2 + Phi), with it by about lr."""
    noise, signal, size = 3.0, 1.0, 4000
    generator = torch.Generator().manual_seed(0)
    plain, corrected = AdamBC(1.0), AdamBC(1.0, noise_variance=noise**2)
    moves = []
    for _ in range(400):
        g = signal + noise * torch.randn(size, generator=generator)
        moves.append([float(d.step({"g": g.clone()})["g"].mean()) for d in (plain, corrected)])
    before, after = np.mean(moves[-20:], axis=0)
    assert before == pytest.approx(signal / (signal**2 + noise**2) ** 0.5, rel=0.05)
    assert after > 2 * before


# -- as objects ------------------------------------------------------------------------------------

DESCENTS = {
    "sgd": lambda: SGD(0.1),
    "momentum": lambda: SGD(0.1, 0.7),
    "adam": lambda: AdamBC(0.1, noise_variance=0.2, eps_floor=0.1),
}


@pytest.mark.parametrize("name", DESCENTS)
def test_groups_are_stepped_as_if_alone(name: str) -> None:
    together = descended(DESCENTS[name](), 3)
    for k in range(3):
        descent = DESCENTS[name]()
        place = {n: torch.ones(shape) for n, shape in SHAPES.items()}
        for seed in range(STEPS):
            own = {n: g[k].clone() for n, g in gradients(seed, 3).items()}
            for n, move in descent.step(own).items():
                place[n] -= move
        assert_close(place, {n: tensor[k] for n, tensor in together.items()})


@pytest.mark.parametrize("name", DESCENTS)
def test_a_loaded_state_goes_on_where_it_was(name: str) -> None:
    going, resumed = DESCENTS[name](), DESCENTS[name]()
    for seed in range(3):
        going.step(gradients(seed))
    resumed.load(copied(going.state()))
    for seed in range(3, 6):
        assert_close(resumed.step(gradients(seed)), going.step(gradients(seed)))


def test_only_what_exists_is_made() -> None:
    assert isinstance(make_descent("sgd", 0.1, momentum=0.5), SGD)
    assert make_descent("adam", 0.1, noise_variance=0.3).eps_floor == 0.3  # type: ignore[attr-defined]
    assert make_descent("adam", 0.1).eps_floor == 1e-8  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="optimizer=lion .*sgd or adam"):
        make_descent("lion", 0.1)
    with pytest.raises(ConfigError, match=r"momentum=0\.5 .*adam"):
        make_descent("adam", 0.1, momentum=0.5)


# -- a device's bounds -----------------------------------------------------------------------------

linear = st.builds(
    DeviceOptimizer,
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    proximal=st.sampled_from([0.0, 0.4]),
    weight_decay=st.sampled_from([0.0, 0.3, 1.5]),
)


def test_one_large_coordinate_among_many_small_ones_keeps_a_norm_exact() -> None:
    for size in (500, 1 << 15, 1 << 17):
        values = torch.full((2, size), 2.4e-4)
        values[0, 0] = 1.0
        exact = values.double().pow(2).sum(1).sqrt()
        found = stacked_norms({"a": values}).double()
        assert float((found / exact - 1).abs().max()) < 6e-7  # within what clipping leaves over


def first(devices: int, stacks: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the first devices alone hand over."""
    return {name: stack[:devices] for name, stack in stacks.items()}


PLAN = BatchPlan(batch_size=4, local_epochs=1, max_examples=100, poisson=True)
NOISED = ExampleClipping(clip_norm=1.0, noise_multiplier=1.0)
SMALL = settings(max_examples=40, deadline=None)


@SMALL
@given(optimizer=linear, steps=st.integers(1, 9), size=st.sampled_from([0.01, 1.0, 100.0]),
       seed=st.integers(0, 99))
def test_no_gradients_and_no_noise_push_a_signal_past_its_bound(
    optimizer: DeviceOptimizer, steps: int, size: float, seed: int
) -> None:
    """The worst case is the same gradient in every step, uneven devices beside each other."""
    training = LocalTraining(0.5, PLAN, NOISED, 0.3, optimizer)
    weights = gradients(seed, 2)
    counts = np.array([steps, (steps + 1) // 2])
    descent = LocalDescent(training, weights, counts, noised=True)
    constant = {name: size * g for name, g in gradients(seed + 1, 2).items()}
    for step in range(steps):
        drawn = {n: g if n == "w" else 10 * g for n, g in gradients(1000 + step, 2).items()}
        here = int((counts > step).sum())
        descent.step(step, first(here, copied(constant)), first(here, drawn))
    descent.finish()
    norms = stacked_norms({name: t.double() for name, t in descent.signal.items()})
    assert float(norms.max()) <= 0.3 * (1 + 1e-6)
    if size == 100.0 and optimizer.weight_decay == 0:
        assert float(norms.min()) == pytest.approx(0.3, rel=1e-5)  # the bound is used up


@SMALL
@given(optimizer=linear, left=st.integers(0, 5), seed=st.integers(0, 99),
       gap=st.sampled_from([1e-3, 0.1, 10.0]))
def test_no_step_moves_two_gradients_further_apart_before_their_noise(
    optimizer: DeviceOptimizer, left: int, seed: int, gap: float
) -> None:
    """What keeps a step's sensitivity at that of the clipped sum."""
    training = LocalTraining(0.5, PLAN, NOISED, 0.3, optimizer)
    ends = []
    for scale in (0.0, gap):
        weights = gradients(seed, 1)
        descent = LocalDescent(training, weights, np.array([left + 1]), noised=False)
        own = gradients(seed + 1, 1)
        other = gradients(seed + 2, 1)
        descent.step(0, {n: 0.2 * own[n] + scale * other[n] for n in own}, None)
        ends.append(descent.weights)
    apart = stacked_norms({n: (ends[0][n] - ends[1][n]).double() for n in ends[0]})
    given_apart = gap * stacked_norms({n: g.double() for n, g in other.items()})
    assert float(apart) <= 0.5 * float(given_apart) + 1e-6


@SMALL
@given(optimizer=linear, steps=st.integers(1, 6), seed=st.integers(0, 99))
def test_signal_and_noise_add_up_to_the_way_the_weights_went(
    optimizer: DeviceOptimizer, steps: int, seed: int
) -> None:
    training = LocalTraining(0.5, PLAN, NOISED, 0.3, optimizer)
    start = gradients(seed, 2)
    descent = LocalDescent(training, copied(start), np.array([steps + 1, 2]), noised=True)
    for step in range(steps):  # all but the last, after which nobody reads the weights
        here = 2 if step == 0 else 1
        given, noise = gradients(seed + step, 2), gradients(500 + seed + step, 2)
        descent.step(step, first(here, given), first(here, noise))
    assert descent.noise is not None
    still = 2 if steps == 1 else 1
    for name in SHAPES:
        way = (descent.signal[name] + descent.noise[name])[:still]
        went = (descent.weights[name] - start[name])[:still]
        torch.testing.assert_close(went, way, rtol=1e-4, atol=1e-4)


@SMALL
@given(size=st.sampled_from([0.01, 0.2, 5.0]), seed=st.integers(0, 99))
def test_gradients_known_to_be_short_are_left_as_projecting_them_would(
    size: float, seed: int
) -> None:
    training = LocalTraining(0.5, PLAN, NOISED, 0.3, DeviceOptimizer())
    start, steps = gradients(seed, 3), np.array([3, 2, 1])
    known, measured = (
        LocalDescent(training, copied(start), steps, noised=True) for _ in range(2)
    )
    for step in range(3):
        here = int((steps > step).sum())
        given = {n: size * (1 + 9 * (seed % 2)) * g for n, g in gradients(seed + step, 3).items()}
        given["w"][0] *= 0.001
        mine = first(here, given)
        longest = stacked_norms({n: g.double() for n, g in mine.items()})
        known.step(step, copied(mine), first(here, gradients(7, 3)), longest=longest)
        measured.step(step, copied(mine), first(here, gradients(7, 3)))
    known.finish(), measured.finish()
    assert torch.equal(known.clipped, measured.clipped)
    for name in start:
        torch.testing.assert_close(known.signal[name], measured.signal[name])
