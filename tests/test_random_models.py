"""Random architectures of all tracked layers: sums and norms equal the loop's, groups lone runs'.

A model is a random sequence of blocks over (rows, T, WIDTH), from token ids to a row's loss.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import clipped_loop
from torch import Tensor, nn

from sottovoce.privacy import EDPSGD, NoiseSource, clipped_gradients
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import group, ungroup

VOCABULARY, WIDTH, ROWS, CLIP = 9, 4, 2, 0.5


class Block(nn.Module):
    """A residual step around one kind of layer."""

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.layer = {
            "linear": lambda: nn.Linear(WIDTH, WIDTH, bias=bias),
            "layer_norm": lambda: nn.LayerNorm(WIDTH, bias=bias),
            "rms_norm": lambda: nn.RMSNorm(WIDTH),
            "group_norm": lambda: nn.GroupNorm(2, WIDTH),
            "conv": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding="same", bias=bias),
            "depthwise": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=bias),
            "lstm": lambda: nn.LSTM(
                WIDTH, WIDTH // 2, bidirectional=True, bias=bias, batch_first=True),
            "gru": lambda: nn.GRU(
                WIDTH, WIDTH // 2, 2, bidirectional=True, bias=bias, batch_first=True),
            "attention": lambda: nn.MultiheadAttention(WIDTH, 2, bias=bias, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(
                WIDTH, 2, 5, dropout=0.0, bias=bias, batch_first=True),
        }[kind]()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("conv", "depthwise", "group_norm"):
            return x + torch.tanh(self.layer(x.transpose(1, 2)).transpose(1, 2))
        if self.kind == "attention":
            return x + torch.tanh(self.layer(x, x, x, need_weights=False)[0])
        out = self.layer(x)
        return x + torch.tanh(out[0] if isinstance(out, tuple) else out)


KINDS = (
    "linear", "layer_norm", "rms_norm", "group_norm", "conv", "depthwise", "lstm", "gru",
    "attention", "encoder",
)  # fmt: skip


class Net(nn.Module):
    """`path`: which of the blocks come one after another; a block may come twice."""

    def __init__(
        self, kinds: list[str], path: list[int], bias: bool, tied: bool, bag: bool, frozen: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position = nn.Embedding(8, WIDTH)
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, padding_idx=0) if bag else None
        self.blocks = nn.ModuleList(Block(kind, bias) for kind in kinds)
        self.path = [at % len(kinds) for at in path]
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        for at, parameter in enumerate(self.parameters()):
            parameter.requires_grad_(not frozen or at % (frozen + 1) == 0)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1]).unsqueeze(0)
        x = self.embedding(tokens) + self.position(place)
        if self.bag is not None:
            x = x + self.bag(tokens).unsqueeze(1)
        for at in self.path:
            x = self.blocks[at](x)
        return self.head(x)


def scattered(net: Net, seed: int) -> Net:
    generator = torch.Generator().manual_seed(seed)
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return net


nets = st.builds(
    scattered,
    st.builds(
        Net,
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
        path=st.lists(st.integers(0, 3), min_size=1, max_size=5),
        bias=st.booleans(),
        tied=st.booleans(),
        bag=st.booleans(),
        frozen=st.integers(0, 2),
    ),
    st.integers(0, 2**31),
)
batches = st.builds(
    lambda seed, groups, length: torch.randint(
        0, VOCABULARY, (groups * ROWS, length), generator=torch.Generator().manual_seed(seed)
    ),
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 6),
)


def losses(net: nn.Module, tokens: Tensor) -> Tensor:
    logits = net(tokens).transpose(1, 2)
    return F.cross_entropy(logits, (tokens * 5) % VOCABULARY, reduction="none").sum(1)


def agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(float(e.abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert float((a - e).abs().max()) <= 3e-6 * max(largest, 1e-6)


@settings(max_examples=60, deadline=None)
@given(net=nets, tokens=batches)
def test_sums_and_norms_of_any_architecture_equal_the_loop(net: Net, tokens: Tensor) -> None:
    groups = len(tokens) // ROWS
    sums, norms = clipped_gradients(net, lambda m: losses(m, tokens), CLIP, groups)
    for k in range(groups):
        rows = range(ROWS * k, ROWS * k + ROWS)
        expected, expected_norms = clipped_loop(
            net, lambda m, r: losses(m, tokens[r : r + 1])[0], rows, CLIP
        )
        agree([s[k] for s in sums], expected)
        assert torch.allclose(norms[rows.start : rows.stop], expected_norms, rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(net=nets, tokens=batches)
def test_groups_of_any_architecture_train_as_if_alone(net: Net, tokens: Tensor) -> None:
    groups = len(tokens) // ROWS
    together = group(net, groups)
    for at, stack in enumerate(together.parameters.values()):
        generator = torch.Generator().manual_seed(at)
        stack.data += torch.randn(stack.shape, generator=generator, dtype=stack.dtype) * 0.2
    result = backward(together, losses(together.module, tokens), CLIP, groups)
    for k in range(groups):
        alone = copy.deepcopy(net)
        alone.load_state_dict(ungroup(together, k), strict=False)
        mine = tokens[ROWS * k : ROWS * k + ROWS]
        expected, norms = clipped_gradients(alone, partial(losses, tokens=mine), CLIP)
        agree([s[k] for s in result.sums.values()], [e[0] for e in expected])
        assert torch.allclose(result.norms[ROWS * k : ROWS * k + ROWS], norms, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(net=nets, tokens=batches, cut=st.integers(0, 6), seed=st.integers(0, 2**31))
def test_virtual_steps_of_any_architecture_change_nothing(
    net: Net, tokens: Tensor, cut: int, seed: int
) -> None:
    whole, parts = copy.deepcopy(net), copy.deepcopy(net)
    ends = [0, min(cut, len(tokens)), len(tokens)]
    for model, pieces in ((whole, [tokens]), (parts, [tokens[a:b] for a, b in pairwise(ends)])):
        optimizer = EDPSGD(
            model, lr=0.3, clip_norm=CLIP, noise_multiplier=0.7, expected_batch_size=len(tokens),
            generator=NoiseSource.from_seed(seed),
        )
        for piece in pieces:
            optimizer.accumulate(losses(optimizer.model, piece))
        optimizer.step()
    agree([p.detach() for p in parts.parameters()], [p.detach() for p in whole.parameters()])
