"""Dropout whose mask in a row depends on that row alone.

With `tape.row_seeds` set, the mask entry of row r at coordinates (i, j, ..., k) in the n-th dropout
call of a pass is a hash of (row seed, n, i, j, ..., k). Coordinates enter one by one, never as a
flat index, so a row drops the same units alone, in a bigger batch, and with longer padding: a
device's training does not depend on whom it was batched with.

The hash is splitmix64's finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators") over all coordinates but the last, and a 32-bit multiply-xorshift hash over the last
one, where nearly all the work is. Masks are no part of a privacy guarantee: a hash is enough.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.tape import Tape

# splitmix64's constants, as signed numbers: torch has no unsigned 64-bit arithmetic.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)
# lowbias32's, of C. Wellons' search for well-mixing multipliers (2018).
LOW_FIRST = 0x7FEB352D
LOW_SECOND = 0x846CA68B - (1 << 32)


def dropped(x: Tensor, p: float, training: bool, tape: Tape) -> Tensor:
    """`x` (rows, ...) with entries dropped at rate `p` and the rest divided by 1 - p.

    Torch's own generator is used unless `tape.row_seeds` is set; then every row has its own mask,
    and an `x` of one row stands for all of them.
    Raises UnsupportedLayer where the first dimension is not the rows.
    """
    if tape.row_seeds is None or not training or p == 0.0:
        return F.dropout(x, p, training)
    rows = tape.row_seeds.shape[0]
    if x.shape[0] != rows:
        if x.shape[0] != 1:
            raise UnsupportedLayer(
                f"a dropout saw {x.shape[0]} rows where {rows} rows have seeds: the first "
                "dimension of a dropout's input must be the rows"
            )
        x = x.expand(rows, *x.shape[1:])
    return x * row_mask(tape.row_seeds, tape.next_call(), tuple(x.shape[1:]), p).to(x.dtype)


@torch.no_grad()
def row_mask(seeds: Tensor, call: int, shape: tuple[int, ...], p: float) -> Tensor:
    """(rows, *shape) float32, 0 with probability `p` and 1 / (1 - p) otherwise.

    `seeds`: (rows,) int64. `call`: which dropout call of the pass this is.
    """
    if p >= 1.0:
        return torch.zeros((seeds.shape[0], *shape), device=seeds.device)
    key = _mix(_mix(seeds + GOLDEN) + _steps(call + 1, seeds.device)[-1])
    for size in shape[:-1]:
        key = _mix(key.unsqueeze(-1) + _steps(size, seeds.device))
    if shape:
        last = _mix(_steps(shape[-1], seeds.device))
        bits = _last_mix(_low(key).unsqueeze(-1) ^ _low(last))
    else:
        bits = _low(key)
    threshold = min(round(p * 2.0**32), (1 << 32) - 1) - (1 << 31)
    return (bits >= threshold).to(torch.float32).mul_(1.0 / (1.0 - p))


def _steps(size: int, device: torch.device) -> Tensor:
    """Weyl steps 1, 2, ..., `size` times the golden constant: (size,) int64."""
    return torch.arange(1, size + 1, device=device).mul_(GOLDEN)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser; the masks turn torch's arithmetic shifts into logical ones."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _low(z: Tensor) -> Tensor:
    """The low 32 bits, as int32."""
    return (((z & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def _last_mix(z: Tensor) -> Tensor:
    """A 32-bit hash in place; only its high bits are used."""
    shifted = z >> 16
    z.bitwise_xor_(shifted.bitwise_and_(0xFFFF)).mul_(LOW_FIRST)
    torch.bitwise_right_shift(z, 15, out=shifted)
    return z.bitwise_xor_(shifted.bitwise_and_(0x1FFFF)).mul_(LOW_SECOND)


class RowDropout(nn.Dropout):
    """`torch.nn.Dropout` that asks a tape for the rows' seeds (see `dropped`)."""

    tape: Tape

    @classmethod
    def of(cls, layer: nn.Dropout, tape: Tape) -> RowDropout:
        """The same layer, its mode and hooks included, with `tape`."""
        result = cls(layer.p)
        result.__dict__.update(layer.__dict__)
        result.tape = tape
        return result

    def forward(self, x: Tensor) -> Tensor:
        if self.tape.row_seeds is None:
            return super().forward(x)
        return dropped(x, self.p, self.training, self.tape)
