"""Every tracked layer gives the per-example loop's norms and clipped sums, alone and combined."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from reference import clipped_loop
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy import clipped_gradients
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import group, track, ungroup

ROWS, CLIP, VOCABULARY, WIDTH = 6, 0.4, 11, 8


@dataclass
class Case:
    """A module and what it is called with; tensors whose first dimension is ROWS are the rows."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor] = lambda module, *inputs: module(*inputs)

    def losses(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        out = self.call(module, *inputs).flatten(1)
        return (out.sin() * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sum(1)


def real(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(ROWS, *shape, dtype=torch.float64),)


def words(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, VOCABULARY, (ROWS, *shape)),)


def states(module: nn.Module, x: Tensor, *state: Tensor) -> Tensor:
    """Outputs and last states of a recurrent layer, from a first state of its own if given."""
    first = [s.transpose(0, 1).contiguous() for s in state]
    out, last = module(x if module.batch_first else x.transpose(0, 1), *first)
    out = out if module.batch_first else out.transpose(0, 1)
    return torch.cat([out.flatten(1), last.transpose(0, 1).flatten(1)], dim=1)


def attended(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    if not module.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, weights = module(q, k, v, **options)
    out = out if module.batch_first else out.transpose(0, 1)
    return out if weights is None else torch.cat([out.flatten(1), weights.flatten(1)], dim=1)


def self_attended(module: nn.Module, x: Tensor, **options: object) -> Tensor:
    x = x if module.batch_first else x.transpose(0, 1)
    out = module(x, x, x, need_weights=False, **options)[0]
    return out if module.batch_first else out.transpose(0, 1)


def padded(module: nn.Module, x: Tensor) -> Tensor:
    """A Transformer encoder or an attention with the last places of every row masked."""
    hidden = torch.arange(x.shape[1]).ge(x.shape[1] - 1).expand(x.shape[:2])
    if isinstance(module, nn.TransformerEncoder):
        return module(x, src_key_padding_mask=hidden)[:, :-1]
    late = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return self_attended(module, x, key_padding_mask=hidden, attn_mask=late)


def row_masked(module: nn.Module, x: Tensor) -> Tensor:
    """An attention with a mask of its own for every row and head, and its weights."""
    mask = x.new_zeros(x.shape[0] * 2, x.shape[1], x.shape[1]).masked_fill(
        x.flatten(1).sum(1).gt(0).repeat_interleave(2).view(-1, 1, 1), -0.7
    ).tril()
    return attended(module, x, x, x, attn_mask=mask)


def three(q: int, k: int, kdim: int = WIDTH, vdim: int = WIDTH) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*real(q, WIDTH)(), *real(k, kdim)(), *real(k, vdim)())


attention = partial(nn.MultiheadAttention, WIDTH, 2, batch_first=True)
encoder = partial(nn.TransformerEncoderLayer, WIDTH, 2, 10, dropout=0.0, batch_first=True)
decoder = partial(nn.TransformerDecoderLayer, WIDTH, 2, 10, dropout=0.0, batch_first=True)

CASES = {
    "rms_norm": Case(lambda: nn.RMSNorm(WIDTH), real(3, WIDTH)),
    "rms_norm_4d": Case(lambda: nn.RMSNorm(WIDTH, eps=1e-3), real(2, 3, WIDTH)),
    "rms_norm_flat": Case(lambda: nn.RMSNorm(WIDTH), real(WIDTH)),
    "group_norm": Case(lambda: nn.GroupNorm(2, WIDTH), real(WIDTH, 5)),
    "group_norm_4d": Case(lambda: nn.GroupNorm(4, WIDTH), real(WIDTH, 3, 2)),
    "group_norm_flat": Case(lambda: nn.GroupNorm(2, WIDTH), real(WIDTH)),
    "linear_4d": Case(lambda: nn.Linear(WIDTH, 3), real(2, 3, WIDTH)),
    "layer_norm_4d": Case(lambda: nn.LayerNorm(WIDTH), real(2, 3, WIDTH)),
    "conv": Case(lambda: nn.Conv1d(4, 5, 3), real(4, 7)),
    "conv_stride": Case(lambda: nn.Conv1d(4, 5, 3, stride=2, padding=2, bias=False), real(4, 8)),
    "conv_same": Case(lambda: nn.Conv1d(4, 5, 4, padding="same", dilation=2), real(4, 9)),
    "conv_valid": Case(lambda: nn.Conv1d(4, 5, 2, padding="valid", dilation=3), real(4, 9)),
    "conv_circular": Case(
        lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular"), real(4, 7)
    ),
    "conv_groups": Case(lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), real(4, 7)),
    "conv_depthwise": Case(lambda: nn.Conv1d(4, 4, 3, groups=4, bias=False), real(4, 7)),
    "conv_turned": Case(
        lambda: nn.Conv1d(4, 5, 3), real(7, 4), lambda m, x: m(x.transpose(1, 2))
    ),
    "conv_twice": Case(
        lambda: nn.Conv1d(4, 4, 3, padding=1), real(4, 7), lambda m, x: m(torch.tanh(m(x)))
    ),
    "gru": Case(lambda: nn.GRU(4, 5, batch_first=True), real(6, 4), states),
    "gru_time_first": Case(lambda: nn.GRU(4, 5), real(5, 4), states),
    "gru_two_layers": Case(
        lambda: nn.GRU(4, 3, 2, bidirectional=True, batch_first=True), real(5, 4), states
    ),
    "gru_no_bias": Case(
        lambda: nn.GRU(4, 3, 2, bidirectional=True, bias=False), real(5, 4), states
    ),
    "gru_first_state": Case(
        lambda: nn.GRU(4, 3, bidirectional=True, batch_first=True),
        lambda: (*real(5, 4)(), *real(2, 3)()), states,
    ),
    "gru_one_step": Case(lambda: nn.GRU(4, 3, batch_first=True), real(1, 4), states),
    "gru_twice": Case(
        lambda: nn.GRU(4, 4, batch_first=True), real(5, 4), lambda m, x: m(*m(x))[0]
    ),
    "bag_mean": Case(lambda: nn.EmbeddingBag(VOCABULARY, 5), words(7)),
    "bag_sum": Case(lambda: nn.EmbeddingBag(VOCABULARY, 5, mode="sum"), words(7)),
    "bag_padding": Case(lambda: nn.EmbeddingBag(VOCABULARY, 5, padding_idx=2), words(9)),
    "bag_sum_padding": Case(
        lambda: nn.EmbeddingBag(VOCABULARY, 5, padding_idx=0, mode="sum"), words(9)
    ),
    "bag_weights": Case(
        lambda: nn.EmbeddingBag(VOCABULARY, 5, padding_idx=0, mode="sum"),
        lambda: (*words(9)(), *real(9)()),
        lambda m, i, w: m(i, per_sample_weights=w),
    ),
    "bag_twice": Case(
        lambda: nn.EmbeddingBag(VOCABULARY, 5), words(8), lambda m, i: m(i[:, :3]) * m(i[:, 2:])
    ),
    "attention": Case(attention, real(5, WIDTH), self_attended),
    "attention_time_first": Case(
        lambda: nn.MultiheadAttention(WIDTH, 2), real(5, WIDTH), self_attended
    ),
    "attention_masks": Case(lambda: attention(bias=False), real(5, WIDTH), padded),
    "attention_row_masks": Case(attention, real(5, WIDTH), row_masked),
    "attention_cross": Case(
        attention, lambda: (*real(3, WIDTH)(), *real(5, WIDTH)()),
        lambda m, q, k: attended(m, q, k, k),
    ),
    "attention_three": Case(
        attention, three(3, 4), lambda m, *x: attended(m, *x, average_attn_weights=False)
    ),
    "attention_widths": Case(lambda: attention(kdim=6, vdim=5), three(3, 4, 6, 5), attended),
    "attention_widths_no_bias": Case(
        lambda: nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=5, bias=False),
        three(3, 4, 6, 5), attended,
    ),
    "encoder": Case(
        lambda: nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=True),
        real(4, WIDTH), padded,
    ),
    "encoder_norm_first": Case(
        lambda: nn.TransformerEncoder(encoder(norm_first=True), 2, enable_nested_tensor=False),
        real(4, WIDTH),
    ),
    "decoder": Case(
        lambda: nn.TransformerDecoder(decoder(), 2),
        lambda: (*real(3, WIDTH)(), *real(5, WIDTH)()),
        lambda m, x, y: m(
            x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        ),
    ),
}


def scattered(module: nn.Module, seed: int) -> nn.Module:
    """The module in float64 with every trainable value moved away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 0.3)
    return module


def agree(actual: list[Tensor], expected: list[Tensor], tolerance: float = 3e-6) -> None:
    largest = max(float(e.abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert float((a - e).abs().max()) <= tolerance * max(largest, 1e-6)


def matches_the_loop(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Sums and norms of three groups of rows equal the loop's."""
    def alone(m: nn.Module, row: int) -> Tensor:
        return case.losses(m, tuple(x[row : row + 1] for x in inputs))[0]

    sums, norms = clipped_gradients(module, lambda m: case.losses(m, inputs), CLIP, groups=3)
    for k in range(3):
        rows = range(2 * k, 2 * k + 2)
        expected, expected_norms = clipped_loop(module, alone, rows, CLIP)
        agree([s[k] for s in sums], expected)
        assert torch.allclose(norms[2 * k : 2 * k + 2], expected_norms, rtol=1e-6)


def stacks_match_lone_models(case: Case, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Three groups with weights of their own train as three models would, one after another."""
    together = group(module, 3)
    for at, stack in enumerate(together.parameters.values()):
        generator = torch.Generator().manual_seed(at)
        stack.data += torch.randn(stack.shape, generator=generator, dtype=stack.dtype) * 0.2
    losses = case.losses(together.module, inputs)
    result = backward(together, losses, CLIP, 3)
    for k in range(3):
        alone = copy.deepcopy(module)
        alone.load_state_dict(ungroup(together, k), strict=False)
        mine = tuple(x[2 * k : 2 * k + 2] for x in inputs)
        assert torch.allclose(losses[2 * k : 2 * k + 2], case.losses(alone, mine))
        expected, norms = clipped_gradients(alone, partial(case.losses, inputs=mine), CLIP)
        agree([s[k] for s in result.sums.values()], [e[0] for e in expected])
        assert torch.allclose(result.norms[2 * k : 2 * k + 2], norms, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_layers_sums_and_norms_equal_the_loop(name: str) -> None:
    torch.manual_seed(len(name))
    case = CASES[name]
    matches_the_loop(case, scattered(case.build(), 1), case.inputs())


@pytest.mark.parametrize("name", CASES)
def test_a_stack_of_layers_trains_each_group_as_if_alone(name: str) -> None:
    torch.manual_seed(len(name))
    case = CASES[name]
    stacks_match_lone_models(case, scattered(case.build(), 2), case.inputs())


def has_biases(case: Case) -> bool:
    return any("bias" in name for name, _ in case.build().named_parameters())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if has_biases(case)])
@pytest.mark.parametrize("frozen", ["weights", "biases"])
def test_a_partly_frozen_layer_gives_only_what_is_trained(name: str, frozen: str) -> None:
    torch.manual_seed(len(name))
    case = CASES[name]
    module = scattered(case.build(), 3)
    parameters = dict(module.named_parameters())
    held = [n for n in parameters if ("bias" in n) == (frozen == "biases")]
    for n in held:
        parameters[n].requires_grad_(False)
    inputs = case.inputs()
    matches_the_loop(case, module, inputs)
    stacks_match_lone_models(case, module, inputs)


def test_big_bags_take_torchs_kernel_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sottovoce.privacy.layers.bags.SMALL", 0)
    for name in ("bag_mean", "bag_twice"):
        module, inputs = scattered(CASES[name].build(), 4), CASES[name].inputs()
        matches_the_loop(CASES[name], module, inputs)
        stacks_match_lone_models(CASES[name], module, inputs)


def test_the_last_projection_alone_can_be_trained() -> None:
    module = scattered(attention(), 4)
    module.in_proj_weight.requires_grad_(False)
    module.in_proj_bias.requires_grad_(False)
    case, inputs = CASES["attention"], CASES["attention"].inputs()
    matches_the_loop(case, module, inputs)
    stacks_match_lone_models(case, module, inputs)


@pytest.mark.parametrize("name", ["encoder", "encoder_norm_first", "decoder"])
@pytest.mark.parametrize("trained", ["", "linear1", "norm2", "out_proj", "in_proj_bias"])
def test_fused_kernels_of_eval_mode_never_see_the_weights(name: str, trained: str) -> None:
    torch.manual_seed(7)
    case = CASES[name]
    module, inputs = scattered(case.build(), 5).eval(), case.inputs()
    for path, parameter in module.named_parameters():
        parameter.requires_grad_(trained in path)
    together = group(module, 3)
    with torch.no_grad():
        assert torch.allclose(case.call(together.module, *inputs), case.call(module, *inputs))
    matches_the_loop(case, module, inputs)
    stacks_match_lone_models(case, module, inputs)


@pytest.mark.parametrize(
    ("layer", "inputs", "match"),
    [
        (nn.EmbeddingBag(5, 3, mode="max"), None, "mode='mean'"),
        (nn.EmbeddingBag(5, 3, max_norm=1.0), None, "switch them off"),
        (nn.EmbeddingBag(5, 3), (torch.tensor([1, 2]), torch.tensor([0])), "padding_idx"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), None, "switch them off"),
        (nn.MultiheadAttention(4, 2, add_zero_attn=True), None, "switch them off"),
        (nn.MultiheadAttention(4, 2), (torch.ones(3, 4),) * 3, "dimension of rows"),
        (nn.TransformerEncoderLayer(4, 2, 8), None, "batch_first=True"),
        (nn.RMSNorm((3, 4)), None, "only the last dimension"),
        (nn.Conv1d(3, 4, 2), (torch.ones(3, 5),), "dimension of rows"),
        (nn.GRU(3, 4), (torch.ones(5, 3),), "pad the batch"),
        (nn.Conv2d(3, 4, 2), None, "Conv2d.*freeze it"),
        (nn.GRUCell(3, 4), None, "GRUCell.*freeze it"),
    ],
)
def test_what_has_no_tracked_form_is_refused_with_a_remedy(
    layer: nn.Module, inputs: tuple[Tensor, ...] | None, match: str
) -> None:
    with pytest.raises(UnsupportedLayer, match=match):
        tracked = track(layer).module
        assert inputs is not None
        tracked(*inputs)


def test_a_frozen_layer_needs_no_tracked_form() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 2)).double()
    model[0].requires_grad_(False)
    matches_the_loop(Case(lambda: model, real(2, 4, 4)), model, real(2, 4, 4)())


def test_a_bias_beside_its_layer_is_known_to_be_the_layers() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(4, 3)
            self.bias = self.decoder.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(x)

    class Raw(Head):
        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(x) + self.bias

    case = Case(Head, real(2, 4))
    matches_the_loop(case, Head().double(), case.inputs())
    with pytest.raises(UnsupportedLayer, match="bias.*outside its own layer"):
        matches_the_loop(case, Raw().double(), case.inputs())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision_keeps_norms_in_float32(name: str, how: str) -> None:
    torch.manual_seed(len(name))
    case = CASES[name]
    module = scattered(case.build(), 6).float()
    inputs = tuple(x.float() if x.is_floating_point() else x for x in case.inputs())
    exact, norms = clipped_gradients(module, lambda m: case.losses(m, inputs), CLIP)
    narrow = [x.bfloat16() if x.is_floating_point() and how == "bfloat16" else x for x in inputs]
    module = module if how == "autocast" else module.bfloat16()

    def losses(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            out = case.call(m, *narrow).flatten(1)
        return (out.float().sin() * torch.linspace(-1, 2, out.shape[1])).sum(1)

    half, half_norms = clipped_gradients(module, losses, CLIP)
    assert all(s.dtype == torch.float32 for s in half)
    assert half_norms.dtype == torch.float32
    assert torch.allclose(half_norms, norms, rtol=0.2, atol=0.05 * float(norms.max()))
    agree(half, exact, 0.2)
