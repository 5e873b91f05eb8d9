"""Assigned devices: real examples without user ids, dealt out like a skewed population.

Label-Dirichlet x log-normal activity. Every device draws its label preferences from
Dirichlet(alpha * K * p), p the labels' shares and K their number (Hsu, Qi, Brown 2019,
arXiv:1909.06335, with alpha counted per label), and its number of examples from the log-normal
activity model, scaled so that every example is dealt exactly once and every device has one at
least. Large alpha: every device like the whole; small alpha: a few labels each.

`flwr-datasets` is not used here: its Dirichlet partitioner has no activity model (sizes follow from
the label draw and are redrawn until a minimum fits), takes Hugging Face datasets only, and imports
for seconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.errors import ConfigError
from sottovoce.simulations.activity import LogNormalActivity
from sottovoce.simulations.hashing import stream


def assign_devices(
    labels: NDArray[np.int32],
    devices: int,
    *,
    alpha: float,
    model: LogNormalActivity,
    seed: int,
) -> NDArray[np.int64]:
    """(examples,) device of each example, 0 .. devices - 1, none empty.

    `labels`: (examples,) label of each, all 0 where there are none. Raises ConfigError when there
    are fewer examples than devices or alpha is not above 0.
    """
    examples = len(labels)
    if not 1 <= devices <= examples:
        raise ConfigError(
            f"devices={devices} must lie between 1 and the {examples} examples:"
            " set population.devices"
        )
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha={alpha} must be above 0: set population.alpha")
    generator = np.random.default_rng(int(stream(seed, "partition")))
    sizes = device_sizes(model.of(0, devices, seed).astype(np.float64), examples)
    stock = np.bincount(labels)
    preferences = _preferences(stock / examples, devices, alpha, generator)
    seats = np.repeat(np.arange(devices), sizes)
    wanted = _deal(seats, preferences, stock, generator)
    return _hand_out(labels, seats, wanted, generator)


def device_sizes(activity: NDArray[np.float64], examples: int) -> NDArray[np.int64]:
    """(devices,) sizes >= 1 in proportion to `activity` that add up to `examples`."""
    spare = np.maximum(activity * examples / activity.sum() - 1, 0)
    exact = spare / max(spare.sum(), 1e-300) * (examples - len(activity))
    sizes: NDArray[np.int64] = 1 + np.floor(exact).astype(np.int64)
    left = examples - int(sizes.sum())
    order = np.argsort(np.floor(exact) - exact, kind="stable")  # largest remainder first
    np.add.at(sizes, order[np.arange(left) % len(sizes)], 1)
    return sizes


def _preferences(
    share: NDArray[np.float64], devices: int, alpha: float, generator: np.random.Generator
) -> NDArray[np.float64]:
    """(devices, labels) Dirichlet draws, in logarithms so that a tiny alpha does not underflow.

    Gamma(a) = Gamma(a + 1) * U**(1 / a), Marsaglia and Tsang 2000.
    """
    shape = np.maximum(alpha * len(share) * share, 1e-12)
    size = (devices, len(share))
    logs = np.log(generator.standard_gamma(shape + 1, size))
    logs += np.log(1 - generator.random(size)) / shape
    preferences: NDArray[np.float64] = np.exp(logs - logs.max(axis=1, keepdims=True))
    return preferences


def _deal(
    seats: NDArray[np.int64],
    preferences: NDArray[np.float64],
    stock: NDArray[np.int64],
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """(seats,) label of each seat, every label exactly `stock` times.

    In rounds: each free seat asks for a label its device likes among those still in stock; a label
    asked for too often goes to seats at random. A round fills all seats or empties a label.
    """
    left = stock.copy()
    label = np.full(len(seats), -1, dtype=np.int64)
    free = generator.permutation(len(seats))
    while len(free):
        asked = _ask(seats[free], preferences, left, generator)
        order = np.argsort(asked, kind="stable")
        starts = np.searchsorted(asked[order], np.arange(len(left)))
        rank = np.arange(len(free)) - starts[asked[order]]
        served = order[rank < left[asked[order]]]
        label[free[served]] = asked[served]
        left -= np.bincount(asked[served], minlength=len(left))
        free = generator.permutation(free[label[free] < 0])
    return label


def _ask(
    devices: NDArray[np.int64],
    preferences: NDArray[np.float64],
    left: NDArray[np.int64],
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """(seats,) a label still in stock for each seat of `devices`."""
    asking, position = np.unique(devices, return_inverse=True)
    liked = preferences[asking] * (left > 0)
    nothing = ~(liked.sum(axis=1) > 1e-200)
    liked[nothing] = left  # none of its labels is left: whatever there is
    ceilings = np.cumsum(liked, axis=1)
    ceilings /= ceilings[:, -1:]
    ceilings += np.arange(len(asking))[:, None]
    labels = len(left)
    place = np.searchsorted(
        ceilings.ravel(), position + generator.random(len(devices)), side="right"
    )
    asked: NDArray[np.int64] = np.clip(place - position * labels, 0, np.flatnonzero(left)[-1])
    return asked


def _hand_out(
    labels: NDArray[np.int32],
    seats: NDArray[np.int64],
    wanted: NDArray[np.int64],
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """(examples,) device of each example: those of a label go to its seats in random order."""
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    device = np.empty(len(labels), dtype=np.int64)
    device[by_label] = seats[np.argsort(wanted, kind="stable")]
    return device
