"""The noise of a round, where it comes from, and eDP-SGD in an ordinary loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sottovoce.client.errors import RunError
from sottovoce.privacy import EDPSGD, Ledger, epsilon
from sottovoce.privacy.mechanisms.device import DeviceMechanism, variance_bound
from sottovoce.privacy.mechanisms.noise import NoiseSource

SIZE = 200_000
MECHANISM = DeviceMechanism(clip_norm=0.5, noise_multiplier=1.2, local_variance_bound=0.7)


def source(seed: int = 1) -> NoiseSource:
    return NoiseSource.from_seed(seed)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


# -- the device mechanism --------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_release_has_the_declared_deviation_whatever_the_devices_added(share: float) -> None:
    local = share * MECHANISM.local_variance_bound
    own = np.random.default_rng(3).standard_normal(SIZE) * math.sqrt(local)
    sums = {"w": torch.from_numpy(own.astype(np.float32))}
    released = MECHANISM.release(sums, local, source().generator("central noise", 1))["w"].double()
    assert float(released.mean()) == pytest.approx(0.0, abs=5 * MECHANISM.deviation / SIZE**0.5)
    assert float(released.var()) == pytest.approx(MECHANISM.deviation**2, rel=5 * (2 / SIZE) ** 0.5)
    assert MECHANISM.deviation**2 == pytest.approx((1.2 * 0.5) ** 2 + 0.7)


def test_what_the_coordinator_adds_never_falls_below_the_claimed_noise() -> None:
    """Even when devices' own noise is as large as its bound."""
    sums = {"w": torch.zeros(SIZE)}
    bound = MECHANISM.local_variance_bound
    added = MECHANISM.release(sums, bound, source().generator("n", 1))["w"].double()
    claimed = MECHANISM.noise_multiplier * MECHANISM.clip_norm
    assert float(added.std()) == pytest.approx(claimed, rel=5 / (2 * SIZE) ** 0.5)


def test_beyond_the_bound_only_noise_is_released() -> None:
    over = MECHANISM.local_variance_bound * 1.01
    generators = [source().generator("n", 1) for _ in range(2)]
    for signal in (torch.full((SIZE,), 1e6), torch.full((SIZE,), -3.0)):
        released = MECHANISM.release({"w": signal}, over, generators.pop())["w"].double()
        assert abs(float(released.mean())) < 5 * MECHANISM.deviation / SIZE**0.5
        assert float(released.std()) == pytest.approx(MECHANISM.deviation, rel=0.01)


def test_without_noise_of_their_own_it_is_the_gaussian_mechanism() -> None:
    mechanism = DeviceMechanism(clip_norm=2.0, noise_multiplier=0.25)
    signal = torch.arange(12.0).reshape(3, 4)
    released = mechanism.release({"w": signal}, 0.0, source().generator("n", 7))["w"]
    drawn = source().generator("n", 7).standard_normal((3, 4), dtype=np.float32)
    torch.testing.assert_close(released, signal + 0.5 * torch.from_numpy(drawn))


def test_every_tensor_gets_noise_of_its_own_whatever_their_order() -> None:
    sums = {"b": torch.zeros(SIZE), "a": torch.zeros(SIZE), "scalar": torch.zeros(())}
    first = MECHANISM.release(sums, 0.0, source().generator("n", 1))
    turned = MECHANISM.release(dict(reversed(sums.items())), 0.0, source().generator("n", 1))
    assert list(first) == list(sums)
    assert all(torch.equal(first[name], turned[name]) for name in sums)
    assert abs(correlation(first["a"].numpy(), first["b"].numpy())) < 5 / SIZE**0.5
    assert float(first["scalar"]) != 0


@given(noise=st.floats(1e-3, 100), clip=st.floats(1e-3, 100), bound=st.floats(0, 1e6))
def test_no_release_is_quieter_than_noise_multiplier_times_clip_norm(
    noise: float, clip: float, bound: float
) -> None:
    assert DeviceMechanism(clip, noise, bound).deviation >= noise * clip * (1 - 1e-12)


# -- the bound on devices' own noise ---------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [
        [(1000, 0.02, 1.0)],
        [(50, 0.9, 0.1), (400, 0.05, 2.0), (3, 1.0, 5.0)],
        [(100_000, 1e-5, 3.0)],
    ],
)
@pytest.mark.parametrize("slack", [1e-1, 1e-3])
def test_the_variance_bound_holds_and_is_not_loose(
    groups: list[tuple[int, float, float]], slack: float
) -> None:
    trials = 200_000
    generator = np.random.default_rng(0)
    total = sum(generator.binomial(n, p, trials) * v for n, p, v in groups)
    bound = variance_bound(groups, slack, max(v for _, _, v in groups))
    allowed = slack * trials
    assert np.count_nonzero(total > bound) <= allowed + 5 * math.sqrt(allowed)
    spread = math.sqrt(sum(n * p * (1 - p) * v**2 for n, p, v in groups))
    largest = max(v for _, _, v in groups)
    quantile = float(np.quantile(total, 1 - slack))
    assert bound <= quantile + 1.5 * spread + 4 * largest * math.log(1 / slack) / 3


def test_the_variance_bound_of_the_demo_costs_little() -> None:
    """500 of a million devices: the bound is less than 1.5 times the mean at one in 10^18."""
    assert variance_bound([(1_000_000, 5e-4, 1.0)], 1e-18, 1.0) < 1.5 * 500


def test_devices_without_noise_bring_in_none() -> None:
    assert variance_bound([(100, 0.5, 0.0), (100, 0.0, 3.0)], 1e-18, 3.0) == 0.0


# -- where noise comes from ------------------------------------------------------------------------


def draws(purpose: str, *key: int, seed: int = 1) -> np.ndarray:
    return source(seed).generator(purpose, *key).standard_normal(SIZE)


def test_the_same_key_gives_the_same_noise() -> None:
    assert np.array_equal(draws("central noise", 3), draws("central noise", 3))


@pytest.mark.parametrize(
    "other",
    [
        ("central noise", 4),
        ("device noise", 3),
        ("central noise", 3, 0),
        ("central noise3",),
        ("central noise",),
    ],
)
def test_noise_of_other_rounds_and_purposes_is_uncorrelated(other: tuple[Any, ...]) -> None:
    a, b = draws("central noise", 3), draws(*other)
    limit = 5 / SIZE**0.5
    assert abs(correlation(a, b)) < limit
    assert abs(correlation(a[1:], b[:-1])) < limit
    assert abs(correlation(a**2, b**2)) < limit


def test_noise_of_another_secret_is_uncorrelated() -> None:
    assert abs(correlation(draws("n", 1), draws("n", 1, seed=2))) < 5 / SIZE**0.5


def test_keys_cannot_be_confused() -> None:
    firsts = [draws("n", *key)[0] for key in ((1, 23), (12, 3), (123,), (1, 2, 3))]
    assert len(set(firsts)) == len(firsts)


def test_a_secret_comes_from_the_system_and_is_never_the_same() -> None:
    secrets = {NoiseSource.from_system().secret for _ in range(50)}
    assert len(secrets) == 50
    assert not NoiseSource.from_system().reproducible
    assert source().reproducible


def test_a_secret_is_kept_for_its_owner_alone_until_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    path.touch(mode=0o644)
    kept = NoiseSource.from_system()
    kept.save(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = NoiseSource.load(tmp_path)
    assert (loaded.secret, loaded.reproducible) == (kept.secret, False)
    NoiseSource.forget(tmp_path)
    assert list(tmp_path.iterdir()) == []
    NoiseSource.forget(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"secret": "zz"}', '{"secret": "00"}', "[]"])
def test_a_damaged_secret_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_text(text)
    with pytest.raises(RunError, match="secret.key cannot be read") as error:
        NoiseSource.load(tmp_path)
    assert "\n" not in str(error.value)


# -- EDPSGD ----------------------------------------------------------------------------------------


def toy() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(400, 4)
    return model, x, (x[:, 0] * x[:, 1] > 0).long()


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def test_an_ordinary_loop_trains_a_model() -> None:
    model, x, y = toy()
    optimizer = EDPSGD(
        model, lr=1.0, noise_multiplier=1.0, expected_batch_size=100, sampling_rate=0.25,
        generator=source().generator("toy"),
    )
    before = float(losses_of(model, x, y).detach().mean())
    generator = np.random.default_rng(0)
    for _ in range(150):
        rows = torch.from_numpy(np.flatnonzero(generator.random(len(x)) < 0.25))
        norms = optimizer.step(losses_of(optimizer.model, x[rows], y[rows]))
        assert norms.shape == (len(rows),)
    assert float(losses_of(model, x, y).detach().mean()) < 0.6 * before
    assert float((model(x).argmax(1) == y).float().mean()) > 0.85
    assert len(optimizer.ledger) == 150
    assert 1 < epsilon(optimizer.ledger, 1e-5) < 60


def test_with_a_huge_clip_norm_and_no_noise_it_is_sgd() -> None:
    model, x, y = toy()
    plain, _, _ = toy()
    optimizer = EDPSGD(
        model, lr=0.3, clip_norm=1e6, noise_multiplier=0.0, expected_batch_size=len(x)
    )
    reference = torch.optim.SGD(plain.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.step(lambda m: losses_of(m, x, y))
        reference.zero_grad()
        losses_of(plain, x, y).mean().backward()
        reference.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def moved_by(step: Callable[[EDPSGD], Any], **settings: Any) -> tuple[Tensor, EDPSGD]:
    """What one step does to all parameters of a wide model, as one vector."""
    model = nn.Linear(400, 100)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    defaults = {"lr": 0.5, "clip_norm": 2.0, "noise_multiplier": 3.0, "expected_batch_size": 8.0}
    optimizer = EDPSGD(model, **{**defaults, **settings})
    step(optimizer)
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before, optimizer


def test_an_empty_batch_is_a_step_of_pure_noise() -> None:
    generator = source().generator("empty")
    moved, optimizer = moved_by(lambda o: o.step(torch.zeros(0)), generator=generator)
    expected = 0.5 * 3.0 * 2.0 / 8.0
    assert float(moved.std()) == pytest.approx(expected, rel=5 / (2 * len(moved)) ** 0.5)
    assert len(optimizer.ledger) == 1


def test_a_step_moves_no_further_than_its_clipped_examples() -> None:
    def step(optimizer: EDPSGD) -> None:
        norms = optimizer.step(optimizer.model(torch.randn(5, 400)).square().sum(1) * 1e3)
        assert bool((norms > 2.0).all())

    moved, _ = moved_by(step, noise_multiplier=0.0)
    assert 0 < float(moved.norm()) <= 5 * 2.0 * 0.5 / 8.0


def test_the_noise_of_two_steps_and_of_two_optimizers_differs() -> None:
    moves = [moved_by(lambda o: o.step(torch.zeros(0)))[0].numpy() for _ in range(2)]
    assert abs(correlation(*moves)) < 5 / len(moves[0]) ** 0.5

    def twice(optimizer: EDPSGD) -> None:
        for _ in range(2):
            optimizer.step(torch.zeros(0))

    both, _ = moved_by(twice)
    assert float(both.std()) == pytest.approx(2**0.5 * 0.375, rel=0.02)


def test_the_ledger_holds_one_event_a_step() -> None:
    ledger = Ledger()
    _, optimizer = moved_by(
        lambda o: [o.step(torch.zeros(0)) for _ in range(3)], sampling_rate=0.01, ledger=ledger
    )
    assert optimizer.ledger is ledger
    assert len(ledger) == 3
    event = ledger.events[0]
    assert (event.unit, event.sampling, event.sampling_rate) == ("example", "poisson", 0.01)
    assert event.noise_multiplier == 3.0
    unsampled = moved_by(lambda o: [o.step(torch.zeros(0)) for _ in range(3)])[1].ledger
    assert epsilon(ledger, 1e-5) < 0.1 * epsilon(unsampled, 1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0), ("lr", math.nan), ("lr", math.inf),
        ("clip_norm", -1.0), ("clip_norm", math.inf), ("clip_norm", math.nan),
        ("noise_multiplier", -0.1), ("noise_multiplier", math.inf), ("noise_multiplier", math.nan),
        ("expected_batch_size", 0), ("sampling_rate", 0.0), ("sampling_rate", 1.5),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_in_one_line(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be") as error:
        moved_by(lambda o: None, **{name: value})
    assert "\n" not in str(error.value)


def test_losses_that_are_not_per_example_are_refused() -> None:
    model, x, y = toy()
    optimizer = EDPSGD(model, lr=1.0, noise_multiplier=1.0, expected_batch_size=10)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="one loss per row"):
        optimizer.step(losses_of(optimizer.model, x, y).mean())
    with pytest.raises(ValueError, match="its own layer"):
        optimizer.step(losses_of(model, x, y))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(optimizer.ledger) == 0
