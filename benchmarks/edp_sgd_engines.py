"""The engines of `benchmarks/edp_sgd.py`: each turns a case into a step that gives clipped sums.

A step is forward, backward and the sum of the rows' gradients, each clipped to `CLIP_NORM`, without
noise and without an optimiser: what a private release costs. Only `plain` does not clip.

plain           torch.autograd.grad of the summed losses
ours            sottovoce.privacy.gradients.engine: one forward, one backward pass, clipped sums
ours_same_gemm  the same without its choice of matrix library (`sottovoce.privacy.gradients.gemm`)
opacus_hooks    Opacus GradSampleModule and the clipping of its DPOptimizer
opacus_ghost    Opacus GradSampleModuleFastGradientClipping and its second backward pass
functorch       torch.func: vmap(grad) over functional_call, then clipped and summed
loop            batch size 1, row after row

Opacus and functorch do not run every model as it is; `adapted` says what is replaced for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from edp_sgd_models import Bag, Case, MiniLM
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sottovoce.privacy.gradients import gemm
from sottovoce.privacy.gradients.engine import backward
from sottovoce.privacy.gradients.grouping import track

CLIP_NORM = 1.0
Gradients = dict[str, Tensor]
Step = Callable[[], Gradients]


def trainable(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, _ in named], [p for _, p in named]


def plain(case: Case) -> Step:
    names, tensors = trainable(case.model)

    def step() -> Gradients:
        losses = case.losses(case.model, case.batch)
        return dict(zip(names, torch.autograd.grad(losses.sum(), tensors), strict=True))

    return step


def ours(case: Case) -> Step:
    grouped = track(case.model)

    def step() -> Gradients:
        losses = case.losses(grouped.module, case.batch)
        sums = backward(grouped, losses, CLIP_NORM, 1).sums
        return {name: tensor[0] for name, tensor in sums.items()}

    return step


def ours_same_gemm(case: Case) -> Step:
    """`ours` on the matrix library that plain uses: what is left is the price of clipping alone."""
    with same_gemm():
        step = ours(case)

    def controlled() -> Gradients:
        with same_gemm():
            return step()

    return controlled


@contextmanager
def same_gemm() -> Iterator[None]:
    kept = gemm.onednn_is_faster
    gemm.onednn_is_faster = cast(Any, lambda: False)
    try:
        yield
    finally:
        gemm.onednn_is_faster = kept


def opacus_hooks(case: Case) -> Step:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    adapted(case)
    names, tensors = trainable(case.model)
    module = GradSampleModule(case.model, loss_reduction="sum", strict=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(tensors, lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIP_NORM,
        expected_batch_size=None, loss_reduction="sum",
    )

    def step() -> Gradients:
        case.losses(module, case.batch).sum().backward()
        optimizer.clip_and_accumulate()
        sums = {name: cast(Any, p).summed_grad for name, p in zip(names, tensors, strict=True)}
        optimizer.zero_grad(set_to_none=True)
        return sums

    return step


def opacus_ghost(case: Case) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    adapted(case)
    names, tensors = trainable(case.model)
    module = GradSampleModuleFastGradientClipping(
        case.model, loss_reduction="sum", max_grad_norm=CLIP_NORM, strict=False
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(tensors, lr=0.0), noise_multiplier=0.0, max_grad_norm=CLIP_NORM,
        expected_batch_size=None, loss_reduction="sum",
    )

    def step() -> Gradients:
        losses = case.losses(module, case.batch)
        DPTensorFastGradientClipping(module, optimizer, losses, "sum").backward()
        sums = {name: cast(Tensor, p.grad) for name, p in zip(names, tensors, strict=True)}
        optimizer.zero_grad(set_to_none=True)
        return sums

    return step


def functorch(case: Case) -> Step:
    adapted(case)
    names, tensors = trainable(case.model)

    def loss(parameters: Gradients, row: tuple[Tensor, ...]) -> Tensor:
        def model(*inputs: Tensor, **named: Tensor) -> Any:
            return functional_call(case.model, parameters, inputs, named)

        alone = tuple(tensor.unsqueeze(0) for tensor in row)
        return case.losses(cast(nn.Module, model), alone).squeeze(0)

    per_row = vmap(grad(loss), in_dims=(None, 0))

    def step() -> Gradients:
        with sdpa_kernel(SDPBackend.MATH):
            grads = per_row(dict(zip(names, tensors, strict=True)), case.batch)
        grads = {name: tensor.detach() for name, tensor in grads.items()}
        factor = clip_factor([g.flatten(1).pow(2).sum(1) for g in grads.values()])
        return {name: torch.einsum("r,r...->...", factor, g) for name, g in grads.items()}

    return step


def loop(case: Case, dtype: torch.dtype = torch.float32) -> Step:
    """`dtype`: of norms and sums; float64 makes the reference for deviations."""
    names, tensors = trainable(case.model)

    def step() -> Gradients:
        sums = [torch.zeros_like(p, dtype=dtype) for p in tensors]
        for row in range(case.rows()):
            alone = tuple(tensor[row : row + 1] for tensor in case.batch)
            losses = case.losses(case.model, alone)
            grads = [g.to(dtype) for g in torch.autograd.grad(losses.sum(), tensors)]
            factor = clip_factor([g.pow(2).sum() for g in grads])
            for total, g in zip(sums, grads, strict=True):
                total.addcmul_(g, factor)
        return dict(zip(names, sums, strict=True))

    return step


ENGINES: dict[str, Callable[[Case], Step]] = {
    "plain": plain, "ours": ours, "ours_same_gemm": ours_same_gemm, "opacus_hooks": opacus_hooks,
    "opacus_ghost": opacus_ghost, "functorch": functorch, "loop": loop,
}
ADAPTED = ("opacus_hooks", "opacus_ghost", "functorch")
NOTES = {
    "bilstm": "LSTM replaced by opacus.layers.DPLSTM, same weights",
    "minilm": "position ids repeated for each row; eager attention",
    "minilm_lora": "position ids repeated for each row; eager attention",
    "bag": "EmbeddingBag replaced by embedding and mean (Opacus drops repeated tokens in a bag)",
    "bag_tiny": "as bag",
}


def clip_factor(squares: Sequence[Tensor]) -> Tensor:
    return (CLIP_NORM / torch.stack(list(squares)).sum(0).sqrt()).clamp(max=1.0)


def adapted(case: Case) -> None:
    """Replace, in place, what Opacus or functorch cannot run; names and weights stay."""
    for module in list(case.model.modules()):
        if isinstance(module, Bag):
            table = nn.Embedding.from_pretrained(module.embedding.weight.detach(), freeze=False)
            module.embedding = table
        elif isinstance(module, MiniLM):
            module.repeat_positions = True
            module.encoder.set_attn_implementation("eager")
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LSTM):
                setattr(module, name, cell_by_cell(child))


def cell_by_cell(lstm: nn.LSTM) -> nn.Module:
    from opacus.layers import DPLSTM

    replaced = DPLSTM(
        lstm.input_size, lstm.hidden_size, batch_first=True, bidirectional=lstm.bidirectional
    )
    replaced.load_state_dict(lstm.state_dict())
    return cast(nn.Module, replaced.to(next(lstm.parameters()).device))
