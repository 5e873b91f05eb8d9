"""Any text model run on embeddings in place of tokens.

A gradient attack wants tokens that vary smoothly. Models read ids, so the token embedding's output
is replaced where tokens are unknown, by a forward hook: no model needs to know of it, whatever it
does to ids before (a pretrained model has its own) or to embeddings after.

Which module embeds tokens, and at which of its positions a token arrives, is found by looking:
rows that differ in one token differ in one input of one `nn.Embedding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sottovoce.client.errors import DataError
from sottovoce.client.tasks import Batch


@dataclass(frozen=True)
class SoftInput:
    """Where unknown tokens enter a model.

    `module`: its token embedding. `positions`: (places,) in that module's input. `table`:
    (candidates, D) the embedding of each candidate.
    """

    module: nn.Embedding
    positions: Tensor
    table: Tensor

    @contextmanager
    def mixed(self, weights: Tensor) -> Iterator[None]:
        """Within, unknown places hold mixtures of candidates: `weights` (rows, places, candidates).

        With one-hot weights the model computes what it does on the tokens themselves.
        """

        def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output.index_copy(1, self.positions, weights @ self.table)

        handle = self.module.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


class _Seen(Exception):
    """Ends a forward pass whose rest nobody needs."""


def find_soft_input(model: nn.Module, rows: Batch) -> SoftInput:
    """Where the tokens enter `model` that tell the rows of a batch apart.

    `rows`: one row for each candidate, which stands at every unknown place; nothing else differs.
    Raises DataError where no `nn.Embedding` reads them, or all candidates are one id to it.
    """
    found: list[SoftInput] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids = inputs[0] if inputs else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) < 2:
            return
        differs = (ids != ids[:1]).any(0)
        if not bool(differs.any()):
            return
        assert isinstance(module, nn.Embedding)
        positions = torch.nonzero(differs).flatten()
        found.append(SoftInput(module, positions, output[:, int(positions[0])].detach().clone()))
        stop()

    run_until_seen(model, rows, [m for m in model.modules() if isinstance(m, nn.Embedding)], look)
    if not found:
        raise DataError(
            f"{type(model).__name__} has no nn.Embedding whose input tells the candidates apart: "
            "give candidates with ids of their own, or leave this attack out"
        )
    return found[0]


def stop() -> NoReturn:
    """End the forward pass of `run_until_seen`, from within its hook."""
    raise _Seen


def run_until_seen(
    model: nn.Module, batch: Batch, modules: Sequence[nn.Module], look: Any
) -> None:
    """A forward pass without dropout or gradients, `look` a forward hook on `modules`."""
    training = model.training
    handles = [module.register_forward_hook(look) for module in modules]
    try:
        with torch.no_grad():
            model.eval()(batch)
    except _Seen:
        pass
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
