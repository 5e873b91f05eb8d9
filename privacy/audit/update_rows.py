"""Which tokens a device has, from the update of its embedding table.

Only rows of tokens in its text have a gradient; all others stay put (Melis et al. 2018,
arXiv:1805.04049, section 6). Without noise the rows that moved *are* the device's vocabulary,
clipped or not. With noise in every coordinate a row shows where its length is above the noise
floor, which is read off the update itself: most rows hold nothing but noise.

*Assumes*: an honest-but-curious observer of single updates (`fleet`). A sum over devices, as the
coordinator sees it, shows the same of all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from sottovoce.privacy.audit.roc import Scores
from sottovoce.privacy.audit.update_view import (
    DeviceUpdate,
    seen_ids,
    token_table,
    without_decay,
)

FALSE_ALARMS = 0.05  # expected number of rows of pure noise that are taken for tokens
_MOVED = 1e-12  # of the largest row: below, a row is rounding
_FLOAT32 = 1e-6  # of a row of weights: what subtracting them again may leave


@dataclass(frozen=True)
class Recovery:
    """What a probe said of each candidate, and the truth. All (candidates,).

    `score`: higher for more likely present. `flagged`: what the probe would name.
    """

    score: Scores
    flagged: NDArray[np.bool_]
    present: NDArray[np.bool_]

    @property
    def hits(self) -> int:
        return int((self.flagged & self.present).sum())

    @property
    def precision(self) -> float:
        """Share of what was named that is true; 1 where nothing was."""
        return self.hits / max(1, int(self.flagged.sum())) if self.flagged.any() else 1.0

    @property
    def recall(self) -> float:
        return self.hits / max(1, int(self.present.sum()))


def recover_tokens(model: nn.Module, update: DeviceUpdate) -> Recovery | str:
    """Candidates are all rows of the table but <pad>; or why the probe does not apply."""
    table = token_table(model, update.batch)
    weight = model.get_parameter(table.weight)
    if table.weight not in update.parts:
        return "the embedding table is frozen: its update does not leave the device"
    users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(users) > 1:
        return f"the embedding table is shared with {users[1]}, whose gradient moves every row"
    part = without_decay(model, update)[table.weight]
    present = np.zeros(len(part), dtype=np.bool_)
    present[torch.cat(seen_ids(model, table, update.batch)).numpy()] = True
    length = float(weight.detach().norm(dim=1).max()) if update.decayed else 0.0
    score, flagged = moved_rows(part, rounding=(_FLOAT32 * length) ** 2)
    return Recovery(score[1:], flagged[1:], present[1:])


def moved_rows(
    update: Tensor, *, rounding: float = 0.0
) -> tuple[Scores, NDArray[np.bool_]]:
    """(rows,) squared length of each row of `update` (rows, D), and whether it is above the floor.

    `rounding`: squared length up to which a row counts as 0.
    The floor is 0 where a row is 0, which noise leaves none. Else most rows are taken for noise:
    their median sets the scale of a chi-square law with D degrees of freedom, whose tail allows
    `FALSE_ALARMS` rows.
    """
    rows, width = update.shape
    lengths: Scores = update.double().pow(2).sum(1).numpy()
    rounding = max(rounding, _MOVED * float(lengths.max()))
    if lengths.min() <= rounding:
        return lengths, lengths > rounding
    scale = float(np.median(lengths)) / stats.chi2.median(width)
    return lengths, lengths > scale * stats.chi2.isf(FALSE_ALARMS / rows, width)
