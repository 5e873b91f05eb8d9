"""Epsilon on the gateway's metrics page: what a run has spent, and what it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from sottovoce.server.live_limits import is_live

UNITS = ("device", "example")


@dataclass
class PrivacyGauges:
    """Tells this process' gateways after every round. `budgets`: by unit, None without one."""

    budgets: Mapping[str, float | None]

    def on_round(self, state: Any, record: Mapping[str, Any]) -> None:
        from sottovoce.server.gateway.live_fleet import gateways_here

        for gateway in gateways_here():
            for unit, budget in self.budgets.items():
                spent = record.get(f"epsilon_{unit}")
                if spent is not None:
                    gateway.note_privacy(unit, float(spent), budget)


def gauges(config: DictConfig) -> list[PrivacyGauges]:
    """The callback of a live run that protects something; none for others."""
    if not is_live(config):
        return []
    return [PrivacyGauges({
        unit: config.privacy[unit].max_epsilon for unit in UNITS if config.privacy[unit].enabled
    })]
