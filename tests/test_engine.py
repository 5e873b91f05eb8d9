"""Clipped sums and norms equal the per-example loop, for random models; the engine fails closed."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import clipped_loop
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy import clipped_gradients
from sottovoce.privacy.gradients.clipping import clip_factors
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import group, ungroup

VOCABULARY, CLASSES = 13, 5


class Net(nn.Module):
    """A random stack of every supported layer; its input is token ids (rows, T)."""

    def __init__(
        self, *, width: int, layers: int, bidirectional: bool, bias: bool, tied: bool, twice: bool
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.position = nn.Embedding(20, width)
        self.lstm = nn.LSTM(
            width, 4, layers, batch_first=True, bidirectional=bidirectional, bias=bias
        )
        self.back = nn.Linear(8 if bidirectional else 4, width, bias=bias)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, VOCABULARY if tied else CLASSES, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.twice = twice

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1]).unsqueeze(0)
        x = self.embedding(tokens) + self.position(place)
        x = x + self.back(self.lstm(x)[0])
        if self.twice:
            x = x + torch.tanh(self.back(self.lstm(x)[0]))
        return self.head(self.norm(x))


nets = st.builds(
    Net,
    width=st.sampled_from([3, 6]),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    tied=st.booleans(),
    twice=st.booleans(),
)


def losses_of(module: nn.Module, tokens: Tensor) -> Tensor:
    logits = module(tokens)
    labels = (tokens * 7) % logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
        tokens.shape
    ).sum(1)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    largest = max(float(e.abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert float((a - e).abs().max()) <= tolerance * max(largest, 1e-6)


@settings(max_examples=25, deadline=None)
@given(
    net=nets,
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2, 3]),
    length=st.integers(1, 7),
)
def test_clipped_sums_equal_the_per_example_loop(
    net: Net, seed: int, groups: int, length: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    tokens = torch.randint(0, VOCABULARY, (groups * 4, length), generator=generator)
    clip = 0.9
    sums, norms = clipped_gradients(net, lambda m: losses_of(m, tokens), clip, groups)
    for k in range(groups):
        rows = range(4 * k, 4 * k + 4)
        expected, expected_norms = clipped_loop(
            net, lambda m, r: losses_of(m, tokens[r : r + 1])[0], rows, clip
        )
        assert_close([s[k] for s in sums], expected, 2e-6)
        assert torch.allclose(norms[4 * k : 4 * k + 4], expected_norms, rtol=1e-9)


@settings(max_examples=10, deadline=None)
@given(net=nets, seed=st.integers(0, 2**31))
def test_one_example_never_releases_more_than_the_threshold(net: Net, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (6, 5), generator=generator)
    clip = 0.05
    sums, norms = clipped_gradients(net, lambda m: losses_of(m, tokens), clip, groups=6)
    released = torch.stack([s.double().flatten(1).pow(2).sum(1) for s in sums]).sum(0).sqrt()
    assert bool((norms > clip).all())
    assert float(released.max()) <= clip


def test_stacked_weights_train_each_group_as_if_alone() -> None:
    torch.manual_seed(0)
    net = Net(width=6, layers=2, bidirectional=True, bias=True, tied=True, twice=True)
    tokens = torch.randint(0, VOCABULARY, (12, 5))
    together = group(net, 3)
    for name, stack in together.parameters.items():
        generator = torch.Generator().manual_seed(len(name))
        stack.data += torch.randn(stack.shape, generator=generator) * 0.1
    sums = backward(together, losses_of(together.module, tokens), 0.7, 3).sums
    for k in range(3):
        alone = copy.deepcopy(net)
        alone.load_state_dict(ungroup(together, k), strict=False)
        mine = tokens[4 * k : 4 * k + 4]
        expected, _ = clipped_gradients(alone, partial(losses_of, tokens=mine), 0.7)
        assert_close([s[k] for s in sums.values()], [e[0] for e in expected], 1e-5)


def test_the_model_is_left_as_it_was() -> None:
    net = Net(width=3, layers=1, bidirectional=False, bias=True, tied=False, twice=False)
    before = copy.deepcopy(net.state_dict())
    tokens = torch.randint(0, VOCABULARY, (4, 3))
    clipped_gradients(net, lambda m: losses_of(m, tokens), 1.0)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert type(net.lstm) is nn.LSTM


def test_frozen_parameters_give_no_tensor_and_do_not_count_in_the_norm() -> None:
    net = Net(width=3, layers=1, bidirectional=False, bias=True, tied=False, twice=False).double()
    net.embedding.requires_grad_(False)
    net.lstm.bias_hh_l0.requires_grad_(False)
    net.norm.bias.requires_grad_(False)
    tokens = torch.randint(1, VOCABULARY, (4, 3))
    sums, norms = clipped_gradients(net, lambda m: losses_of(m, tokens), 0.5)
    expected, expected_norms = clipped_loop(
        net, lambda m, r: losses_of(m, tokens[r : r + 1])[0], range(4), 0.5
    )
    assert_close([s[0] for s in sums], expected, 2e-6)
    assert torch.allclose(norms, expected_norms)


def test_a_row_that_is_not_finite_contributes_nothing() -> None:
    net = Net(width=3, layers=1, bidirectional=False, bias=True, tied=False, twice=False)
    tokens = torch.randint(1, VOCABULARY, (4, 3))
    poison = torch.tensor([1.0, float("nan"), 1.0, float("inf")])
    sums, norms = clipped_gradients(net, lambda m: losses_of(m, tokens) * poison, 0.5)
    expected, _ = clipped_gradients(net, lambda m: losses_of(m, tokens[[0, 2]]), 0.5)
    assert torch.isfinite(norms).tolist() == [True, False, True, False]
    assert_close([s[0] for s in sums], [e[0] for e in expected], 1e-5)


class FunctionalTie(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.embedding(tokens)), self.embedding.weight)


class RawParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(3, 4))
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens) + self.place)


def test_a_weight_used_behind_the_leafs_back_is_refused() -> None:
    net = FunctionalTie(width=3, layers=1, bidirectional=False, bias=True, tied=False, twice=False)
    tokens = torch.randint(1, VOCABULARY, (4, 3))
    with pytest.raises(UnsupportedLayer, match="embedding.weight.*outside its own layer"):
        clipped_gradients(net, lambda m: losses_of(m, tokens), 1.0)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (RawParameter(), "RawParameter.*freeze it"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "GroupNorm or LayerNorm"),
        (nn.Sequential(nn.Bilinear(3, 3, 3)), "Bilinear.*opacus"),
    ],
)
def test_layers_without_a_per_row_form_are_refused_with_a_remedy(
    model: nn.Module, match: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=match):
        clipped_gradients(model, lambda m: m(torch.zeros(2, 3)).sum(1), 1.0)


def test_a_layer_that_mixes_rows_by_its_input_is_refused() -> None:
    net = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with pytest.raises(UnsupportedLayer, match="first dimension"):
        clipped_gradients(net, lambda m: m(x.mean(0, keepdim=True)).sum(1).expand(4), 1.0)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_an_impossible_threshold_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip_norm"):
        clipped_gradients(nn.Linear(2, 1), lambda m: m(torch.zeros(1, 2))[:, 0], clip)


def test_rows_must_divide_into_groups() -> None:
    with pytest.raises(ValueError, match="groups=2"):
        clipped_gradients(nn.Linear(2, 1), lambda m: m(torch.ones(3, 2))[:, 0], 1.0, groups=2)


def test_clipping_is_a_projection() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 500, 3, generator=generator, dtype=torch.float64) * 2
    pa, pb = (x * clip_factors(x.norm(dim=1), 1.0, 1).unsqueeze(1) for x in (a, b))
    assert bool(((pa - pb).norm(dim=1) <= (a - b).norm(dim=1) * (1 + 1e-12)).all())


def test_half_precision_activations_keep_float32_norms() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(8, 64) * 300
    exact, norms = clipped_gradients(net, lambda m: m(x).pow(2).sum(1), 1.0)
    half, half_norms = clipped_gradients(
        net.bfloat16(), lambda m: m(x.bfloat16()).float().pow(2).sum(1), 1.0
    )
    assert half[0].dtype == torch.float32
    assert torch.allclose(half_norms, norms, rtol=0.05)
    assert bool(torch.isfinite(half_norms).all())
