"""`EDPSGD` and what stands around it: batches, virtual steps, resuming, Opacus' names, the docs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sottovoce.privacy import EDPSGD, Ledger, NoiseSource, PoissonBatches, epsilon
from sottovoce.privacy.gradients.micro_batches import MicroBatches
from sottovoce.privacy.optimizer.batches import emptied

DOCS = Path(__file__).parents[1] / "docs"
BASE: dict[str, Any] = {
    "lr": 0.5, "clip_norm": 0.5, "noise_multiplier": 1.0, "expected_batch_size": 8
}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def data_of(rows: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rows, 4).double(), torch.randint(0, 3, (rows,))


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def made(**settings: Any) -> EDPSGD:
    seeded = {"generator": NoiseSource.from_seed(7)}
    return EDPSGD(model_of(), **{**BASE, **seeded, **settings})


def trained(steps: int = 3, **settings: Any) -> Tensor:
    optimizer = made(**settings)
    for step in range(steps):
        optimizer.step(losses_of(optimizer.model, *data_of(seed=step)))
    return vector(optimizer.model)


# -- virtual steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", ["fixed", "automatic", "quantile", "layer_wise"])
@pytest.mark.parametrize("last", ["step", "accumulate"])
def test_virtual_steps_are_one_step_on_the_big_batch(threshold: Any, last: str) -> None:
    x, y = data_of()
    parts, big = made(threshold=threshold), made(threshold=threshold)
    for _ in range(2):
        norms = [parts.accumulate(losses_of(parts.model, x[:4], y[:4]))]
        parts.zero_grad()
        norms.append(parts.accumulate(losses_of(parts.model, x[4:4], y[4:4])))
        before = vector(parts.model)
        if last == "step":
            norms.append(parts.step(losses_of(parts.model, x[4:], y[4:])))
        else:
            norms.append(parts.accumulate(lambda m: losses_of(m, x[4:], y[4:])))
            parts.step()
        assert not torch.equal(before, vector(parts.model))
        torch.testing.assert_close(torch.cat(norms), big.step(losses_of(big.model, x, y)))
    torch.testing.assert_close(vector(parts.model), vector(big.model), rtol=1e-12, atol=1e-14)
    assert parts.ledger == big.ledger and len(big.ledger) == 2
    assert parts.clip_norm == pytest.approx(big.clip_norm)


def test_what_is_accumulated_is_not_released_and_is_gone_after_the_step() -> None:
    optimizer, other = made(noise_multiplier=0.0), made(noise_multiplier=0.0)
    before = vector(optimizer.model)
    optimizer.accumulate(losses_of(optimizer.model, *data_of()))
    assert torch.equal(before, vector(optimizer.model)) and len(optimizer.ledger) == 0
    optimizer.step()
    after = vector(optimizer.model)
    optimizer.step(torch.zeros(0))
    assert torch.equal(after, vector(optimizer.model))
    other.step(losses_of(other.model, *data_of()))
    assert torch.equal(after, vector(other.model))


def test_micro_batches_are_not_cut_by_virtual_steps() -> None:
    optimizer = made(clipping="micro_batch", micro_batch_size=2)
    optimizer.accumulate(losses_of(optimizer.model, *data_of()))
    with pytest.raises(ValueError, match="a micro-batch must be seen whole"):
        optimizer.accumulate(losses_of(optimizer.model, *data_of()))


def test_calls_of_the_usual_loop_that_would_lose_a_batch_are_refused() -> None:
    optimizer = made()
    with pytest.raises(ValueError, match="in place of loss.backward"):
        optimizer.step()
    loss = losses_of(optimizer.model, *data_of())
    with pytest.raises(ValueError, match=r"one loss per row \(reduction='none'\)"):
        optimizer.step(loss.mean())
    loss.mean().backward()
    assert all(p.grad is None for p in optimizer.model.parameters())
    with pytest.raises(ValueError, match="another backward pass came before"):
        optimizer.step(losses_of(optimizer.model, *data_of()))
    assert len(optimizer.ledger) == 0
    optimizer.step(losses_of(optimizer.model, *data_of()))
    assert torch.equal(vector(optimizer.model), first_step())


def first_step() -> Tensor:
    optimizer = made()
    optimizer.step(losses_of(optimizer.model, *data_of()))
    return vector(optimizer.model)


# -- modes -----------------------------------------------------------------------------------------


def test_a_micro_batch_step_is_the_mean_of_clipped_means() -> None:
    x, y = data_of()
    optimizer = made(clipping="micro_batch", micro_batch_size=2, noise_multiplier=0.0)
    before, plain = vector(optimizer.model), model_of()
    coins = NoiseSource.from_seed(7).generator("micro-batches", 0, 0)
    unit = MicroBatches.drawn(9, 4, coins).unit
    total = torch.zeros_like(before)
    for at in range(4):
        own = unit == at
        if own.any():
            grads = torch.autograd.grad(losses_of(plain, x[own], y[own]).mean(),
                                        list(plain.parameters()))
            mean = torch.cat([g.flatten() for g in grads])
            total += mean * min(1.0, 0.5 / float(mean.norm()))
    norms = optimizer.step(losses_of(optimizer.model, x, y))
    assert norms.shape == (4,)
    torch.testing.assert_close(before - vector(optimizer.model), 0.5 * total / 4,
                               rtol=1e-5, atol=1e-9)


def test_every_step_writes_its_own_sigma() -> None:
    optimizer = made(noise="decay", noise_decay=0.5, steps_per_epoch=2, noise_multiplier=4.0,
                     clipping="micro_batch", micro_batch_size=4, sampling_rate=0.1)
    for expected in (4, 4, 2, 2, 1):
        assert optimizer.noise_multiplier == expected
        optimizer.step(torch.zeros(0))
    sigmas = [event.noise_multiplier for event in optimizer.ledger.events]  # type: ignore
    assert sigmas == [2, 2, 1, 1, 0.5]
    derived = made(noise="decay", noise_decay=0.5, sampling_rate=0.1)
    assert derived.release.schedule.steps_per_epoch == 10


@pytest.mark.parametrize(("settings", "factor"), [
    ({}, 3.0 * 0.5 / 8),
    ({"noise": "decay", "noise_decay": 0.5, "steps_per_epoch": 1}, 3.0 * 0.5 / 8 * 0.625**0.5),
    ({"threshold": "quantile", "count_noise": 1e6}, 3.0 * 0.5 / 8),
    ({"threshold": "quantile", "count_noise": 1.6, "quantile_learning_rate": 1e-9},
     (1 / 9 - 1 / 10.24) ** -0.5 * 0.5 / 8),
    ({"clipping": "micro_batch", "micro_batch_size": 4}, 3.0 * 0.5 / 2),
])  # fmt: skip
def test_the_noise_is_as_wide_as_the_ledger_says(settings: dict[str, Any], factor: float) -> None:
    model = nn.Linear(400, 100)
    start = vector(model)
    optimizer = EDPSGD(model, **{**BASE, "lr": 1.0, "noise_multiplier": 3.0, **settings})
    count = 2 if "noise" in settings else 1
    for _ in range(count):
        optimizer.step(torch.zeros(0))
    moved = vector(model) - start
    assert float(moved.std()) == pytest.approx(factor * count**0.5,
                                               rel=5 / (2 * len(moved)) ** 0.5)


# -- optimisers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [
    ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)),
    ({"optimizer": "adam", "betas": (0.8, 0.9), "weight_decay": 0.3},
     lambda p: torch.optim.AdamW(p, lr=0.5, betas=(0.8, 0.9), weight_decay=0.3, eps=1e-12)),
    ({"weight_decay": 0.3}, lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.3)),
])  # fmt: skip
def test_without_noise_and_clipping_optimisers_are_torchs(
    ours: dict[str, Any], theirs: Callable[[Any], torch.optim.Optimizer]
) -> None:
    optimizer = made(noise_multiplier=0.0, clip_norm=1e6, expected_batch_size=9, **ours)
    plain = model_of()
    reference = theirs(plain.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    other = torch.optim.lr_scheduler.StepLR(reference, 1, gamma=0.5)
    for step in range(4):
        x, y = data_of(seed=step)
        optimizer.step(losses_of(optimizer.model, x, y))
        reference.zero_grad()
        losses_of(plain, x, y).mean().backward()
        reference.step()
        scheduler.step()
        other.step()
    assert optimizer.lr == 0.5 / 16
    torch.testing.assert_close(vector(optimizer.model), vector(plain), rtol=1e-6, atol=1e-8)


def test_adam_is_told_the_noise_of_the_steps_it_averages() -> None:
    optimizer = made(optimizer="adam", betas=(0.9, 0.5), noise="decay", noise_decay=0.5,
                     steps_per_epoch=1)
    for _ in range(2):
        optimizer.step(torch.zeros(0))
    first, second = (0.5 / 8) ** 2, (0.25 / 8) ** 2
    expected = (0.25 * first + 0.5 * second) / 0.75
    assert optimizer._moves.descent.noise_variance == pytest.approx(expected)  # type: ignore


def test_frozen_parts_stay_and_get_no_noise() -> None:
    model = model_of()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    optimizer = EDPSGD(model, weight_decay=0.1, **BASE)
    optimizer.step(losses_of(optimizer.model, *data_of()))
    assert all(torch.equal(before[key], value) for key, value in model[0].state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"threshold": "layer_wise"}, {"optimizer": "adam"},
                                      {"clipping": "micro_batch", "micro_batch_size": 3}])
def test_the_opacus_engine_takes_the_same_steps(settings: dict[str, Any]) -> None:
    pytest.importorskip("opacus")
    torch.testing.assert_close(trained(engine="opacus", **settings), trained(**settings),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_takes_the_same_steps(backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    settings = {**BASE, "generator": NoiseSource.from_seed(1)}
    optimizer, plain = (EDPSGD(copy.deepcopy(model), **settings) for _ in range(2))
    compiled = torch.compile(optimizer.model, backend=backend)
    for seed in range(2):
        x, y = data_of(seed=seed)
        optimizer.step(losses_of(compiled, x, y))
        plain.step(losses_of(plain.model, x, y))
    torch.testing.assert_close(vector(optimizer.model), vector(plain.model))


@pytest.mark.parametrize(("settings", "match"), [
    ({"max_grad_norm": 2.0}, "two names of one bound"),
    ({"micro_batch_size": 4}, "needs clipping=micro_batch"),
    ({"clipping": "micro_batch"}, "micro_batch_size=None must be given"),
    ({"clipping": "flat"}, "clipping='flat' does not exist"),
    ({"threshold": "magic"}, "threshold='magic' does not exist"),
    ({"noise": "pink"}, "noise='pink' does not exist"),
    ({"noise": "decay"}, "needs noise_decay"),
    ({"noise_decay": 0.9}, "noise_decay=0.9 needs noise=decay"),
    ({"noise": "decay", "noise_decay": 0.9}, "needs steps_per_epoch"),
    ({"noise": "decay", "noise_decay": 1.1, "steps_per_epoch": 2}, "noise_decay=1.1 must be"),
    ({"count_noise": 1.0}, "needs threshold=quantile"),
    ({"threshold": "quantile", "count_noise": 0.4}, "count_noise=0.4 must be above"),
    ({"optimizer": "lamb"}, "optimizer=lamb does not exist"),
    ({"optimizer": "adam", "momentum": 0.9}, "has no meaning for adam"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0 must be"),
    ({"betas": (1.0, 0.9)}, "betas="),
    ({"engine": "jax"}, "engine='jax' does not exist"),
    ({"clip_norm": [1.0, 2.0]}, "must be one number"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused_in_one_line(
    settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(Exception, match=re.escape(match)) as error:
        made(**settings)
    assert "\n" not in str(error.value)


def test_max_grad_norm_is_the_clip_norm() -> None:
    assert made(clip_norm=None, max_grad_norm=2.5).clip_norm == 2.5
    assert made(max_grad_norm=0.5).clip_norm == 0.5
    assert made(clip_norm=None).clip_norm == 1.0


# -- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"optimizer": "adam"},
                                      {"threshold": "quantile"},
                                      {"noise": "decay", "noise_decay": 0.5, "steps_per_epoch": 1}])
def test_a_resumed_run_with_a_seed_is_the_run_in_one_go(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    optimizer = made(**settings)
    optimizer.step(losses_of(optimizer.model, *data_of(seed=0)))
    optimizer.lr = 0.25
    torch.save({"optimizer": optimizer.state_dict(), "model": optimizer.model.state_dict()},
               tmp_path / "state.pt")
    optimizer.step(losses_of(optimizer.model, *data_of(seed=1)))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = made(**settings, ledger=Ledger(optimizer.ledger.events[:1]))
    resumed.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    resumed.step(losses_of(resumed.model, *data_of(seed=1)))
    torch.testing.assert_close(vector(resumed.model), vector(optimizer.model))
    assert resumed.ledger == optimizer.ledger and resumed.clip_norm == optimizer.clip_norm


@pytest.mark.parametrize("secret", [True, False])
def test_no_resume_repeats_noise_that_protects_somebody(secret: bool) -> None:
    source = NoiseSource.from_system() if secret else None
    moves = []
    for _ in range(3):
        optimizer = made(generator=source, ledger=Ledger(made_events(5)))
        if len(moves):
            optimizer.load_state_dict(made_state(5))
        before = vector(optimizer.model)
        optimizer.step(torch.zeros(0))
        moves.append(vector(optimizer.model) - before)
    assert all(not torch.allclose(a, b) for a, b in zip(moves, moves[1:], strict=False))


def made_state(steps: int) -> dict[str, Any]:
    optimizer = made()
    for _ in range(steps):
        optimizer.step(torch.zeros(0))
    return optimizer.state_dict()


def made_events(steps: int) -> list[Any]:
    return [made().release.event(step) for step in range(steps)]


def test_a_resume_that_would_hide_or_repeat_something_is_refused() -> None:
    state = made_state(2)
    with pytest.raises(ValueError, match="ledger has 0 events and the state 2 steps"):
        made().load_state_dict(state)
    plain = made(generator=np.random.default_rng(1), ledger=Ledger(made_events(2)))
    with pytest.raises(ValueError, match="may repeat the noise of the first 2 steps"):
        plain.load_state_dict(state)
    with pytest.raises(ValueError, match="state of SGD, not of AdamBC"):
        made(optimizer="adam", ledger=Ledger(made_events(2))).load_state_dict(state)
    busy = made()
    busy.accumulate(losses_of(busy.model, *data_of()))
    with pytest.raises(ValueError, match="no noise yet"):
        busy.state_dict()


# -- Poisson batches -------------------------------------------------------------------------------


def test_every_example_enters_every_batch_by_its_own_coin() -> None:
    plan = PoissonBatches(50, 0.2, steps=4000, generator=np.random.default_rng(0))
    drawn = np.zeros((4000, 50))
    for row, index in zip(drawn, plan, strict=True):
        row[index.numpy()] = 1
    assert np.abs(drawn.mean(0) - 0.2).max() < 5 * math.sqrt(0.16 / 4000)
    assert drawn.sum(1).var() == pytest.approx(50 * 0.16, rel=0.15)  # binomial, not fixed
    between = np.corrcoef(drawn.T) - np.eye(50)
    over_time = np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]
    assert np.abs(between).max() < 0.09 and abs(over_time) < 0.08


def test_lengths_are_epochs_or_steps() -> None:
    assert len(PoissonBatches(100, 0.1)) == 10
    assert len(PoissonBatches(100, 0.1, epochs=3)) == 30
    plan = PoissonBatches(100, 0.3, steps=7)
    assert len(plan) == len(list(plan)) == 7 and plan.expected_batch_size == 30
    first, second = (torch.cat(list(plan)) for _ in range(2))
    assert not torch.equal(first, second)
    for bad in ({"sampling_rate": 0.0}, {"sampling_rate": 0.1, "steps": 1, "epochs": 1},
                {"sampling_rate": 0.1, "data": 0},
                {"sampling_rate": 0.1, "data": (torch.zeros(2), torch.zeros(3))}):
        with pytest.raises(ValueError):
            PoissonBatches(**{"data": 10, **bad})  # type: ignore[arg-type]


def test_batches_leave_torchs_and_numpys_global_generators_alone() -> None:
    optimizer, data = made(), data_of()
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore
    list(PoissonBatches(data, 0.3, steps=3))
    optimizer.step(losses_of(optimizer.model, *data))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], other)  # type: ignore


class Sentences(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"words": torch.full((4,), at), "label": at % 3, "text": f"example {at}"}


@pytest.mark.parametrize("rate", [1e-9, 0.5])
def test_batches_of_any_form_may_be_empty(rate: float) -> None:
    x, y = data_of(12)
    for data in ((x, y), TensorDataset(x, y)):
        for inputs, labels in PoissonBatches(data, rate, steps=3):
            assert inputs.shape == (len(labels), 4) and inputs.dtype == x.dtype
    for batch in PoissonBatches(Sentences(), rate, steps=3):
        assert batch["words"].shape == (len(batch["label"]), 4)
        assert len(batch["text"]) == len(batch["label"])
    assert emptied([torch.ones(3, 2), {"a": torch.ones(3)}])[1]["a"].shape == (0,)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.gru(self.lstm(self.table(words))[0])[0]
        return self.head(self.norm(hidden).mean(1))


@pytest.mark.parametrize("settings", [{}, {"clipping": "micro_batch", "micro_batch_size": 2},
                                      {"threshold": "quantile"}])
def test_empty_batches_go_through_model_and_step(settings: dict[str, Any]) -> None:
    optimizer = EDPSGD(Reader(), sampling_rate=0.01, **{**BASE, **settings})
    before = vector(optimizer.model)
    for words, labels in PoissonBatches(
        (torch.arange(48).view(12, 4) % 12, torch.arange(12) % 3), 1e-9, steps=2
    ):
        optimizer.step(F.cross_entropy(optimizer.model(words), labels, reduction="none"))
    assert len(optimizer.ledger) == 2
    assert bool((vector(optimizer.model) != before).all())


# -- Opacus' names ---------------------------------------------------------------------------------


def private(**settings: Any) -> tuple[nn.Module, EDPSGD, DataLoader[Any]]:
    model = nn.Linear(4, 3).double()
    defaults = {
        "module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "data_loader": DataLoader(TensorDataset(*data_of(100)), batch_size=10, shuffle=True),
        "noise_multiplier": 1.0, "max_grad_norm": 1.0,
    }
    return EDPSGD.make_private(**{**defaults, **settings})


def test_make_private_returns_what_opacus_returns() -> None:
    model, optimizer, loader = private(noise_generator=NoiseSource.from_seed(1))
    sizes = []
    for _ in range(4):
        for x, y in loader:
            sizes.append(len(x))
            optimizer.zero_grad()
            optimizer.step(losses_of(model, x, y))
    assert len(loader) == 10 and len(set(sizes)) > 3
    assert np.mean(sizes) == pytest.approx(10, abs=2.5)
    event = optimizer.ledger.events[0]
    assert (event.sampling, event.sampling_rate, len(optimizer.ledger)) == (  # type: ignore
        "poisson", 0.1, 40)
    assert (optimizer.expected_batch_size, optimizer.lr) == (10, 0.1)
    assert optimizer.get_epsilon(1e-5) == epsilon(optimizer.ledger, 1e-5)


def test_opacus_clipping_names_are_understood() -> None:
    assert private(clipping="per_layer")[1].release.rule.threshold == "layer_wise"
    assert private(clipping="adaptive")[1].release.quantile is not None
    micro = private(clipping="micro_batch", micro_batch_size=5)[1]
    assert micro.release.expected_units == 2


@pytest.mark.parametrize("clipping", ["flat", "micro_batch"])
def test_make_private_with_epsilon_keeps_its_promise(clipping: str) -> None:
    model = nn.Linear(4, 3).double()
    extra = {"micro_batch_size": 2} if clipping == "micro_batch" else {}
    model, optimizer, loader = EDPSGD.make_private_with_epsilon(
        module=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(*data_of(100)), batch_size=20),
        target_epsilon=3.0, target_delta=1e-4, epochs=4, max_grad_norm=1.0, clipping=clipping,
        **extra,
    )
    for _ in range(4):
        for x, y in loader:
            optimizer.step(losses_of(model, x, y))
    assert 2.9 < optimizer.get_epsilon(1e-4) <= 3.0


@pytest.mark.parametrize(("settings", "match"), [
    ({"poisson_sampling": False}, "no epsilon under add/remove"),
    ({"max_grad_norm": [1.0, 2.0]}, "must be one number"),
    ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)}, "freeze it"),
    ({"optimizer": "RMSprop"}, "RMSprop has no private form"),
    ({"optimizer": "nesterov"}, "nesterov=True is not supported"),
])  # fmt: skip
def test_what_has_no_private_equivalent_is_refused(settings: dict[str, Any], match: str) -> None:
    model = nn.Linear(4, 3).double()
    named = {
        "RMSprop": torch.optim.RMSprop(model.parameters()),
        "nesterov": torch.optim.SGD(model.parameters(), lr=1, momentum=0.5, nesterov=True),
    }
    chosen = settings.get("optimizer")
    if isinstance(chosen, str):
        settings = {**settings, "optimizer": named[chosen]}
    with pytest.raises(ValueError, match=match) as error:
        private(**{"module": model, **settings} if isinstance(chosen, str) else settings)
    assert "\n" not in str(error.value)


# -- the docs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["python.md", "micro-batches.md"])
def test_every_printed_example_runs(
    page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "simulate(" not in block:  # a whole run, which tests/test_cli.py makes
            exec(compile(block, page, "exec"), names)
