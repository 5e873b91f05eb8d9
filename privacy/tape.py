"""The tape: what one backward pass leaves behind, parameter by parameter."""

from __future__ import annotations

from sottovoce.client.errors import UnsupportedLayer
from sottovoce.privacy.factors import Dense, Direct, Factor, OneHot


class Tape:
    """Factors recorded by tracked leaves during a backward pass, by parameter name.

    `rows` is the number of rows of the pass in progress: set by the first leaf that sees them, so
    that an embedding fed with one broadcast row (position ids of shape (1, T)) can be told apart.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self._factors: dict[str, list[Factor]] = {}

    def see(self, rows: int) -> None:
        """Note the number of rows of a forward pass (the largest first dimension seen)."""
        if self.rows is None or rows > self.rows:
            self.rows = rows

    def record(self, name: str, factor: Factor) -> None:
        self._factors.setdefault(name, []).append(factor)

    def take(self, rows: int) -> dict[str, list[Factor]]:
        """Hand over the factors of a pass over `rows` rows and forget them.

        Raises UnsupportedLayer when some layer's first dimension was not the rows: its per-row
        gradients cannot be told apart.
        """
        factors, self._factors, self.rows = self._factors, {}, None
        for name, uses in factors.items():
            for use in uses:
                seen = _rows(use)
                if seen != rows:
                    raise UnsupportedLayer(
                        f"parameter {name!r} saw {seen} rows where the losses have {rows}: the "
                        "first dimension of every trainable layer's input must be the rows"
                    )
        return factors


def _rows(factor: Factor) -> int:
    if isinstance(factor, Direct):
        return factor.grad.shape[0]
    if isinstance(factor, Dense | OneHot):
        return factor.g.shape[0]
