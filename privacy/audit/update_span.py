"""Which tokens stood where, from the update of the first layer that reads embeddings.

Petrov et al. 2024, DAGER, arXiv:2405.15586. A linear layer's weight gradient is a sum of outer
products g a^T over the positions of a batch, so its row space holds the layer's inputs a as long as
there are fewer of them than dimensions. The first query projection (or an LSTM's input weights)
reads nothing but a token and its position: the inputs of all tokens at all positions can be written
down from the public model, and each is tested for lying in the row space.

Several local steps move the weights in between, so that inputs lie near the space, not in it;
noise hides the directions that are weaker than its own largest singular value (Marchenko and
Pastur 1967). How close is close follows from how close absent tokens come: no threshold is tuned,
and the truth is never looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from sottovoce.client.tasks import Batch
from sottovoce.privacy.audit.soft_inputs import run_until_seen, stop
from sottovoce.privacy.audit.update_rows import FALSE_ALARMS, Recovery
from sottovoce.privacy.audit.update_view import (
    DeviceUpdate,
    TokenTable,
    seen_ids,
    token_table,
    without_decay,
)

ROUNDING = 1e-5  # singular values below this share of the largest are float32's
TOKENS_AT_ONCE = 1024
CLEAR_GAP = 10.0  # ratio of distances that parts what is in the space from what is near
_LOCAL = 1e-4
_NEAREST = 1e-7  # distances below are rounding, and count as equal


@dataclass(frozen=True)
class Placed:
    """What the probe said: of `tokens`, wherever they stand, and of tokens at each position.

    `pairs`: None where the layer's inputs do not depend on positions. Pairs are fewer than they
    seem: with tokens u and v both at p and u at q too, "v at q" lies in the space by itself.
    """

    tokens: Recovery
    pairs: Recovery | None


@dataclass(frozen=True)
class Reader:
    """The first trainable layer that reads features (rows, T, D), and its weight's name."""

    module: nn.Module
    weight: str
    transposed: bool


def recover_positions(
    model: nn.Module, update: DeviceUpdate, *, vocabulary: int, max_length: int
) -> Placed | str:
    """Candidates are all tokens at all positions; or why the probe does not apply.

    `vocabulary`, `max_length`: of the task.
    """
    table = token_table(model, update.batch)
    reader = first_reader(model, update)
    if reader is None:
        return "no layer that reads embeddings is trained: all are frozen"
    weight = without_decay(model, update)[reader.weight].double()
    if not bool(weight.any()):
        return f"the update of {reader.weight} is zero: no gradient reached it"
    span = row_space(weight.T if reader.transposed else weight, update.deviation)
    candidates = _candidates(model, table, reader, vocabulary)
    length = min(max_length, 2 + int(update.batch["lengths"].max()))
    free = _free_dimensions(model, table, reader, candidates, length, span)
    if free < 1 or len(span) >= min(weight.shape):
        return f"the update of {reader.weight} has rank {len(span)}: its row space is everything"
    if not position_alone(model, table, reader, candidates[:64], length):
        return f"what {reader.weight} reads of a token depends on its neighbours"
    ids, distances = _distances(model, table, reader, candidates, length, span)
    varying = (ids != ids[:1]).any(0)
    present = _presence(seen_ids(model, table, update.batch), ids)
    if _same_everywhere(model, table, reader, candidates[:64], length):
        first = int(torch.nonzero(varying)[0])
        anywhere = np.isin(ids[:, first].numpy(), _all_ids(model, table, update.batch))
        return Placed(_recovery(distances[:, first : first + 1], anywhere[:, None], free), None)
    kept = varying.numpy()
    pairs = _recovery(distances[:, kept], present[:, kept], free)
    return Placed(_anywhere(pairs, len(ids)), pairs)


def first_reader(model: nn.Module, update: DeviceUpdate) -> Reader | None:
    """The first layer of a pass that reads features and whose weight is in the update."""
    known: dict[nn.Module, Reader] = {}
    for path, module in model.named_modules():
        kind = type(module).__name__
        name = f"{path}.weight_ih_l0" if kind in ("LSTM", "GRU", "RNN") else f"{path}.weight"
        if kind in ("Linear", "Conv1D", "LSTM", "GRU", "RNN") and name in update.parts:
            known[module] = Reader(module, name, transposed=kind == "Conv1D")
    found: list[Reader] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        if inputs and inputs[0].dim() == 3:
            found.append(known[module])
            stop()

    run_until_seen(model, update.batch, list(known), look)
    return found[0] if found else None


def row_space(weight: Tensor, deviation: float | None) -> Tensor:
    """(rank, in) orthonormal rows: the directions of `weight` (out, in) that stand out of noise.

    `deviation`: of the noise in each coordinate, 0 for none, None for unknown. Singular values of
    noise alone stay below deviation * (sqrt(out) + sqrt(in)), but for a little; unknown noise is
    judged by the median singular value (Gavish and Donoho 2014, arXiv:1305.5870).
    """
    _, values, rows = torch.linalg.svd(weight.double(), full_matrices=False)
    least = ROUNDING * float(values[0])
    out, into = weight.shape
    if deviation is None:
        ratio = min(out, into) / max(out, into)
        factor = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
        least = max(least, factor * float(values.median()))
    elif deviation > 0:
        least = max(least, 1.02 * deviation * (math.sqrt(out) + math.sqrt(into)))
    found: Tensor = rows[values > least]
    return found


def surprise(distances: NDArray[np.float64], free: int) -> NDArray[np.float64]:
    """(tokens, positions) -log p of so small a distance to the space, were the token absent.

    An absent token's input, of length 1, leaves `free` dimensions outside of the space: its squared
    distance follows about a chi-square law with as many degrees of freedom, scaled by the median
    of its position, whose tokens have the position in common and are absent but for a few.
    """
    squares = np.maximum(distances, _NEAREST) ** 2
    ratio = squares / np.maximum(np.median(squares, axis=0), _NEAREST**2)
    scores: NDArray[np.float64] = -stats.chi2.logcdf(ratio * stats.chi2.median(free), free)
    return scores


def position_alone(
    model: nn.Module, table: TokenTable, reader: Reader, tokens: Tensor, length: int
) -> bool:
    """Whether the layer's input at a position follows from the token there alone."""
    same = tokens.unsqueeze(1).repeat(1, length)
    shift = (torch.arange(len(tokens)).unsqueeze(1) + torch.arange(length)) % len(tokens)
    ids, alone = _inputs(model, table, reader, same)
    mixed_ids, mixed = _inputs(model, table, reader, tokens[shift])
    first = int(torch.nonzero((ids != ids[:1]).any(0))[0])
    at = torch.arange(length)
    expected = alone[:, first : first + length][shift, at]
    scale = float(alone.abs().max())
    return float((mixed[:, first : first + length] - expected).abs().max()) <= _LOCAL * scale


def _candidates(model: nn.Module, table: TokenTable, reader: Reader, vocabulary: int) -> Tensor:
    """All tokens but <pad>, and but what a pretrained model reads as its own padding."""
    tokens = torch.arange(1, vocabulary)
    ids, _ = _inputs(model, table, reader, tokens.unsqueeze(1))
    place = int(torch.nonzero((ids != ids[:1]).any(0))[0])
    padding = table.module.padding_idx
    return tokens if padding is None else tokens[ids[:, place] != padding]


def _same_everywhere(
    model: nn.Module, table: TokenTable, reader: Reader, tokens: Tensor, length: int
) -> bool:
    """Whether the layer's input is that of the token at every position alike."""
    ids, inputs = _inputs(model, table, reader, tokens.unsqueeze(1).repeat(1, length))
    inputs = inputs[:, (ids != ids[:1]).any(0)]
    return bool((inputs - inputs[:, :1]).abs().max() <= _LOCAL * inputs.abs().max())


def _free_dimensions(
    model: nn.Module, table: TokenTable, reader: Reader, tokens: Tensor, length: int, span: Tensor
) -> int:
    """Dimensions of the layer's inputs that the span leaves open; a norm before it takes one."""
    width = span.shape[1]
    rows = tokens[: 4 * width].unsqueeze(1).repeat(1, length)
    _, inputs = _inputs(model, table, reader, rows)
    values = torch.linalg.svdvals(inputs.flatten(0, 1)[:: max(1, length // 2)].double())
    return int((values > ROUNDING * values[0]).sum()) - len(span)


def _distances(
    model: nn.Module, table: TokenTable, reader: Reader, tokens: Tensor, length: int, span: Tensor
) -> tuple[Tensor, NDArray[np.float64]]:
    """(tokens, positions) ids that the table reads, and distances of the inputs to the space."""
    ids, distances = [], []
    for part in torch.split(tokens, TOKENS_AT_ONCE):
        read, inputs = _inputs(model, table, reader, part.unsqueeze(1).repeat(1, length))
        unit = torch.nn.functional.normalize(inputs.double(), dim=2)
        distances.append((unit - (unit @ span.T) @ span).norm(dim=2))
        ids.append(read)
    return torch.cat(ids), torch.cat(distances).numpy()


def _inputs(
    model: nn.Module, table: TokenTable, reader: Reader, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """What table and layer read of rows of `tokens` without padding."""
    rows, length = tokens.shape
    batch: Batch = {"tokens": tokens, "lengths": torch.full((rows,), length)}
    found: dict[str, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        if module is table.module:
            found["ids"] = inputs[0].clone()
        else:
            found["inputs"] = inputs[0].clone()
            stop()

    run_until_seen(model, batch, [table.module, reader.module], look)
    return found["ids"], found["inputs"]


def _presence(rows: list[Tensor], ids: Tensor) -> NDArray[np.bool_]:
    """(tokens, positions) whether a row of the device has that id at that position."""
    present = np.zeros(tuple(ids.shape), dtype=np.bool_)
    for position in range(ids.shape[1]):
        there = [int(row[position]) for row in rows if position < len(row)]
        present[:, position] = np.isin(ids[:, position].numpy(), there)
    return present


def _all_ids(model: nn.Module, table: TokenTable, batch: Batch) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.unique(torch.cat(seen_ids(model, table, batch)).numpy())
    return found


def _recovery(
    distances: NDArray[np.float64], present: NDArray[np.bool_], free: int
) -> Recovery:
    score = surprise(distances, free)
    flagged = score > -math.log(FALSE_ALARMS / score.size)
    if flagged.any():
        flagged &= distances <= _gap(distances[flagged])
    return Recovery(score.ravel(), flagged.ravel(), present.ravel())


def _anywhere(pairs: Recovery, tokens: int) -> Recovery:
    """Of each token, at whichever position."""
    score, flagged, present = (
        values.reshape(tokens, -1) for values in (pairs.score, pairs.flagged, pairs.present)
    )
    return Recovery(np.max(score, 1), np.any(flagged, axis=1), np.any(present, axis=1))


def _gap(distances: NDArray[np.float64]) -> float:
    """Where flagged distances part by `CLEAR_GAP` or more, the end of the near ones; else the last.

    Inputs of one exact gradient are in the space but for rounding, while a device's token at a
    position where it never stood is only near it.
    """
    ordered = np.sort(np.maximum(distances, _NEAREST))
    jumps = ordered[1:] / ordered[:-1]
    if len(jumps) and jumps.max() >= CLEAR_GAP:
        return float(ordered[int(jumps.argmax())])
    return float(ordered[-1])
