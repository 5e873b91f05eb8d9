"""Who is sampled, and how their updates are combined."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sottovoce.strategies.noised_sum import NoisedSum as NoisedSum
    from sottovoce.strategies.optimizers import FedAdam as FedAdam
    from sottovoce.strategies.optimizers import FedAvg as FedAvg
    from sottovoce.strategies.samplers import ActivitySampler as ActivitySampler
    from sottovoce.strategies.samplers import FixedSizeSampler as FixedSizeSampler
    from sottovoce.strategies.samplers import Sampler as Sampler
    from sottovoce.strategies.samplers import UniformSampler as UniformSampler
    from sottovoce.strategies.samplers import make_sampler as make_sampler
    from sottovoce.strategies.separated import SeparatedSampler as SeparatedSampler

# Loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "ActivitySampler": "samplers",
    "FedAdam": "optimizers",
    "FedAvg": "optimizers",
    "FixedSizeSampler": "samplers",
    "NoisedSum": "noised_sum",
    "Sampler": "samplers",
    "SeparatedSampler": "separated",
    "UniformSampler": "samplers",
    "make_sampler": "samplers",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sottovoce.strategies.{_HOMES[name]}"), name)
