"""The tape: what one backward pass leaves behind, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.gradients.factors import Factor


class Tape:
    """Factors recorded by tracked leaves during a backward pass, by parameter name.

    `rows` is the number of rows of the pass in progress: set by the first leaf that sees them, so
    that an embedding fed with one broadcast row (position ids of shape (1, T)) can be told apart.
    `fillers`: (groups,) int64 rows that each group begins with and whose losses weigh nothing, or
    None: those of one pass (`fill`), for layers that save themselves the arithmetic.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self.inside = 0  # calls of the whole model that are under way
        self.listener: Callable[[str, Factor], None] | None = None
        self.fillers: Tensor | None = None
        self._filled = 0  # rows of the pass that they are for
        self._lengths: Tensor | None = None
        self._width = 0
        self._row_seeds: Tensor | None = None
        self._calls = 0
        self._factors: dict[str, list[Factor]] = {}

    @property
    def row_seeds(self) -> Tensor | None:
        """(rows,) int64 seeds of the rows' dropout masks; None: masks from torch's generator.

        Set before a forward pass; dropout calls are counted from then on.
        """
        return self._row_seeds

    @row_seeds.setter
    def row_seeds(self, seeds: Tensor | None) -> None:
        self._row_seeds, self._calls = seeds, 0

    def next_call(self) -> int:
        """The number of this dropout call since `row_seeds` was set."""
        self._calls += 1
        return self._calls - 1

    @property
    def rows_now(self) -> int | None:
        """The rows of the forward pass under way; None outside of one, where `rows` may be stale.

        A batch of one example called past the model's own forward, after a bigger one, must not
        be taken for a row that stands for all: its copies would count that often.
        """
        return self.rows if self.inside else None

    def fill(self, fillers: Tensor, rows: int) -> None:
        """Set `fillers` before a forward pass over `rows` rows of len(fillers) groups."""
        each, rest = divmod(rows, len(fillers))
        if rest or int(fillers.min()) < 0 or int(fillers.max()) > each:
            raise ValueError(
                f"fillers {fillers.tolist()} do not fit {rows} rows: a group begins with some of "
                "its own"
            )
        self.fillers, self._filled = fillers.contiguous(), rows

    def fillers_of(self, rows: int) -> Tensor | None:
        """The fillers where a layer sees the rows of the pass that they are for."""
        return self.fillers if rows == self._filled and rows == self.rows_now else None

    def measure(self, lengths: Tensor, width: int) -> None:
        """Set how many positions are each row's own, (rows,), of `width`; 0: nobody's row."""
        short = bool(((lengths > 0) & (lengths < width)).any())
        self._lengths, self._width = lengths if short else None, width

    def own(self, index: Tensor) -> Tensor | None:
        """(rows, T) bool, which positions of `index` are a row's own; None for all of them.

        What stands behind a row's end is there for the sake of other rows: a layer that has no
        padding index must not look at it, or a row's gradient would hang on its company.
        """
        lengths = self._lengths
        if lengths is None or index.shape != (len(lengths), self._width):
            return None
        ends = torch.where(lengths > 0, lengths, self._width)
        return torch.arange(self._width, device=index.device) < ends.unsqueeze(1)

    def see(self, rows: int) -> None:
        """Note the number of rows of a forward pass (the largest first dimension seen)."""
        if self.rows is None or rows > self.rows:
            self.rows = rows

    def record(self, name: str, factor: Factor) -> None:
        """Keep a factor, or give it to `listener` where one is set (`probe`)."""
        if self.listener is not None:
            return self.listener(name, factor)
        self._factors.setdefault(name, []).append(factor)

    @property
    def pending(self) -> bool:
        """Whether a backward pass left factors that nobody took."""
        return bool(self._factors)

    def take(self, rows: int, *, check: bool = True) -> dict[str, list[Factor]]:
        """Hand over the factors of a pass over `rows` rows and forget them.

        Raises UnsupportedLayer when some layer's first dimension was not the rows: its per-row
        gradients cannot be told apart.
        """
        factors, self._factors, self.rows, self.fillers = self._factors, {}, None, None
        self._lengths = None
        for name, uses in factors.items() if check else ():
            for use in uses:
                seen = use.rows()
                if seen != rows:
                    raise UnsupportedLayer(
                        f"parameter {name!r} saw {seen} rows where the losses have {rows}: the "
                        "first dimension of every trainable layer's input must be the rows"
                    )
        return factors

