"""What a bound from example canaries is held against, and what canaries cost.

A claim per device covers single examples as well: with or without one of them, a device is a device
with other data, which is one device exchanged for another. So the releases' epsilon per device
under replace-one bounds what one example changes, as long as the device's public level, and with it
the chance that it is sampled, stays the same; canary slots are chosen so. The add/remove epsilon
per device does not: it says nothing of a device that stays and says something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sottovoce.client.errors import RunError
from sottovoce.privacy.audit.claims import ADD_REMOVE, Claim
from sottovoce.privacy.audit.outcome import Utility


def implied_claims(claims: Sequence[Claim]) -> tuple[list[Claim], list[str]]:
    """The claims, with one per example that follows from one per device where there is no other.

    Also what to say of it.
    """
    by_unit = {claim.unit: claim for claim in claims}
    device, example = by_unit.get("device"), by_unit.get("example")
    if device is None or example is None or example.finite or device.exchanged is None:
        return list(claims), []
    implied = replace(
        device, unit="example", epsilon=device.exchanged, published=None, relation=ADD_REMOVE
    )
    if not implied.finite:
        return list(claims), []
    note = (
        f"the claim per example, {implied.epsilon:.4g}, follows from the one per device: with or "
        "without one example is one device exchanged for another"
    )
    return [implied if claim is example else claim for claim in claims], [note]


def utility_beside(summary: dict[str, Any], without: str | None) -> tuple[Utility, ...]:
    """Metrics of the run beside those of the run in the folder `without`, which has no canaries.

    Raises RunError where that is no finished run.
    """
    if without is None:
        return ()
    try:
        text = (Path(without).expanduser() / "summary.json").read_text(encoding="utf-8")
        other: dict[str, Any] = json.loads(text)["metrics"]
    except (OSError, ValueError, KeyError):
        raise RunError(
            f"without={without} is not a finished run: give the folder of the same run without "
            "canaries"
        ) from None
    own = summary.get("metrics") or {}
    both = [name for name, value in own.items() if _number(value) and _number(other.get(name))]
    return tuple(Utility(name, float(own[name]), float(other[name])) for name in both)


def _number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
