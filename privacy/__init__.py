"""eDP-SGD, clipping, noise, the ledger and the accountants."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sottovoce.privacy.accountants import by_level as by_level
    from sottovoce.privacy.accountants import epsilon as epsilon
    from sottovoce.privacy.calibration import calibrate_noise as calibrate_noise
    from sottovoce.privacy.edp_sgd import EDPSGD as EDPSGD
    from sottovoce.privacy.engine import clipped_gradients as clipped_gradients
    from sottovoce.privacy.events import GaussianEvent as GaussianEvent
    from sottovoce.privacy.events import NonPrivateRelease as NonPrivateRelease
    from sottovoce.privacy.ledger import Ledger as Ledger
    from sottovoce.privacy.tracker import EpsilonTracker as EpsilonTracker

# Loaded on first use, so that importing the package costs nothing.
_HOMES = {
    "EDPSGD": "edp_sgd",
    "EpsilonTracker": "tracker",
    "GaussianEvent": "events",
    "Ledger": "ledger",
    "NonPrivateRelease": "events",
    "by_level": "accountants",
    "calibrate_noise": "calibration",
    "clipped_gradients": "engine",
    "epsilon": "accountants",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sottovoce.privacy.{_HOMES[name]}"), name)
