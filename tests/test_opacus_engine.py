"""The fallback engine equals the grouped one, takes what that cannot, and fails closed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import clipped_loop
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError, UnsupportedLayer
from sottovoce.privacy.gradients import engine
from sottovoce.privacy.gradients.clipping import Clipping
from sottovoce.privacy.gradients.micro_batches import MicroBatches

pytest.importorskip("opacus")
from sottovoce.privacy.gradients import opacus_engine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

ROWS, STEPS, WORDS, WIDTH = 6, 5, 11, 4


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build()


class Reader(nn.Module):
    """Embedding, any layer over (rows, T, WIDTH), and a head."""

    def __init__(self, inside: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=padding)
        self.inside = inside
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.inside(self.embedding(tokens))
        if isinstance(features, tuple):
            features = features[0]
        result: Tensor = self.head(features[..., :WIDTH].sum(1))
        return result


class Scaled(nn.Module):
    """A raw parameter, which no tracked leaf stands in for."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(x * self.gain))


class Tied(nn.Module):
    """The embedding's weight used once more by a functional call, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        features = torch.tanh(self.mix(self.embedding(tokens))).sum(1)
        return F.linear(features, self.embedding.weight)


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, WORDS, (rows, STEPS), generator=generator)
    return tokens, torch.randint(0, 3, (rows,), generator=generator)


def losses_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1], reduction="none")


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "plain": nn.Identity,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "lstm both ways": lambda: nn.LSTM(
        WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True
    ),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    "rnn": lambda: nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True),
    "raw parameter": Scaled,
    "group norm": lambda: nn.GroupNorm(1, STEPS),
    "twice": lambda: (lambda layer: nn.Sequential(layer, nn.Tanh(), layer))(
        nn.Linear(WIDTH, WIDTH)
    ),
}


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(float(tensor.abs().max()) for tensor in expected)
    assert scale > 0
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_clipped_sums_equal_the_slow_loop(name: str, padding: int | None) -> None:
    model = seeded(lambda: Reader((KNOWN | OTHERS)[name](), padding))
    data = batch()
    expected, norms = clipped_loop(
        model, lambda m, i: losses_of(m, (data[0][i : i + 1], data[1][i : i + 1]))[0],
        range(ROWS), 0.5,
    )
    grouped = opacus_engine.track(model)
    result = opacus_engine.backward(grouped, losses_of(grouped.module, data), 0.5, 1)
    assert list(result.sums) == [name for name, _ in model.named_parameters()]
    assert_close([total[0] for total in result.sums.values()], expected)
    torch.testing.assert_close(result.norms.double(), norms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "clipping",
    [None, 0.3, Clipping(0.3, threshold="automatic"), Clipping(0.3, threshold="layer_wise"),
     Clipping(0.3, mode="micro_batch")],
    ids=["none", "fixed", "automatic", "layer_wise", "micro_batch"],
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_both_engines_agree_in_every_mode(
    name: str, groups: int, clipping: float | Clipping | None
) -> None:
    model = seeded(lambda: Reader(KNOWN[name]()))
    data = batch()
    micro = None
    if isinstance(clipping, Clipping) and clipping.mode == "micro_batch":
        micro = MicroBatches(torch.tensor([0, 1, 0, -1, 3, 2]), 4)
    ours, theirs = engine.track(model), opacus_engine.track(model)
    expected = engine.backward(ours, losses_of(ours.module, data), clipping, groups, micro)
    found = opacus_engine.backward(theirs, losses_of(theirs.module, data), clipping, groups, micro)
    assert found.sums.keys() == expected.sums.keys()
    assert_close(list(found.sums.values()), list(expected.sums.values()))
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-4, atol=1e-6)


def test_an_optimiser_step_moves_the_model_that_was_tracked() -> None:
    model = seeded(lambda: Reader(KNOWN["lstm"]()))
    grouped = opacus_engine.track(model)
    before = grouped.module(batch()[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert not torch.allclose(before, grouped.module(batch()[0]))
    torch.testing.assert_close(grouped.module(batch()[0]), model(batch()[0]))


def test_a_stack_given_new_data_is_what_the_model_computes_on() -> None:
    model = seeded(lambda: Reader(KNOWN["lstm"]()))
    grouped = opacus_engine.group(model, 1)
    assert grouped.shapes() == {name: p.shape for name, p in model.named_parameters()}
    tokens = batch()[0]
    torch.testing.assert_close(grouped.module(tokens), model(tokens))
    grouped.parameters["head.bias"].data = torch.full((1, 3), 7.0)
    torch.testing.assert_close(
        grouped.module(tokens), model(tokens) - model.head.bias + 7.0  # type: ignore[operator]
    )
    with pytest.raises(ValueError, match="one device after another"):
        opacus_engine.group(model, 2)


@pytest.mark.parametrize("name", ["lstm", "gru", "raw parameter"])
def test_an_empty_batch_sums_to_zero(name: str) -> None:
    model = seeded(lambda: Reader((KNOWN | OTHERS)[name]()))
    grouped = opacus_engine.track(model)
    empty = (torch.zeros((0, STEPS), dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    result = opacus_engine.backward(grouped, losses_of(grouped.module, empty), 1.0, 1)
    assert len(result.norms) == 0
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(result.sums[parameter_name], torch.zeros(1, *parameter.shape))


def test_a_row_without_a_finite_gradient_contributes_nothing() -> None:
    model = seeded(lambda: Reader(nn.Identity()))
    grouped = opacus_engine.track(model)
    data = batch()
    factor = torch.ones(ROWS)
    factor[2] = float("nan")
    result = opacus_engine.backward(grouped, losses_of(grouped.module, data) * factor, 0.5, 1)
    assert torch.isfinite(result.norms).tolist() == [row != 2 for row in range(ROWS)]
    keep = [row for row in range(ROWS) if row != 2]
    rest = (data[0][keep], data[1][keep])
    expected = opacus_engine.backward(grouped, losses_of(grouped.module, rest), 0.5, 1)
    assert_close(list(result.sums.values()), list(expected.sums.values()))


def test_frozen_layers_are_left_alone() -> None:
    model = seeded(lambda: Reader(KNOWN["lstm"]()))
    model.embedding.requires_grad_(False)  # type: ignore[operator, union-attr]
    model.inside.requires_grad_(False)  # type: ignore[operator, union-attr]
    grouped = opacus_engine.track(model)
    result = opacus_engine.backward(grouped, losses_of(grouped.module, batch()), 0.5, 1)
    assert list(result.sums) == ["head.weight", "head.bias"]


# -- failing closed --------------------------------------------------------------------------------


def test_a_weight_used_behind_the_layers_back_is_refused() -> None:
    grouped = opacus_engine.track(seeded(Tied))
    with pytest.raises(UnsupportedLayer, match=r"'embedding\.weight' do not add up"):
        opacus_engine.backward(grouped, losses_of(grouped.module, batch()), 0.5, 1)


def test_a_layer_that_opacus_cannot_take_is_named() -> None:
    attention = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    model = seeded(lambda: Reader(attention))
    grouped = opacus_engine.track(model)
    with pytest.raises(UnsupportedLayer, match=r"engine=opacus .*inside\.self_attn"):
        opacus_engine.backward(grouped, losses_of(grouped.module, batch()), 0.5, 1)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nn.BatchNorm1d(STEPS), r"inside \(BatchNorm1d\) mixes"),
        (lambda: nn.InstanceNorm1d(STEPS, track_running_stats=True), "mixes"),
        (lambda: nn.LSTM(WIDTH, 6, proj_size=WIDTH, batch_first=True), r"inside \(LSTM\)"),
        (lambda: nn.LSTM(WIDTH, WIDTH, 2, dropout=0.1, batch_first=True), r"inside \(LSTM\)"),
    ],
)
def test_layers_without_an_exact_form_are_refused(
    layer: Callable[[], nn.Module], words: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=words):
        opacus_engine.track(seeded(lambda: Reader(layer())))


class Mixed(Reader):
    """Centred over the batch by an operation that no layer sees."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        return logits - logits.mean(0, keepdim=True)


def test_rows_that_mix_are_refused() -> None:
    grouped = opacus_engine.track(seeded(lambda: Mixed(KNOWN["lstm"]())))
    with pytest.raises(UnsupportedLayer, match="from the loss of another"):
        opacus_engine.backward(grouped, losses_of(grouped.module, batch()), 0.5, 1)


def test_evaluation_mode_is_refused_not_released() -> None:
    grouped = opacus_engine.track(seeded(lambda: Reader(nn.Identity())))
    grouped.module.eval()
    with pytest.raises(UnsupportedLayer):
        opacus_engine.backward(grouped, losses_of(grouped.module, batch()), 0.5, 1)


def test_a_missing_opacus_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sottovoce.privacy.gradients.opacus_layers", raising=False)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample.embedding", None)
    with pytest.raises(ConfigError, match=r'pip install "sottovoce\[opacus\]"'):
        opacus_engine.track(seeded(lambda: Reader(nn.Identity())))
