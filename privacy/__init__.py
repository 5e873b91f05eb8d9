"""eDP-SGD, clipping, noise, the ledger and the accountants."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sottovoce.privacy.accountants import by_level as by_level
    from sottovoce.privacy.accountants import epsilon as epsilon
    from sottovoce.privacy.batches import PoissonBatches as PoissonBatches
    from sottovoce.privacy.calibration import calibrate_noise as calibrate_noise
    from sottovoce.privacy.clipping import Clipping as Clipping
    from sottovoce.privacy.correlated import CorrelatedMechanism as CorrelatedMechanism
    from sottovoce.privacy.edp_sgd import EDPSGD as EDPSGD
    from sottovoce.privacy.engine import clipped_gradients as clipped_gradients
    from sottovoce.privacy.events import GaussianEvent as GaussianEvent
    from sottovoce.privacy.events import NonPrivateRelease as NonPrivateRelease
    from sottovoce.privacy.events import RandomisedReport as RandomisedReport
    from sottovoce.privacy.ledger import Ledger as Ledger
    from sottovoce.privacy.noise import NoiseSource as NoiseSource
    from sottovoce.privacy.optimised import make_factorisation as make_factorisation
    from sottovoce.privacy.planning import Layer as Layer
    from sottovoce.privacy.planning import calibrate_layers as calibrate_layers
    from sottovoce.privacy.planning import largest_cohort as largest_cohort
    from sottovoce.privacy.planning import most_rounds as most_rounds
    from sottovoce.privacy.planning import smallest_population as smallest_population
    from sottovoce.privacy.quantile import QuantileClip as QuantileClip
    from sottovoce.privacy.separation import Schedule as Schedule
    from sottovoce.privacy.tracker import EpsilonTracker as EpsilonTracker

# Loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "Clipping": "clipping",
    "CorrelatedMechanism": "correlated",
    "EDPSGD": "edp_sgd",
    "EpsilonTracker": "tracker",
    "GaussianEvent": "events",
    "Layer": "planning",
    "Ledger": "ledger",
    "NoiseSource": "noise",
    "NonPrivateRelease": "events",
    "PoissonBatches": "batches",
    "QuantileClip": "quantile",
    "RandomisedReport": "events",
    "Schedule": "separation",
    "by_level": "accountants",
    "calibrate_layers": "planning",
    "calibrate_noise": "calibration",
    "clipped_gradients": "engine",
    "epsilon": "accountants",
    "largest_cohort": "planning",
    "most_rounds": "planning",
    "smallest_population": "planning",
    "make_factorisation": "optimised",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sottovoce.privacy.{_HOMES[name]}"), name)
