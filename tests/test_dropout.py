"""A row's dropout is its own: it depends on no other row, on no padding, and on no order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import group, track
from sottovoce.privacy.gradients.tape import Tape
from sottovoce.privacy.layers.dropout import RowDropout, dropped, row_mask

ROWS, LENGTH = 6, 5


class Net(nn.Module):
    """Dropout everywhere: alone, between the layers of LSTM and GRU, on attention's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(9, 8), nn.Dropout(0.3)
        self.lstm = nn.LSTM(8, 4, 2, batch_first=True, dropout=0.4)
        self.gru = nn.GRU(4, 4, 2, batch_first=True, dropout=0.4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        hidden = torch.arange(tokens.shape[1]) >= lengths.unsqueeze(1)
        x = self.gru(self.lstm(self.drop(self.embedding(tokens)))[0])[0]
        x = x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        return self.drop(x).masked_fill(hidden.unsqueeze(2), 0.0).sin().sum((1, 2))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 9, (ROWS, LENGTH), generator=generator)
    lengths = torch.tensor([5, 3, 4, 5, 1, 2])
    seeds = torch.randint(-(2**62), 2**62, (ROWS,), generator=generator)
    return tokens, lengths, seeds


@pytest.mark.parametrize("padding", [0, 4])
def test_a_row_trains_the_same_alone_and_in_company(padding: int) -> None:
    torch.manual_seed(0)
    net = Net().double()
    tokens, lengths, seeds = batch()
    together = group(net, ROWS)
    together.tape.row_seeds = seeds
    losses = together.module(F.pad(tokens, (0, padding), value=7), lengths)
    sums = backward(together, losses, 1e9, ROWS).sums
    for row in range(ROWS):
        alone, mine = group(net, 1), slice(row, row + 1)
        alone.tape.row_seeds = seeds[mine]
        loss = alone.module(tokens[mine, : int(lengths[row])], lengths[mine])
        assert torch.allclose(loss.detach(), losses[mine].detach())
        for name, total in backward(alone, loss, 1e9, 1).sums.items():
            assert torch.allclose(total[0], sums[name][row], atol=1e-9)


def test_new_seeds_draw_new_masks_and_old_ones_the_old() -> None:
    torch.manual_seed(0)
    net = track(Net().double())
    tokens, lengths, seeds = batch()
    runs = []
    for each in (seeds, seeds + 1, seeds):
        net.tape.row_seeds = each
        runs.append(net.module(tokens, lengths))
    assert torch.equal(runs[0], runs[2])
    assert bool((runs[0] != runs[1]).all())


def test_without_seeds_masks_come_from_torchs_generator() -> None:
    x = torch.randn(4, 9)
    layer = track(nn.Sequential(nn.Linear(9, 9).requires_grad_(False), nn.Dropout(0.4))).module[1]
    assert type(layer) is RowDropout
    torch.manual_seed(5)
    expected = F.dropout(x, 0.4)
    torch.manual_seed(5)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), x)


def test_a_swapped_dropout_keeps_its_mode_and_its_hooks() -> None:
    layer, seen = nn.Dropout(0.4).eval(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    swapped = RowDropout.of(layer, Tape())
    swapped(torch.ones(2, 2))
    assert not swapped.training
    assert seen == [1]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    call=st.integers(0, 50),
    shape=st.lists(st.integers(1, 5), max_size=3),
    more=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    p=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_a_mask_is_a_function_of_seed_call_and_coordinates(
    seed: int, call: int, shape: list[int], more: list[int], p: float
) -> None:
    small = row_mask(torch.tensor([seed]), call, tuple(shape), p)
    larger = tuple(size + extra for size, extra in zip(shape, more, strict=False))
    big = row_mask(torch.tensor([7, seed, 8]), call, larger, p)
    assert torch.equal(big[(1, *(slice(size) for size in shape))], small[0])


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_masks_look_independent_and_keep_at_their_rate(p: float) -> None:
    seeds = torch.arange(24)  # neighbouring seeds: the hardest to tell apart
    variance = p * (1 - p)
    first, second = (
        ((row_mask(seeds, call, (40, 50), p) == 0).double() - p) for call in (0, 1)
    )
    products = {
        "rate": first * variance**0.5,
        "rows": first[1:] * first[:-1],
        "places": first[:, 1:] * first[:, :-1],
        "units": first[:, :, 1:] * first[:, :, :-1],
        "diagonal": first[:, 1:, 1:] * first[:, :-1, :-1],
        "turned": first[:, :, :40].tril(-1) * first[:, :, :40].transpose(1, 2),
        "calls": first * second,
    }
    for name, product in products.items():
        count = product.numel() if name != "turned" else 24 * 780
        score = float(product.sum()) / (variance * count**0.5)
        assert abs(score) < 4.5, name
    for dims in ((0, 1), (0, 2), (1, 2)):  # sums over two coordinates vary as they should
        sums = first.sum(dims)
        ratio = float(sums.var()) / (variance * first.numel() / sums.numel())
        assert 0.3 < ratio < 2.5


def test_what_is_kept_is_scaled_up() -> None:
    mask = row_mask(torch.arange(3), 0, (4, 5), 0.2)
    assert torch.allclose(mask.unique(), torch.tensor([0.0, 1.25]))
    assert not bool(row_mask(torch.arange(3), 0, (4, 5), 1.0).any())


def test_one_row_for_all_gets_a_mask_for_each_and_mixed_rows_are_refused() -> None:
    tape = Tape()
    tape.row_seeds = torch.arange(4)
    out = dropped(torch.ones(1, 50), 0.5, True, tape)
    assert out.shape == (4, 50)
    assert not torch.equal(out[0], out[1])
    with pytest.raises(UnsupportedLayer, match="first dimension"):
        dropped(torch.ones(8, 50), 0.5, True, tape)
