"""How one example's influence on a step is bounded: the modes of eDP-SGD.

per_example  every example's gradient is clipped (Abadi et al. 2016, arXiv:1607.00133)
micro_batch  the mean gradient of every micro-batch is clipped (Dupuy et al. 2022,
             arXiv:2107.14586): an example moves its micro-batch's mean from one clipped vector to
             any other, so up to 2C

fixed        to C, a given number
automatic    C g / (|g| + 0.01): every gradient has about the norm C (AUTO-S, Bu et al. 2022,
             arXiv:2206.07136)
quantile     to a C that follows a private quantile of the norms (Andrew et al. 2021,
             arXiv:1905.03871; `sottovoce.privacy.optimizer.quantile`)
layer_wise   every layer's part to C / sqrt(layers), which together make C

Sensitivity of the sum, in L2, when one example is added or removed; and what the ledger gets for
noise of deviation sigma C:

                 fixed   automatic   quantile   layer_wise      noise multiplier in the ledger
    per_example    C         C           C       sqrt(sum C_l^2) = C        sigma
    micro_batch   2C        2C          2C                        2C        sigma / 2
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["per_example", "micro_batch"]
Threshold = Literal["fixed", "automatic", "quantile", "layer_wise"]

# Float32 rounding may carry a rescaled gradient past the threshold; one part in a million less
# keeps the released norm of every unit at or below it.
SAFETY = 1.0 - 1e-6
STABILITY = 0.01  # gamma of AUTO-S: what keeps small gradients from being blown up to C


@dataclass(frozen=True)
class Clipping:
    """What a step does to the gradients of its examples before they are summed.

    `clip_norm`: C, a number, or a tensor (groups,) with one for each group of rows. `mode`: what
    is clipped, each row or the mean of each micro-batch. `threshold`: how.

    *Guarantee*: `sensitivity` bounds the L2 change of a group's sum when one example is added or
    removed: every unit (an example, or a micro-batch) adds a vector of norm at most C, and one
    example changes one unit. As a unit of its own it comes or goes: C. In a micro-batch it turns
    the unit's vector into another one: 2C, and no less, since the two may be opposite.
    *Assumes*: what a row's loss computes depends on its own example only; thresholds are public
    or released with noise; examples take their micro-batches independently of each other
    (`sottovoce.privacy.gradients.micro_batches`).
    """

    clip_norm: float | Tensor
    mode: Mode = "per_example"
    threshold: Threshold = "fixed"

    def __post_init__(self) -> None:
        _check("clipping", self.mode, get_args(Mode))
        _check("threshold", self.threshold, get_args(Threshold))
        if isinstance(self.clip_norm, Tensor):
            if not bool(((self.clip_norm > 0) & self.clip_norm.isfinite()).all()):
                raise ValueError(f"clip_norm={self.clip_norm.tolist()} must be above 0 and finite")
        elif not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm} must be above 0 and finite")

    @property
    def multiple(self) -> float:
        """Sensitivity over `clip_norm` under add/remove: 1, or 2 for micro-batches."""
        return 2.0 if self.mode == "micro_batch" else 1.0

    @property
    def sensitivity(self) -> float | Tensor:
        """Most that one example added or removed moves a group's sum, in L2."""
        return self.multiple * self.clip_norm

    def at(self, clip_norm: float | Tensor) -> Clipping:
        """The same rule with another threshold."""
        return replace(self, clip_norm=clip_norm)


def as_clipping(clipping: float | Tensor | Clipping) -> Clipping:
    """A rule as it is, or the usual one for a bare threshold."""
    return clipping if isinstance(clipping, Clipping) else Clipping(clipping)


def clip_scales(
    squares: dict[str, Tensor], clipping: Clipping, groups: int, names: Iterable[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Factors (units,) for each parameter, and the units' unclipped norms (units,).

    `squares`: squared norms (units,) by parameter name. `names`: all trainable parameters, used
    in this pass or not: were C split among the layers used, one example that needs one more
    would change everybody's share. A unit whose norm is not finite gets 0.
    """
    norms = torch.stack(list(squares.values())).sum(0).sqrt_()
    if clipping.threshold != "layer_wise":
        factor = clip_factors(norms, clipping.clip_norm, groups, clipping.threshold)
        return dict.fromkeys(squares, factor), norms
    share = clipping.clip_norm / math.sqrt(len({_layer(name) for name in names}))
    layers: dict[str, list[str]] = {}
    for name in squares:
        layers.setdefault(_layer(name), []).append(name)
    scales: dict[str, Tensor] = {}
    for used in layers.values():
        own = torch.stack([squares[name] for name in used]).sum(0).sqrt()
        factor = clip_factors(own, share, groups, "fixed")
        scales |= dict.fromkeys(used, torch.where(torch.isfinite(norms), factor, 0.0))
    return scales, norms


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def clip_factors(
    norms: Tensor, clip_norm: float | Tensor, groups: int, threshold: Threshold = "fixed"
) -> Tensor:
    """(units,) factors min(1, C / norm), or C / (norm + 0.01) for `automatic`; 0 if not finite.

    The first projects onto the ball of radius C (less one part in a million), which never moves
    two vectors further apart.
    """
    if isinstance(clip_norm, Tensor):
        clip_norm = clip_norm.repeat_interleave(len(norms) // groups)
    if threshold == "automatic":
        factor = clip_norm * SAFETY / (norms + STABILITY)
    else:
        factor = (clip_norm * SAFETY / norms).clamp_(max=1.0)
    return factor.nan_to_num_(nan=0.0)  # an infinite norm gives 0 as it is


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not exist: choose {' or '.join(choices)}")
