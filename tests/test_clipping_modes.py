"""Clipping modes: sums equal the slow loop's, and no search finds more than the ledger allows."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import dp_event, pld
from torch import Tensor, nn

from sottovoce.privacy import EDPSGD, Clipping, EpsilonTracker, NoiseSource, QuantileClip
from sottovoce.privacy.gradients import engine as grouped_engine
from sottovoce.privacy.gradients.clipping import STABILITY
from sottovoce.privacy.gradients.grouping import track
from sottovoce.privacy.gradients.micro_batches import MicroBatches, count_of
from sottovoce.privacy.optimizer.releases import Release
from sottovoce.privacy.optimizer.schedule import NoiseSchedule

DELTA, THRESHOLD = 1e-5, 0.7
SETTINGS: list[dict[str, Any]] = [
    {"clipping": mode, "threshold": threshold} | extra
    for mode, extra in (("per_example", {}), ("micro_batch", {"micro_batch_size": 4}))
    for threshold in ("fixed", "automatic", "quantile", "layer_wise")
]


def name_of(settings: dict[str, Any]) -> str:
    return f"{settings['clipping']}-{settings['threshold']}"


# -- against the slow definition -------------------------------------------------------------------


class Tagger(nn.Module):
    """All kinds of factors: a table used twice, an LSTM, a norm, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(7, 4), nn.LSTM(4, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.lstm(self.table(words))[0]
        return self.head(self.norm(hidden)).square().mean((1, 2))


def row_gradients(model: nn.Module, words: Tensor, weights: Tensor) -> list[dict[str, Tensor]]:
    named = dict(model.named_parameters())
    return [
        dict(zip(named, torch.autograd.grad(
            (model(words[r : r + 1]) * weights[r])[0], list(named.values())), strict=True))
        for r in range(len(words))
    ]


def whole(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def clipped(gradient: dict[str, Tensor], threshold: str, bound: float) -> dict[str, Tensor]:
    """The modes as their papers write them."""
    norm = float(whole(gradient).norm())
    if not math.isfinite(norm):
        return {name: torch.zeros_like(g) for name, g in gradient.items()}
    if threshold == "automatic":
        return {name: g * bound / (norm + STABILITY) for name, g in gradient.items()}
    if threshold == "layer_wise":
        layers = {name.rpartition(".")[0] for name in gradient}
        parts = {}
        for layer in layers:
            own = {n: g for n, g in gradient.items() if n.rpartition(".")[0] == layer}
            parts |= clipped(own, "fixed", bound / math.sqrt(len(layers)))
        return {name: parts[name] for name in gradient}
    return {name: g * min(1.0, bound / max(norm, 1e-300)) for name, g in gradient.items()}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("threshold", ["fixed", "automatic", "layer_wise"])
@pytest.mark.parametrize("mode", ["per_example", "micro_batch"])
def test_sums_equal_the_slow_loop_in_every_mode(mode: Any, threshold: Any, groups: int) -> None:
    torch.manual_seed(1)
    model, words = Tagger().double(), torch.randint(0, 7, (12, 5))
    weights = torch.rand(12).double() * 3
    weights[4] = math.inf
    rows = row_gradients(model, words, weights)
    micro, units = None, rows
    if mode == "micro_batch":  # row 11 only fills up, and micro-batches 2 and 5 stay empty
        of_rows = torch.tensor([0, 1, 0, 1, 1, 0, 4, 4, 3, 4, 4, -1] if groups == 2 else
                               [0, 1, 0, 4, 3, 0, 4, 4, 3, 1, 4, -1])
        micro = MicroBatches(of_rows, 6)
        units = [mean([g for g, u in zip(rows, of_rows, strict=True) if u == unit], model)
                 for unit in range(6)]
    grouped = track(model)
    rule = Clipping(0.05, mode, threshold)
    found = grouped_engine.backward(grouped, grouped.module(words) * weights, rule, groups, micro)
    share = len(units) // groups
    for at in range(groups):
        own = [clipped(g, threshold, 0.05) for g in units[at * share : (at + 1) * share]]
        for name, total in found.sums.items():
            expected = torch.stack([g[name] for g in own]).sum(0)
            torch.testing.assert_close(total[at], expected, rtol=2e-6, atol=1e-9)
    norms = torch.stack([whole(g).norm() for g in units])
    torch.testing.assert_close(found.norms.nan_to_num(), norms.nan_to_num(), rtol=1e-8, atol=1e-9)


def mean(gradients: list[dict[str, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    if not gradients:
        return {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return {name: torch.stack([g[name] for g in gradients]).mean(0) for name in gradients[0]}


def test_micro_batches_are_drawn_by_independent_uniform_coins() -> None:
    counts = np.zeros((4, 4))
    for seed in range(2000):
        unit = MicroBatches.drawn(2, 4, np.random.default_rng(seed)).unit
        counts[int(unit[0]), int(unit[1])] += 1
    assert np.abs(counts - 125).max() < 5 * math.sqrt(125)
    assert count_of(100, 8) == 12 and count_of(3, 8) == 1


def test_micro_batches_that_do_not_fit_are_refused_in_one_line() -> None:
    grouped = track(nn.Linear(3, 2))
    losses = grouped.module(torch.randn(4, 3)).square().sum(1)
    one = MicroBatches(torch.tensor([0, 0, 1, 1]), 2)
    for rule, groups, micro, match in [
        (Clipping(1.0, "micro_batch"), 1, None, "needs micro="),
        (Clipping(1.0), 1, one, "not micro_batch"),
        (Clipping(1.0, "micro_batch"), 1, MicroBatches(torch.zeros(3).long(), 2), "do not fit"),
        (Clipping(1.0, "micro_batch"), 2, MicroBatches(torch.tensor([1, 0, 0, 1]), 2), "another"),
    ]:
        with pytest.raises(ValueError, match=match) as error:
            grouped_engine.backward(grouped, losses, rule, groups, micro)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="below count=2"):
        MicroBatches(torch.tensor([0, 2]), 2)


# -- the search: no example moves a release by more than the ledger says ---------------------------


class Branching(nn.Module):
    """Has a layer that is used in batches only where some row asks for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, asked = self.first(x), x[:, :1] > 0
        return out + asked * self.second(x) if bool(asked.any()) else out


def random_case(chance: np.random.Generator) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs (rows, width), and weights (rows,) of the losses, often adversarial."""
    width, rows = int(chance.integers(1, 5)), int(chance.integers(1, 9))
    torch.manual_seed(int(chance.integers(1 << 30)))
    models: list[nn.Module] = [
        nn.Linear(width, 3), Branching(width),
        nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)),
    ]
    model = models[int(chance.integers(3))].double()
    x = torch.randn(rows, width, dtype=torch.float64)
    if chance.random() < 0.6:  # everybody alike
        x = x[:1].repeat(rows, 1)
    if chance.random() < 0.5:  # but for the last, which may be the only one to ask for a layer
        x[-1] = -x[-1]
    weights = torch.from_numpy(10.0 ** chance.uniform(-4, 3, rows))
    if chance.random() < 0.4:  # gradients just below the threshold, if all are alike
        gradients = torch.autograd.grad(model(x[:1]).sum(), list(model.parameters()),
                                        allow_unused=True)
        norm = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
        weights[:] = 0.999 * THRESHOLD / norm
    if chance.random() < 0.6:  # the last one against all others, and stronger
        weights[-1] = -weights.sum() * 10.0 ** chance.uniform(0, 2)
    if chance.random() < 0.1:
        weights[int(chance.integers(rows))] = math.inf
    return model, x, weights


class Ones(np.random.Generator):
    """Noise of exactly one standard deviation everywhere."""

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        return np.ones(size or (), dtype=dtype)


def released(
    model: nn.Module, x: Tensor, weights: Tensor, settings: dict[str, Any], source: Any
) -> tuple[Tensor, float, EDPSGD]:
    """(noised sum, noised count) of one step, read off what the step did."""
    model = copy.deepcopy(model)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = EDPSGD(
        model, lr=1.0, clip_norm=THRESHOLD, noise_multiplier=1.3, expected_batch_size=8,
        generator=source, **settings,
    )
    if len(x):
        optimizer.step((optimizer.model(x) * weights[:, None]).sum(1))
    else:
        optimizer.step(torch.zeros(0))
    units = 2 if "micro_batch_size" in settings else 8
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    fraction = -math.log(optimizer.clip_norm / THRESHOLD) / 0.2
    return (before - after) * units, fraction * units, optimizer


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_no_example_moves_a_release_by_more_than_the_ledger_allows(
    settings: dict[str, Any],
) -> None:
    chance, source = np.random.default_rng(5), NoiseSource.from_seed(3)
    worst = worst_sum = 0.0
    for _ in range(70):
        model, x, weights = random_case(chance)
        size, _, optimizer = released(model, x[:0], weights[:0], settings,
                                            Ones(np.random.PCG64()))
        deviation, event = float(size[0]), optimizer.ledger.events[0]
        with_it = released(model, x, weights, settings, source)
        without = released(model, x[:-1], weights[:-1], settings, source)
        moved = float((with_it[0] - without[0]).norm()) / deviation
        count_noise = getattr(optimizer.release.quantile, "count_noise", 1.0)
        both = math.hypot(moved, (with_it[1] - without[1]) / count_noise)
        worst, worst_sum = max(worst, both), max(worst_sum, moved * deviation)
        assert both <= 1 / event.noise_multiplier * (1 + 1e-9)
    # The search is sharp: with anything less in the ledger it would fail.
    assert worst > 0.95 / event.noise_multiplier
    if settings["clipping"] == "micro_batch":
        assert worst_sum > 1.9 * THRESHOLD
    else:
        assert worst_sum <= THRESHOLD


def test_coins_of_the_others_do_not_hang_on_the_last_example() -> None:
    """What lets the search above leave one example out and keep the others where they are."""
    source = NoiseSource.from_seed(3)
    for rows in range(1, 9):
        more = MicroBatches.drawn(rows + 1, 2, source.generator("x")).unit
        assert torch.equal(more[:-1], MicroBatches.drawn(rows, 2, source.generator("x")).unit)


# -- what the ledger makes of them -----------------------------------------------------------------


def spent(rule: Clipping, schedule: NoiseSchedule, steps: int, rate: float = 0.01) -> float:
    release = Release(rule, schedule, 1.0, rate)
    events = [release.event(step) for step in range(steps)]
    return EpsilonTracker(DELTA, unit="example", events=events).epsilon()


def test_micro_batches_cost_the_epsilon_of_half_the_noise() -> None:
    schedule = NoiseSchedule(1.0)
    assert spent(Clipping(1.0), schedule, 1000) == pytest.approx(1.83, abs=0.005)
    assert spent(Clipping(1.0, "micro_batch"), schedule, 1000) == pytest.approx(13.36, abs=0.02)


@pytest.mark.parametrize(("decay", "known", "slack"), [(1.0, 1.83, 1), (0.9, 15.8, 1),
                                                       (0.8, 229.0, 1.25)])
def test_decaying_noise_is_composed_with_its_true_sigmas(
    decay: float, known: float, slack: float
) -> None:
    """Of an epsilon as large as the last, accountants know an upper bound only."""
    found = spent(Clipping(1.0), NoiseSchedule(1.0, decay, 100), 1000)
    assert 0.995 * known < found < 1.005 * known * slack


@pytest.mark.parametrize("threshold", ["fixed", "automatic", "quantile", "layer_wise"])
def test_a_threshold_changes_nothing_in_the_ledger(threshold: Any) -> None:
    assert Clipping(2.0, threshold=threshold).sensitivity == 2.0
    assert Clipping(2.0, "micro_batch", threshold).sensitivity == 4.0


# -- the private quantile --------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "count_noise"), [(1.0, 0.6), (1.0, 5.0), (3.0, 2.0)])
def test_sum_and_count_together_are_worth_what_was_asked(asked: float, count_noise: float) -> None:
    clip = QuantileClip(1.0, count_noise=count_noise)

    def of(*multipliers: float) -> float:
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
        for multiplier in multipliers:
            accountant.compose(dp_event.GaussianDpEvent(multiplier), 20)
        return float(accountant.get_epsilon(DELTA))

    sum_multiplier = clip.sum_multiplier(asked)
    assert sum_multiplier > asked
    assert of(sum_multiplier, 2 * count_noise) == pytest.approx(of(asked), rel=1e-3)


def test_a_count_that_leaves_nothing_for_the_sum_is_refused() -> None:
    clip = QuantileClip(1.0, count_noise=0.5)
    with pytest.raises(ValueError, match="count_noise=0.5 must be above noise_multiplier / 2=0.5"):
        clip.sum_multiplier(1.0)
    assert clip.sum_multiplier(0.0) == 0.0
    for settings in ({"target": 1.0}, {"learning_rate": 0.0}, {"count_noise": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            QuantileClip(1.0, **{"count_noise": 1.0, **settings})


@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_the_threshold_finds_its_quantile(target: float) -> None:
    chance = np.random.default_rng(1)
    norms = torch.from_numpy(chance.lognormal(2.0, 1.0, 400))
    clip = QuantileClip(0.01, count_noise=20.0, target=target)
    tail = []
    for step in range(300):
        clip.update(clip.counted(norms) + 20.0 * chance.standard_normal(), 400)
        if step >= 150:
            tail.append(clip.clip_norm)
    below = float((norms <= float(np.mean(tail))).double().mean())
    assert below == pytest.approx(target, abs=0.05)


def test_the_update_is_the_papers() -> None:
    clip = QuantileClip(2.0, count_noise=1.0, target=0.4, learning_rate=0.2)
    assert clip.counted(torch.tensor([1.0, 2.0, 3.0, math.nan])) == 0.0
    clip.update(-1.0, 10)
    assert clip.clip_norm == pytest.approx(2.0 * math.exp(-0.2 * (0.4 - 0.4)))
    clip.update(3.0, 10)
    assert clip.clip_norm == pytest.approx(2.0 * math.exp(-0.2 * (0.8 - 0.4)))
    for _ in range(10**4):
        clip.update(-1e3, 10)
    assert clip.clip_norm == pytest.approx(2e6)
