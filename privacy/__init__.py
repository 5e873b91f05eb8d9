"""eDP-SGD, clipping, noise, the ledger and the accountants."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sottovoce.privacy.accounting.accountants import by_level as by_level
    from sottovoce.privacy.accounting.accountants import epsilon as epsilon
    from sottovoce.privacy.accounting.calibration import calibrate_noise as calibrate_noise
    from sottovoce.privacy.accounting.events import GaussianEvent as GaussianEvent
    from sottovoce.privacy.accounting.events import NonPrivateRelease as NonPrivateRelease
    from sottovoce.privacy.accounting.events import RandomisedReport as RandomisedReport
    from sottovoce.privacy.accounting.ledger import Ledger as Ledger
    from sottovoce.privacy.accounting.planning import Layer as Layer
    from sottovoce.privacy.accounting.planning import calibrate_layers as calibrate_layers
    from sottovoce.privacy.accounting.planning import largest_cohort as largest_cohort
    from sottovoce.privacy.accounting.planning import most_rounds as most_rounds
    from sottovoce.privacy.accounting.planning import smallest_population as smallest_population
    from sottovoce.privacy.accounting.tracker import EpsilonTracker as EpsilonTracker
    from sottovoce.privacy.gradients.clipping import Clipping as Clipping
    from sottovoce.privacy.gradients.engine import clipped_gradients as clipped_gradients
    from sottovoce.privacy.mechanisms.correlated import CorrelatedMechanism as CorrelatedMechanism
    from sottovoce.privacy.mechanisms.noise import NoiseSource as NoiseSource
    from sottovoce.privacy.mechanisms.optimised import make_factorisation as make_factorisation
    from sottovoce.privacy.mechanisms.separation import Schedule as Schedule
    from sottovoce.privacy.optimizer.batches import PoissonBatches as PoissonBatches
    from sottovoce.privacy.optimizer.edp_sgd import EDPSGD as EDPSGD
    from sottovoce.privacy.optimizer.quantile import QuantileClip as QuantileClip

# Loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "Clipping": "gradients.clipping",
    "CorrelatedMechanism": "mechanisms.correlated",
    "EDPSGD": "optimizer.edp_sgd",
    "EpsilonTracker": "accounting.tracker",
    "GaussianEvent": "accounting.events",
    "Layer": "accounting.planning",
    "Ledger": "accounting.ledger",
    "NoiseSource": "mechanisms.noise",
    "NonPrivateRelease": "accounting.events",
    "PoissonBatches": "optimizer.batches",
    "QuantileClip": "optimizer.quantile",
    "RandomisedReport": "accounting.events",
    "Schedule": "mechanisms.separation",
    "by_level": "accounting.accountants",
    "calibrate_layers": "accounting.planning",
    "calibrate_noise": "accounting.calibration",
    "clipped_gradients": "gradients.engine",
    "epsilon": "accounting.accountants",
    "largest_cohort": "accounting.planning",
    "most_rounds": "accounting.planning",
    "smallest_population": "accounting.planning",
    "make_factorisation": "mechanisms.optimised",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sottovoce.privacy.{_HOMES[name]}"), name)
