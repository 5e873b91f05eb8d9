"""Bags of words trained in C: the sums of `GroupTrainer`, from the same batches and the same noise,
at every level of the kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bag_fleets import (
    AUTOMATIC,
    CLIPPED,
    INTENTS,
    LONGEST,
    NOISED,
    Bag,
    Sayings,
    assert_close,
    both,
    chunk_of,
    natively,
    parameters_of,
    task_of,
    together,
    training_of,
)
from torch import Tensor, nn

from sottovoce.client import bag_trainer
from sottovoce.client.bag_trainer import make_bag_trainer
from sottovoce.client.batch_draws import Visits
from sottovoce.client.cohort import Chunk, Draw
from sottovoce.client.fleet import ExampleClipping
from sottovoce.client.round_sum import RoundSum
from sottovoce.privacy.mechanisms.noise_streams import KEY_BYTES, NoiseStreams

pytestmark = pytest.mark.usefixtures("kernel_level")

DEVICES = np.arange(0, 40, dtype=np.int64)
LOUD = ExampleClipping(clip_norm=1e-4, noise_multiplier=1e4)  # noise 1, next to no signal


def compared(
    model: Bag, population: Sayings, training: Any, devices: Any = DEVICES,
    parameters: dict[str, Tensor] | None = None, tolerance: float = 5e-6,
) -> tuple[RoundSum, Any]:
    """Both ways, which must agree; the sum and the updates by `GroupTrainer`."""
    chunk = chunk_of(population, training, devices)
    (slow, updates), (fast, found) = both(model, population, training, chunk, parameters)
    scale = max(float(total.abs().max()) for total in slow.sums.values())
    for name, total in slow.sums.items():
        # Without noise a signal is a difference of rounded weights.
        weights = float(parameters_of(model)[name].abs().max())
        rounded = 0.0 if training.step_deviation else 2e-7 * len(devices) * weights
        gap = float((fast.sums[name] - total).abs().max())
        assert gap <= tolerance * scale + rounded, name
    torch.testing.assert_close(fast.touched, slow.touched)
    torch.testing.assert_close(fast.lent, slow.lent)
    assert fast.levels == slow.levels and fast.dropped == slow.dropped
    assert torch.equal(found.finite, updates.finite)
    assert torch.equal(found.clipped, updates.clipped)
    assert torch.equal(found.visits, updates.visits)
    assert found.clipped_examples == updates.clipped_examples
    keep = updates.finite
    torch.testing.assert_close(found.norms[keep], updates.norms[keep], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found.losses, updates.losses, rtol=1e-5, atol=1e-5)
    assert fast.totals == pytest.approx(slow.totals, rel=1e-4)
    return slow, updates


@pytest.mark.parametrize("example", [None, CLIPPED, NOISED, AUTOMATIC])
@pytest.mark.parametrize("widths", [(), (9,), (17, 8), (16, 33, 20)])
def test_sums_are_those_of_the_grouped_engine_for_any_number_of_layers(
    widths: tuple[int, ...], example: ExampleClipping | None
) -> None:
    compared(Bag(widths), Sayings(), training_of(example))


@pytest.mark.parametrize("example", [None, NOISED])
@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("padding", [None, 0])
def test_bags_of_any_kind(mode: str, padding: int | None, example: ExampleClipping | None) -> None:
    model = Bag(mode=mode, padding=padding, bias=mode == "sum", width=16 if padding == 0 else 5)
    compared(model, Sayings(), training_of(example))


@pytest.mark.parametrize("example", [None, CLIPPED, NOISED, AUTOMATIC])
def test_sums_are_those_of_the_grouped_engine_where_updates_are_clipped(
    example: ExampleClipping | None,
) -> None:
    for clip in (1e-2, 0.2, 5.0):
        _, updates = compared(Bag(), Sayings(), training_of(example, clip))
        assert bool(updates.clipped.any()) == (clip < 1)


def test_gradients_that_are_long_or_next_to_nothing_are_clipped_alike() -> None:
    for scale in (1e-3, 30.0):
        model = Bag(mode="sum")
        parameters = {n: scale * p for n, p in parameters_of(model).items()}
        for example in (CLIPPED, AUTOMATIC):
            _, updates = compared(
                model, Sayings(), training_of(replace(example, noise_multiplier=0.0)),
                parameters=parameters, tolerance=2e-5,
            )
            assert updates.clipped_examples > 0


@pytest.mark.parametrize("example", [None, NOISED])
def test_devices_that_are_alone_or_have_uneven_steps_and_empty_batches(
    example: ExampleClipping | None,
) -> None:
    population, training = Sayings(), training_of(example, 0.2)
    training = replace(training, plan=replace(training.plan, batch_size=2))
    draws = chunk_of(population, training, DEVICES).draws
    assert len({len(draw.steps) for draw in draws}) > 1
    assert example is None or 0 in {len(step) for draw in draws for step in draw.steps}
    compared(Bag(), population, training)
    for device in (0, 3, 17):
        compared(Bag(), population, training, np.array([device]))


@pytest.mark.parametrize("example", [None, CLIPPED])
def test_any_division_into_groups_gives_the_same_sum(example: ExampleClipping | None) -> None:
    population, training, model = Sayings(), training_of(example, 0.2), Bag((9, 8))
    chunk = chunk_of(population, training, DEVICES)
    whole, _ = natively(model, population, training, chunk)
    parts, _ = natively(model, population, training, chunk, group=7)
    for name, total in whole.sums.items():
        assert torch.equal(parts.sums[name], total), name


@pytest.mark.parametrize("example", [None, NOISED])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["emb.weight", "linear.0.weight", "linear.1.bias"])
def test_rows_and_devices_that_are_not_finite_add_nothing(
    example: ExampleClipping | None, bad: float, place: str
) -> None:
    population, training, model = Sayings(), training_of(example, 0.2), Bag()
    parameters = parameters_of(model)
    chunk = chunk_of(population, training, DEVICES)
    parameters[place][chunk.batch["tokens"][0, 0] if place == "emb.weight" else -1] = bad
    (slow, updates), (fast, found) = both(model, population, training, chunk, parameters)
    assert torch.equal(found.finite, updates.finite)
    assert fast.dropped == slow.dropped and (example is not None or fast.dropped > 0)
    for name, total in slow.sums.items():
        assert bool(total.isfinite().all())
        assert_close(fast.sums[name], total, 1e-4)


def test_every_signal_keeps_within_its_bound() -> None:
    """The sum of one device without noise is its signal."""
    population, model = Sayings(), Bag(mode="sum")
    for example, bound in ((None, 0.1), (CLIPPED, 0.1), (None, 0.01), (CLIPPED, 0.01)):
        training = training_of(example, bound)
        norms = []
        for device in range(8):
            chunk = chunk_of(population, training, np.array([device]))
            total, _ = natively(model, population, training, chunk)
            norms.append(float(torch.cat([t.flatten() for t in total.sums.values()]).norm()))
        assert 0.9 * bound < max(norms) <= bound


def test_the_sums_noise_has_the_declared_variance_in_every_row() -> None:
    population, model = Sayings(400), Bag((8,), width=4)
    training = training_of(LOUD, 1e-3)
    squares: dict[str, list[Tensor]] = {"dense": [], "drawn": [], "waiting": []}
    for number in range(12):
        chunk = chunk_of(population, training, np.arange(25 * number, 25 * number + 25), number)
        keys = [(1000 * number + k).to_bytes(KEY_BYTES, "big") for k in range(25)]
        total, _ = natively(model, population, training, chunk, streams=NoiseStreams(keys))
        declared = sum(n * training.noise_variance(level) for level, n in total.levels.items())
        drawn = total.touched > 0
        sums = total.reply(np.random.default_rng(number)).sums
        table = sums.pop("emb.weight").double()
        squares["drawn"].append(table[drawn].pow(2).flatten() / declared)
        squares["waiting"].append(table[~drawn].pow(2).flatten() / declared)
        squares["dense"] += [t.double().pow(2).flatten() / declared for t in sums.values()]
    for name, parts in squares.items():
        values = torch.cat(parts)
        assert len(values) > 500, name
        assert float(values.mean()) == pytest.approx(1, abs=6 * (2 / len(values)) ** 0.5), name


def compared_counts(
    model: Bag, population: Sayings, training: Any, parameters: dict[str, Tensor]
) -> tuple[RoundSum, Any]:
    """Both ways, which must agree on who is in the sum and on what noise; not on the sum."""
    chunk = chunk_of(population, training, DEVICES)
    (slow, updates), (fast, found) = both(model, population, training, chunk, parameters)
    assert torch.equal(found.finite, updates.finite)
    assert fast.levels == slow.levels and fast.dropped == slow.dropped
    torch.testing.assert_close(fast.touched, slow.touched)
    torch.testing.assert_close(fast.lent, slow.lent)
    assert all(bool(total.isfinite().all()) for total in fast.sums.values())
    return slow, updates


def test_the_noise_of_a_device_that_is_left_out_does_not_count_as_drawn() -> None:
    population, model = Sayings(), Bag((), mode="sum")
    training = training_of(ExampleClipping(clip_norm=1e19, noise_multiplier=1e-20), rate=10.0)
    parameters = parameters_of(model)
    parameters["emb.weight"][9] = 5e18  # an update that float32 cannot hold
    slow, updates = compared_counts(model, population, training, parameters)
    assert 0 < slow.dropped < len(DEVICES) and bool(updates.finite.any())


def one_step(tokens: list[list[int]], lengths: list[int]) -> Chunk:
    """A device whose only step has these rows."""
    numbers = np.arange(len(lengths))
    batch = {"tokens": torch.tensor(tokens), "lengths": torch.tensor(lengths),
             "intent": torch.zeros(len(lengths), dtype=torch.int64)}
    ends = np.array([0, len(lengths)])
    return Chunk([Draw(0, 0, [numbers])], [numbers], batch, ends,
                 Visits(0 * numbers, 0 * numbers, numbers), ends)


def norm_of(sums: dict[str, Tensor]) -> float:
    return float(torch.cat([total.flatten() for total in sums.values()]).norm())


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("trained", [natively, together])
def test_an_example_more_moves_a_step_by_its_own_gradient_however_long_it_is(
    mode: str, padding: int | None, trained: Any
) -> None:
    """Without a word for padding too: what is behind a row's length is not the row's."""
    population, model, training = Sayings(), Bag(mode=mode, padding=padding), training_of(CLIPPED)
    parameters = {name: 30 * p for name, p in parameters_of(model).items()}
    short, long = [3, 4, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11]
    before, after = (
        trained(model, population, training, chunk, parameters)[0].sums
        for chunk in (one_step([short] * 3, [2] * 3), one_step([short] * 3 + [long], [2] * 3 + [7]))
    )
    bound = training.learning_rate * CLIPPED.clip_norm / training.plan.batch_size
    moved = norm_of({name: after[name] - total for name, total in before.items()})
    assert 0.99 * bound < moved <= (1 + 1e-5) * bound  # a difference of float32 sums


@pytest.mark.parametrize("size", [1e15, 1e18, 1e20, 1e30, 1e37, 1e38])
def test_no_example_is_too_large_for_its_bound(size: float) -> None:
    """Factors that scale gradients down are never so small that rounding shows."""
    example = ExampleClipping(clip_norm=1e-3, noise_multiplier=0.0)
    training, population = training_of(example, rate=1e-2), Sayings()
    bound = training.learning_rate * example.clip_norm / training.plan.batch_size
    for seed in range(4):
        model = Bag((), mode="sum", seed=seed)
        parameters = parameters_of(model)
        parameters["emb.weight"] *= size / parameters["emb.weight"].abs().max()
        parameters["linear.0.weight"] *= 1e-3 / size
        total, _ = natively(model, population, training, one_step([[3]], [1]), parameters)
        assert norm_of(total.sums) <= bound
        assert (norm_of(total.sums) > 0.99 * bound) == (size < 1e19)


def test_rows_of_any_kind_of_integer_are_read() -> None:
    population, training, model = Sayings(), training_of(None), Bag()
    chunk = chunk_of(population, training, DEVICES)
    expected, _ = natively(model, population, training, chunk)
    for entry in ("tokens", "lengths", "intent"):
        chunk.batch[entry] = chunk.batch[entry].int()
    found, _ = natively(model, population, training, chunk)
    for name, total in expected.sums.items():
        assert torch.equal(found.sums[name], total), name


def test_a_table_with_sparse_gradients_is_trained_too() -> None:
    model = Bag()
    model.emb.sparse = True
    assert make_bag_trainer(model, task_of(Sayings()), training_of(NOISED)) is not None


def test_a_model_whose_layers_do_not_fit_says_so() -> None:
    model = Bag()
    model.linear[1] = nn.Linear(4, INTENTS)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_bag_trainer(model, task_of(Sayings()), training_of(None))


def test_devices_that_would_draw_too_much_noise_at_once_are_trained_in_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bag_trainer, "LARGEST", 1000)
    for example in (None, CLIPPED):
        assert make_bag_trainer(Bag(), task_of(Sayings()), training_of(example)) is not None
    assert make_bag_trainer(Bag(), task_of(Sayings()), training_of(NOISED)) is None


def test_words_and_intents_that_do_not_exist_are_refused() -> None:
    population, training, model = Sayings(), training_of(None), Bag()
    for entry, value in (("tokens", 44), ("tokens", -1), ("intent", 5), ("intent", -3)):
        chunk = chunk_of(population, training, DEVICES)
        chunk.batch[entry].view(-1)[4 * LONGEST if entry == "tokens" else 3] = value
        with pytest.raises(ValueError, match="is not among those that the model knows"):
            natively(model, population, training, chunk)


def test_without_kernels_there_is_no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    population = Sayings()
    assert make_bag_trainer(Bag(), task_of(population), training_of(None)) is not None
    monkeypatch.setattr(bag_trainer, "kernels", lambda: None)
    assert make_bag_trainer(Bag(), task_of(population), training_of(None)) is None
