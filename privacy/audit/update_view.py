"""One device's update as whoever reads single updates sees it, beside what the device trained on.

The update comes from the real training path: a fleet that trains one device alone, with its
batches, clipping and noise. What it trained on is for counting right guesses only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sottovoce.client.errors import DataError
from sottovoce.client.tasks import Batch
from sottovoce.client.vocabulary import BOS, UNK
from sottovoce.privacy.audit.soft_inputs import run_until_seen, stop

if TYPE_CHECKING:
    from sottovoce.simulations.fleet import SimulatedFleet


@dataclass(frozen=True)
class DeviceUpdate:
    """`parts`: by parameter name, trained minus global, noise included. `batch`: the examples that
    the device trained on, collated. `deviation`: of the noise in each coordinate, public; None
    where local optimisers make it of no fixed size. `decayed`: whether weight decay is part of it.
    """

    parts: dict[str, Tensor]
    batch: Batch
    deviation: float | None
    decayed: bool = False

    @property
    def noised(self) -> bool:
        return self.deviation is None or self.deviation > 0


def observed_update(
    fleet: SimulatedFleet, parameters: dict[str, Tensor], device: int, server_round: int = 1
) -> DeviceUpdate:
    """The update of `device` in a round from the global `parameters`.

    Raises DataError where the device's draw of the round is empty or its update not finite: another
    device or round has something to look at.
    """
    from sottovoce.client.cohort import draw_cohort

    ids = np.array([device], dtype=np.int64)
    training = fleet.training.at(server_round)
    draw = draw_cohort(fleet.population, ids, training.plan, server_round, fleet.source)[0]
    drawn = np.unique(np.concatenate(draw.steps)).astype(np.int64)
    reply = fleet.train(parameters, ids, server_round)
    if not len(drawn) or not reply.devices_by_level:
        raise DataError(f"device={device} has no update in round {server_round}: take another")
    batch = fleet.task.collate(fleet.population.examples(ids, [drawn]))
    known = training.linear or training.step_deviation == 0
    deviation = math.sqrt(training.noise_variance(int(draw.level))) if known else None
    return DeviceUpdate(reply.sums, batch, deviation, training.optimizer.weight_decay > 0)


@dataclass(frozen=True)
class TokenTable:
    """The token embedding of a model: its module, and its parameter's name."""

    module: nn.Embedding
    weight: str


def token_table(model: nn.Module, batch: Batch) -> TokenTable:
    """The first `nn.Embedding` that a pass over `batch` enters with its tokens (rows, T).

    Raises DataError where there is none.
    """
    names = {m: n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    both = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    both["tokens"] = torch.cat([batch["tokens"], torch.where(batch["tokens"] == UNK, BOS, UNK)])
    found: list[TokenTable] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], _: Tensor) -> None:
        ids = inputs[0] if inputs else None
        if isinstance(ids, Tensor) and ids.dim() == 2 and bool((ids != ids[:1]).any()):
            assert isinstance(module, nn.Embedding)
            found.append(TokenTable(module, f"{names[module]}.weight"))
            stop()

    run_until_seen(model, both, list(names), look)
    if not found:
        raise DataError(f"{type(model).__name__} has no nn.Embedding that reads its tokens")
    return found[0]


def without_decay(model: nn.Module, update: DeviceUpdate) -> dict[str, Tensor]:
    """The update's parts with weight decay taken back, as any observer would.

    Decay alone moves a parameter w to (1 - c) w, with the same c everywhere: that of the median row
    of the embedding table, which holds little else. As they are where the table is not trained.
    """
    table = token_table(model, update.batch).weight
    if not update.decayed or table not in update.parts:
        return update.parts
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    moved, known = update.parts[table].double(), weights[table]
    shares = -(moved * known).sum(1) / known.pow(2).sum(1).clamp_min(1e-30)
    share = shares.median()
    return {name: part.double() + share * weights[name] for name, part in update.parts.items()}


def seen_ids(model: nn.Module, table: TokenTable, batch: Batch) -> list[Tensor]:
    """For each row of `batch` the ids that the table reads, padding cut off first.

    They are the model's own: a pretrained one numbers and frames tokens in its way.
    """
    rows: list[Tensor] = []
    found: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Any, ...], __: Tensor) -> None:
        found.append(inputs[0].detach().clone())
        stop()

    for row, length in enumerate(batch["lengths"].tolist()):
        single = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        cut = {n: t[:, : max(1, length)] if t.dim() > 1 else t for n, t in single.items()}
        run_until_seen(model, cut, [table.module], look)
        rows.append(found.pop()[0])
    return rows
