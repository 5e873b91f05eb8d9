"""Model inversion: read a canary's unknown words out of a model by gradient descent on its input.

Parikh et al. 2022 (arXiv:2203.13920): the words in front of a secret and its labels are known. Each
unknown token is relaxed to a mixture of candidates, a softmax of free logits over a temperature;
the mixture of their embeddings enters the model, and the logits descend the loss of the known
labels (intent and slots) while the temperature falls, until each mixture is nearly one token. The
canary was trained on, so the code that the model finds the most plausible is likely to be its own.

Beyond the paper: many restarts at once as rows of one batch, and the discrete codes found are
improved place by place (`Inversion.sweeps`, 0 for the paper's attack). The best restart is that
with the lowest loss *under the model*: the truth is never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.tasks import Batch, Task
from sottovoce.privacy.audit.soft_inputs import SoftInput

ROWS_AT_ONCE = 2048
MOST_TRIED = 64  # candidates of a place that a sweep tries: the likeliest


@dataclass(frozen=True)
class Inversion:
    """How hard to try. `hot`, `cold`: first and last temperature. `sweeps` over all places."""

    steps: int = 80
    restarts: int = 16
    learning_rate: float = 0.3
    hot: float = 2.0
    cold: float = 0.1
    sweeps: int = 2

    def __post_init__(self) -> None:
        if self.steps < 0 or self.restarts < 1 or self.sweeps < 0:
            raise ConfigError(
                f"steps={self.steps}, restarts={self.restarts}, sweeps={self.sweeps}: give 0 or "
                "more steps and sweeps, and 1 or more restarts"
            )
        if not 0 < self.cold <= self.hot or self.learning_rate <= 0:
            raise ConfigError(
                f"hot={self.hot}, cold={self.cold}, learning_rate={self.learning_rate}: "
                "temperatures fall from hot to cold, and all are above 0"
            )

    def temperature(self, step: int) -> float:
        """Falls geometrically."""
        done = step / max(1, self.steps - 1)
        return float(self.hot * (self.cold / self.hot) ** done)


def invert(
    task: Task,
    model: nn.Module,
    batch: Batch,
    unknown: SoftInput,
    how: Inversion,
    *,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The candidates most plausible at the unknown places, and their loss.

    `batch`: (N,) canaries with any candidate at their unknown places, which are the same in all
    rows. Returns (N, places) numbers of candidates and (N,) losses in nats under `model`, which is
    left as it was. Best of all restarts by that loss.
    """
    count, training = len(batch["lengths"]), model.training
    model.eval()
    try:
        rows = {name: tensor.repeat_interleave(how.restarts, 0) for name, tensor in batch.items()}
        logits = torch.cat([
            _descend(task, model, part, unknown, how, generator) for part in _parts(rows)
        ])
        codes, losses = _best_codes(task, model, rows, unknown, logits, how.sweeps)
    finally:
        model.train(training)
    best = losses.view(count, how.restarts).argmin(1)
    chosen = torch.arange(count) * how.restarts + best
    return codes[chosen], losses[chosen]


def _descend(
    task: Task,
    model: nn.Module,
    rows: Batch,
    unknown: SoftInput,
    how: Inversion,
    generator: torch.Generator,
) -> Tensor:
    """(rows, places, candidates) logits after the descent, by Adam."""
    shape = (len(rows["lengths"]), len(unknown.positions), len(unknown.table))
    logits = torch.randn(shape, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=how.learning_rate)
    for step in range(how.steps):
        with unknown.mixed(torch.softmax(logits / how.temperature(step), dim=2)):
            loss = task.losses(model, rows).sum()
        (logits.grad,) = torch.autograd.grad(loss, [logits])
        optimizer.step()
    return logits.detach()


def _best_codes(
    task: Task, model: nn.Module, rows: Batch, unknown: SoftInput, logits: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Each row's likeliest code, then better ones that differ in one place, sweep by sweep."""
    codes = logits.argmax(2)
    tried = logits.topk(min(MOST_TRIED, logits.shape[2]), dim=2).indices
    losses = _losses(task, model, rows, unknown, codes)
    many = tried.shape[2]
    repeated = {name: tensor.repeat_interleave(many, 0) for name, tensor in rows.items()}
    for _ in range(sweeps):
        before = codes.clone()
        for place in range(codes.shape[1]):
            options = codes.unsqueeze(1).repeat(1, many, 1)
            options[:, :, place] = tried[:, place]
            found = _losses(task, model, repeated, unknown, options.flatten(0, 1))
            lowest, at = found.view(len(codes), many).min(1)
            better = lowest < losses
            codes[better, place] = tried[better, place, at[better]]
            losses = torch.minimum(losses, lowest)
        if torch.equal(before, codes):
            break
    return codes, losses


def _losses(
    task: Task, model: nn.Module, rows: Batch, unknown: SoftInput, codes: Tensor
) -> Tensor:
    """(rows,) loss of each row with its own code: (rows, places) numbers of candidates."""
    found = []
    with torch.no_grad():
        for part in _parts({**rows, "codes": codes}):
            weights = nn.functional.one_hot(part.pop("codes"), len(unknown.table))
            with unknown.mixed(weights.to(unknown.table.dtype)):
                found.append(task.losses(model, part))
    return torch.cat(found)


def _parts(rows: Batch) -> Iterator[Batch]:
    """The rows in parts of `ROWS_AT_ONCE`."""
    for start in range(0, len(rows["lengths"]), ROWS_AT_ONCE):
        yield {name: tensor[start : start + ROWS_AT_ONCE] for name, tensor in rows.items()}
