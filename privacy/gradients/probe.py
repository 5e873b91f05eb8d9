"""A look, on a model's first pass, whether its rows really are apart.

Layers take the first dimension of their input for the rows. A model that puts time there is found
out by its shape, except where a batch has as many rows as positions; and a model may mix rows by
operations that no layer sees. Then the "gradient of row r" is not that of example r, and a clipped
sum bounds nobody's influence. So the first backward pass with two rows or more is run twice before,
from about half of the losses and from the others: every factor of the rest must be zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.factors import Factor
from sottovoce.privacy.gradients.norms import Memo, squared_norms
from sottovoce.privacy.gradients.tape import Tape


def check_rows_apart(tape: Tape, parameters: list[Tensor], losses: Tensor) -> None:
    """Raise UnsupportedLayer if the loss of one row reaches the factors of another.

    `losses`: (rows,), whose graph is kept for the pass proper. `parameters`: what is trained.
    """
    rows = losses.shape[0]
    half = torch.tensor([row.bit_count() % 2 == 1 for row in range(rows)], device=losses.device)
    half[-1] = not bool(half[0])  # or rows in reverse order would look like themselves
    mixed: list[str] = []
    loud = half

    @torch.no_grad()
    def listen(name: str, factor: Factor) -> None:
        if factor.rows() == rows and bool((squared_norms([factor], Memo())[~loud] > 0).any()):
            mixed.append(name)

    tape.listener = listen
    try:
        for loud in (half, ~half):
            torch.autograd.grad(
                losses[loud].sum(), parameters, allow_unused=True, retain_graph=True
            )
    finally:
        tape.listener = None
    if mixed:
        raise UnsupportedLayer(
            f"parameter {mixed[-1]!r} gets gradients of one row from the loss of another: the "
            "first dimension of every layer's input must be the rows (batch_first=True), and "
            "nothing may mix them"
        )
