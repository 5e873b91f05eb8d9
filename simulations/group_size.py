"""How devices train: how many at once, and on stacked weights or one after another.

Nobody knows beforehand what is fastest: tiny models want many devices in one tensor program, where
calls cost more than arithmetic; large ones, and recurrent ones for which torch has fused kernels,
want one device at a time, whose weights stay in the processor's cache. So the first groups are
timed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from sottovoce.client.coins import has_dropout
from sottovoce.client.errors import UnsupportedLayer
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.tables import sparse_table
from sottovoce.privacy.gradients.grouping import refuse_unknown
from sottovoce.privacy.layers import native_lstm

CANDIDATES = (1, 16, 32, 64, 128)
USUAL = 16
WITH_KERNELS = 32  # usual where layers have kernels of their own: calls are the larger part
TRIALS = 4  # the first of which warms up
GROUP_BYTES = 1 << 27  # about, of a group in training
STACKS = 4  # of trainable weights: they, gradients, moves and noise
KEPT_BYTES = 10  # in a forward pass, at each position, for each output of a linear layer
GATES = 8  # numbers that a recurrent layer keeps for each of its hidden units
FUSED = (nn.LSTM, nn.GRU, nn.RNN)

ALONE, NATIVE = "alone", "native"
BAGS = 128  # devices of a group that is trained by `BagTrainer`


class Way(NamedTuple):
    """How a group trains: by `GroupTrainer`'s engine of that name, by `LoneTrainer` where it is
    "alone", or by `BagTrainer` where it is "native"; and how many devices it has.
    """

    engine: str
    devices: int


def largest_group(model: nn.Module, positions: int, table: str | None = None) -> int:
    """Devices that a thread has room for at once, each with `positions` in a step's batch.

    `table`: an embedding that is cut down to the rows that a device's text touches, or None.
    """
    own = sum(
        p.element_size() * (p.numel() if name != table else min(len(p), positions) * p.shape[1])
        for name, p in model.named_parameters() if p.requires_grad
    )
    widths = sum(getattr(m, "out_features", GATES * getattr(m, "hidden_size", 0))
                 for m in model.modules())
    return max(1, GROUP_BYTES // max(1, own * STACKS + positions * widths * KEPT_BYTES))


def possible_ways(
    model: nn.Module, training: LocalTraining, engine: str, positions: int
) -> list[Way]:
    """All ways to train the model, the usual one first; `positions` of a step's batch.

    Device by device is possible by plain SGD where no examples are clipped and no dropout mask
    must follow from an example's own seed; it is usual for recurrent layers without a kernel of
    ours, and the only way for layers without a tracked form, for which UnsupportedLayer is raised
    where it is not possible.
    """
    if engine == "opacus":
        return [Way(engine, 1)]
    most = largest_group(model, positions, sparse_table(model, training)[0])
    sizes = sorted({min(size, most) for size in CANDIDATES})
    quick = any(_has_kernels(module) for module in model.modules())
    usual = min(WITH_KERNELS if quick else USUAL, most)
    ways = [Way(engine, size) for size in sorted(sizes, key=lambda size: size != usual)]
    if training.example is not None or not training.plain or has_dropout(model):
        return ways
    alone = Way(ALONE, usual)
    try:
        refuse_unknown(model)
    except UnsupportedLayer:
        return [alone]
    fused = any(type(m) in FUSED and not _has_kernels(m) for m in model.modules())
    return [alone, *ways] if fused else [*ways, alone]


def _has_kernels(module: nn.Module) -> bool:
    """Whether a recurrent layer runs on compiled kernels when it is grouped."""
    return type(module) is nn.LSTM and native_lstm.suited(*module.parameters())


class GroupSize:
    """The fastest of several ways to train a group, timed on the first ones.

    With `fixed`, as in a seeded run, it is the first way, so that the run's last bits do not depend
    on a clock.
    """

    def __init__(self, ways: list[Way], *, fixed: bool) -> None:
        self._ways = ways
        self.chosen: Way | None = ways[0] if fixed or len(ways) == 1 else None
        self._trials = ways * TRIALS  # in turn: a busy moment should not hit one way alone
        self._seconds: dict[Way, list[float]] = {way: [] for way in ways}

    @property
    def devices(self) -> int:
        """Devices of the largest group that may come."""
        ways = self._ways if self.chosen is None else [self.chosen]
        return max(way.devices for way in ways)

    def next(self) -> Way:
        """How the next group is to train."""
        if self.chosen is not None:
            return self.chosen
        return self._trials.pop(0) if self._trials else self._ways[0]

    def measured(self, way: Way, work: float, seconds: float) -> None:
        """Note how long a group took for its `work`; a way's first group only warms it up."""
        if self.chosen is not None or not work:
            return
        self._seconds[way].append(seconds / work)
        if all(len(times) >= TRIALS for times in self._seconds.values()):
            self.chosen = min(self._ways, key=lambda way: min(self._seconds[way][1:]))
