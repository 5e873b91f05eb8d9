"""Populations of virtual devices and the fleet that trains them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sottovoce.simulations.assistant import AssistantPopulation as AssistantPopulation
    from sottovoce.simulations.fleet import SimulatedFleet as SimulatedFleet
    from sottovoce.simulations.grid import LocalGrid as LocalGrid
    from sottovoce.simulations.jsonl import JsonlPopulation as JsonlPopulation
    from sottovoce.simulations.parquet import ParquetPopulation as ParquetPopulation
    from sottovoce.simulations.population import Population as Population
    from sottovoce.simulations.populations import make_population as make_population

# Loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "AssistantPopulation": "assistant",
    "JsonlPopulation": "jsonl",
    "LocalGrid": "grid",
    "ParquetPopulation": "parquet",
    "Population": "population",
    "SimulatedFleet": "fleet",
    "make_population": "populations",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sottovoce.simulations.{_HOMES[name]}"), name)
