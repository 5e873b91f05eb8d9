"""From ragged words to padded tensors, without a Python object per example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sottovoce.client.examples import Examples, gather_ranges
from sottovoce.client.vocabulary import Pieces


@dataclass(frozen=True)
class Layout:
    """The pieces of some examples that survive the cut, laid end to end, row by row.

    `ids`: (pieces,) int32, vocabulary ids. `word`: (pieces,) int64, the piece's word as a position
    in `Examples.tokens`. `first`: (pieces,) bool, whether it opens its word. `lengths`: (rows,)
    int64, pieces kept of each example.
    """

    ids: NDArray[np.int32]
    word: NDArray[np.int64]
    first: NDArray[np.bool_]
    lengths: NDArray[np.int64]


def lay_out(pieces: Pieces, examples: Examples, limit: int) -> Layout:
    """Replace every word of `examples` by its pieces and cut each example at `limit` pieces."""
    if len(pieces.ids) == len(pieces.offsets) - 1 and bool((np.diff(pieces.offsets) == 1).all()):
        ids, starts = pieces.ids[examples.tokens], np.arange(len(examples.tokens) + 1)
    else:
        positions, starts = gather_ranges(pieces.offsets, examples.tokens.astype(np.int64))
        ids = pieces.ids[positions]
    word = np.repeat(np.arange(len(examples.tokens)), np.diff(starts))
    first = np.zeros(len(ids), dtype=np.bool_)
    first[starts[:-1][np.diff(starts) > 0]] = True
    bounds = starts[examples.offsets]
    uncut = np.diff(bounds)
    kept = np.arange(len(ids)) - np.repeat(bounds[:-1], uncut) < limit
    return Layout(ids[kept], word[kept], first[kept], np.minimum(uncut, limit))


def pad(values: NDArray[np.integer], lengths: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
    """`values` (sum of lengths,) as rows of a (len(lengths), T) table, right padded; T >= 1."""
    table = np.full((len(lengths), max(1, int(lengths.max(initial=0)))), fill, dtype=np.int64)
    table[real_positions(lengths, table.shape[1])] = values
    return table


def real_positions(lengths: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """(rows, width) True where a row of that length has a token."""
    mask: NDArray[np.bool_] = np.arange(width) < lengths[:, None]
    return mask


def tensor(values: NDArray[np.integer]) -> Tensor:
    """The array as an int64 tensor."""
    return torch.from_numpy(values.astype(np.int64, copy=False))
