"""The LSTM kernel, at every level, beside torch's operators and torch's own layer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from small_fleets import CLIPPED, DEVICES, NOISED, fleet, parts
from torch import Tensor, nn

from sottovoce.client import native
from sottovoce.client.errors import UnsupportedLayer
from sottovoce.client.example_clipping import ExampleClipping
from sottovoce.privacy.gradients import engine, gemm
from sottovoce.privacy.gradients.clipping import Clipping
from sottovoce.privacy.gradients.grouping import Grouped, group, track
from sottovoce.privacy.layers import native_lstm


@dataclass(frozen=True)
class Case:
    """`groups` 0: weights shared by all rows."""

    groups: int
    rows: int
    length: int
    width: int
    size: int
    directions: int = 1
    bias: bool = True

    def layer(self) -> nn.LSTM:
        torch.manual_seed(self.size)
        return nn.LSTM(
            self.width, self.size, batch_first=True, bias=self.bias,
            bidirectional=self.directions == 2,
        )


CASES = [
    Case(0, 1, 1, 1, 1), Case(0, 5, 3, 7, 9), Case(0, 29, 4, 33, 17, 2), Case(1, 3, 2, 4, 16),
    Case(3, 1, 1, 16, 32), Case(2, 13, 5, 5, 20, 2, False), Case(4, 8, 12, 64, 128),
    Case(2, 7, 6, 40, 24, 2), Case(2, 30, 3, 16, 31, 1, False), Case(0, 40, 30, 8, 96),
]


def passed(case: Case, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Outputs, gradients of inputs and states, and sums of gradients of all parameters."""
    monkeypatch.setattr(native_lstm, "suited", lambda *_: kernel)
    grouped = group(case.layer(), case.groups) if case.groups else track(case.layer())
    groups, generator = max(case.groups, 1), torch.Generator().manual_seed(1)
    for parameter in grouped.parameters.values() if case.groups else ():
        parameter.data += torch.randn(parameter.shape, generator=generator) / 9
    rows = groups * case.rows
    ends = (case.directions, rows, case.size)
    shapes = {"x": (rows, case.length, case.width), "h0": ends, "c0": ends}
    given = {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }
    out, (hidden, cell) = grouped.module(given["x"], (given["h0"], given["c0"]))
    found = {"out": out, "hidden": hidden, "cell": cell}
    loss = sum(
        (each * torch.randn(each.shape, generator=generator)).sum() for each in found.values()
    )
    grads = torch.autograd.grad(loss, list(given.values()))
    found |= dict(zip(given, grads, strict=True))
    shapes_of = grouped.shapes()
    for name, (factor,) in grouped.tape.take(rows).items():
        found[name] = factor.scaled_sum(None, shapes_of[name], groups)
    return {name: tensor.detach() for name, tensor in found.items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], factor: float = 4e-6) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        bound = factor * float(b[name].abs().max().clamp_min(1e-3))
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=bound, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_layer_of_torchs_operators(
    kernel_level: native.Library, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    close(passed(case, True, monkeypatch), passed(case, False, monkeypatch))


@pytest.mark.parametrize("directions", [1, 2])
def test_the_kernel_is_torchs_own_layer(
    kernel_level: native.Library, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(0, 6, 7, 10, 13, directions)
    layer, found = case.layer().double(), passed(case, True, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    x, h0, c0 = (
        torch.randn(shape, generator=generator).double().requires_grad_()
        for shape in ((6, 7, 10), (directions, 6, 13), (directions, 6, 13))
    )
    out, (hidden, cell) = layer(x, (h0, c0))
    known = {"out": out, "hidden": hidden, "cell": cell}
    loss = sum((e * torch.randn(e.shape, generator=generator)).sum() for e in known.values())
    loss.backward()
    known |= {"x": x.grad, "h0": h0.grad, "c0": c0.grad}
    known |= {name: p.grad.unsqueeze(0) for name, p in layer.named_parameters()}
    close(found, {name: tensor.detach().float() for name, tensor in known.items()})


def gates_of(x: Tensor) -> native_lstm.Kept:
    """Gates of layers of one unit at numbers x (n,)."""
    ones, zero = torch.ones(4, 1), torch.zeros(len(x), 1)
    out = torch.empty(len(x), 1, 1)
    params = (ones, torch.zeros(4, 1))
    ends = torch.empty_like(zero), torch.empty_like(zero)
    return native_lstm.go_ahead(x.view(-1, 1, 1), params, zero, zero, out, ends, 0)


def test_sigmoid_and_tanh_are_right_to_the_last_places(kernel_level: native.Library) -> None:
    steps = torch.linspace(0, 1, 20_001)
    x = torch.cat([40 * (2 * steps - 1), 2 * steps - 1, 1e-6 * steps, steps.new_tensor([80, -80])])
    gates = gates_of(x).gates[:, 0]
    sigmoid, tanh = x.double().sigmoid().float(), x.double().tanh().float()
    torch.testing.assert_close(gates[:, 0], sigmoid, rtol=4e-7, atol=0)
    torch.testing.assert_close(gates[:, 2], tanh, rtol=4e-7, atol=0)
    assert bool((gates.abs() <= 1).all())


def test_gates_saturate_and_pass_on_what_is_no_number(kernel_level: native.Library) -> None:
    x = torch.tensor([1e4, -1e4, torch.inf, -torch.inf, 3e38, torch.nan, 0.5])
    kept = gates_of(x)
    gates = kept.gates[:, 0]
    torch.testing.assert_close(gates[:5, 0], torch.tensor([1.0, 0, 1, 0, 1]), rtol=0, atol=1e-37)
    torch.testing.assert_close(gates[:5, 2], torch.tensor([1.0, -1, 1, -1, 1]), rtol=0, atol=4e-7)
    assert bool(gates[5].isnan().all()) and bool(kept.cells[5].isnan().all())
    assert bool(gates[6].isfinite().all())


def test_saturated_candidates_are_one_and_have_no_gradient(kernel_level: native.Library) -> None:
    x = torch.tensor([8.0, 9.0, 20.0, 1e4, 3e38, torch.inf])
    tanh = gates_of(torch.cat([x, -x])).gates[:, 0, 2]
    assert torch.equal(tanh, torch.ones(6).repeat(2) * torch.cat([x, -x]).sign())


def test_a_row_that_is_not_finite_leaves_the_others_alone(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_lstm, "suited", lambda *_: True)
    grouped = track(Case(0, 0, 0, 5, 19, 2).layer())
    x = torch.randn(5, 4, 5, generator=torch.Generator().manual_seed(2))
    clean, _ = grouped.module(x)
    x[1, 2, 3], x[3, 0, 0] = torch.nan, torch.inf
    broken, _ = grouped.module(x)
    assert torch.equal(broken[::2], clean[::2]) and bool(broken[1].isnan().any())


def clipped(grouped: Grouped, x: Tensor, weights: Tensor, groups: int) -> engine.ClippedSums:
    losses = grouped.module(x)[0].pow(2).mean((1, 2)) * weights
    return engine.backward(grouped, losses, Clipping(0.01), groups)


@pytest.mark.parametrize("groups", [None, 3])
def test_rows_that_fill_up_a_group_cost_nothing_and_change_nothing(
    kernel_level: native.Library, groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Case(0, 0, 0, 6, 20, 2).layer()
    grouped = track(layer) if groups is None else group(layer, groups)
    x = torch.randn(12, 5, 6, generator=torch.Generator().manual_seed(3))
    fillers = torch.tensor([2, 0, 4])
    weights = (torch.arange(4) >= fillers.unsqueeze(1)).float().flatten()
    monkeypatch.setattr(native_lstm, "suited", lambda *_: False)
    slow = clipped(grouped, x, weights, 3)
    monkeypatch.setattr(native_lstm, "suited", lambda *_: True)
    grouped.tape.fill(fillers, 12)
    fast = clipped(grouped, x, weights, 3)
    assert grouped.tape.fillers is None, "they are those of one pass"
    torch.testing.assert_close(fast.norms, slow.norms, rtol=1e-5, atol=0)
    close(fast.sums, slow.sums, 1e-5)
    for name in fast.sums:
        assert bool((fast.sums[name][2] == 0).all())
    grouped.tape.fill(fillers, 12)
    out = grouped.module(x)[0]
    assert bool((out[weights == 0] == 0).all()) and bool((out[weights == 1] != 0).any())
    grouped.tape.take(12, check=False)


def test_a_probe_leaves_the_gates_for_the_pass_after_it(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_lstm, "suited", lambda *_: True)
    case = Case(0, 0, 0, 6, 10, 2)
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(4))
    first, second = track(case.layer()), track(case.layer())
    second.probed = True
    assert not first.probed
    results = [clipped(grouped, x, torch.ones(4), 1) for grouped in (first, second)]
    assert first.probed and torch.equal(results[0].norms, results[1].norms)
    for name, total in results[0].sums.items():
        assert torch.equal(total, results[1].sums[name])


def test_other_types_and_the_plain_level_are_left_to_torch(kernel_level: native.Library) -> None:
    x = torch.ones(2, 2)
    assert native_lstm.suited(x) == (native.level() != "generic")
    assert not native_lstm.suited(x, x.double()) and not native_lstm.suited(x.half())


def test_fillers_are_those_of_passes_over_as_many_rows(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_lstm, "suited", lambda *_: True)
    grouped = track(Case(0, 0, 0, 6, 20).layer())
    x = torch.randn(12, 5, 6, generator=torch.Generator().manual_seed(3))
    known = grouped.module(x)[0]
    grouped.tape.fill(torch.tensor([2, 0, 4]), 12)
    for rows in (6, 9, 3):  # what a task may call the model with beside
        assert torch.equal(grouped.module(x[:rows])[0], known[:rows])
    assert not torch.equal(grouped.module(x)[0], known)


@pytest.mark.parametrize("fillers", [[5, 0, 0], [-1, 0, 0], [0, 0]])
def test_fillers_that_do_not_fit_the_rows_are_refused(fillers: list[int]) -> None:
    tape = track(Case(0, 0, 0, 6, 20).layer()).tape
    with pytest.raises(ValueError, match="do not fit 12 rows" if len(fillers) == 3 else "13 rows"):
        tape.fill(torch.tensor(fillers), 12 if len(fillers) == 3 else 13)


class Mixer(nn.Module):
    """Every row gets the mean of all."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.lstm = layer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        out = self.lstm(x)[0]
        return out + out.mean(0), None


def test_a_probe_finds_rows_that_mix_where_all_others_only_fill_up(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_lstm, "suited", lambda *_: True)
    grouped = track(Mixer(Case(0, 0, 0, 6, 10, 2).layer()))
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(4))
    grouped.tape.fill(torch.tensor([3]), 4)
    with pytest.raises(UnsupportedLayer, match="loss of another"):
        clipped(grouped, x, torch.tensor([0.0, 0, 0, 1]), 1)


@pytest.mark.parametrize("kernel", [True, False])
def test_inputs_and_states_of_other_shapes_are_refused(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel and native.kernels() is None:
        pytest.skip("the kernels were not built: no C compiler at installation")
    monkeypatch.setattr(native_lstm, "suited", lambda *_: kernel)
    layer, x = track(Case(0, 0, 0, 6, 10, 2).layer()).module, torch.zeros(4, 5, 6)
    for width in (5, 7):
        with pytest.raises(ValueError, match="takes 6 features"):
            layer(torch.zeros(4, 5, width))
    for shape in ((1, 4, 10), (2, 3, 10), (2, 1, 10), (2, 4, 9), (4, 10)):
        right, wrong = torch.zeros(2, 4, 10), torch.zeros(shape)
        for state in ((wrong, right), (right, wrong)):
            with pytest.raises(ValueError, match=r"states.*\(2, 4, 10\)"):
                layer(x, state)


def test_rows_that_do_not_divide_into_groups_are_refused(
    kernel_level: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_lstm, "suited", lambda *_: True)
    grouped = group(Case(0, 0, 0, 6, 10).layer(), 3)
    with pytest.raises(ValueError, match="4 rows do not divide into 3"):
        grouped.module(torch.zeros(4, 5, 6))


@pytest.mark.parametrize("kernel", [True, False])
def test_a_second_backward_pass_over_used_up_gates_is_refused(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel and native.kernels() is None:
        pytest.skip("the kernels were not built: no C compiler at installation")
    monkeypatch.setattr(native_lstm, "suited", lambda *_: kernel)
    grouped = track(Case(0, 0, 0, 6, 10, 2).layer())
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    total = grouped.module(x)[0].sum()
    torch.autograd.grad(total, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, x)


@pytest.mark.parametrize("example", [None, CLIPPED, NOISED])
def test_a_cohort_trains_to_the_same_sum_without_kernels(
    kernel_level: native.Library, example: ExampleClipping | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {name: p.detach().clone() for name, p in parts("bilstm")[2].named_parameters()}
    monkeypatch.setattr(native_lstm, "suited", lambda *_: True)
    monkeypatch.setattr(gemm, "SMALL", 0)
    fast = fleet("bilstm", example, 0.3).train(start, DEVICES, 3).sums
    monkeypatch.setattr(native_lstm, "suited", lambda *_: False)
    monkeypatch.setattr(gemm, "kernels", lambda: None)
    close(fast, fleet("bilstm", example, 0.3).train(start, DEVICES, 3).sums, 1e-4)
