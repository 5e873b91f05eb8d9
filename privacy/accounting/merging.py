"""Ledgers of several gateways as one, never cheaper than what any device went through.

`disjoint`     every device belongs to one gateway, and which one does not hang on its data: what
               other gateways release never reads it. Parallel composition: each level costs what it
               costs at the dearest gateway. Gateways may train one model in turns: given what was
               released before, another gateway's release is the same with and without the device.
`overlapping`  a device may be at any of them, or at all: everything composes.

*Assumes*: each gateway adds its own, independent noise; `disjoint` is enforced, by whoever admits
devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sottovoce.privacy.accounting.events import Event, GaussianEvent, NonPrivateRelease
from sottovoce.privacy.accounting.ledger import Ledger

WAYS = ("disjoint", "overlapping")


def merged(ledgers: Sequence[Ledger], devices: str) -> Ledger:
    """The merged ledger; gateways are called 1, 2, ... in the order of `ledgers`.

    All must protect the same units against the same observers. Of differing deltas the least is
    kept, the dearer one. Raises ValueError, in one line, for ledgers that cannot be merged.
    """
    if devices not in WAYS:
        raise ValueError(f"devices={devices!r} is unknown: use one of {', '.join(WAYS)}")
    if not ledgers:
        raise ValueError("there is no ledger to merge: give one for each gateway")
    for place, ledger in enumerate(ledgers, 1):
        _check(ledgers[0], ledger, place)
    claims: dict[str, Any] = {"gateways": [dict(ledger.claims) for ledger in ledgers]}
    shared = {
        key: value for key, value in ledgers[0].claims.items()
        if all(key in ledger.claims and ledger.claims[key] == value for ledger in ledgers)
    }
    noises = [str(ledger.claims.get("noise", "")) for ledger in ledgers]
    marked = {"noise": next(n for n in noises if "reproducible" in n)} if any(
        "reproducible" in noise for noise in noises
    ) else {}
    units = {unit for ledger in ledgers for unit in ledger.deltas}
    return Ledger(
        (_told(event, place, devices) for place, ledger in enumerate(ledgers, 1)
         for event in ledger),
        levels=sum((Counter(ledger.levels) for ledger in ledgers), Counter()),
        deltas={unit: min(_deltas(ledgers, unit)) for unit in sorted(units)},
        claims=shared | marked | claims | {"devices_of_gateways": devices},
    )


def _told(event: Event, place: int, devices: str) -> Event:
    """The event with its gateway, so that releases of two are never taken for one."""
    if isinstance(event, NonPrivateRelease):
        return event
    own = replace(event, purpose=f"gateway {place}: {event.purpose}")
    return replace(own, group=str(place)) if devices == "disjoint" else own


def _check(first: Ledger, other: Ledger, place: int) -> None:
    if any(not isinstance(e, NonPrivateRelease) and e.group is not None for e in other):
        raise ValueError(f"ledger {place} is merged already: merge all gateways at once")
    if _protects(first) != _protects(other):
        raise ValueError(
            f"ledger {place} protects {_text(other)}, the first one {_text(first)}: only ledgers "
            "of the same units and observers can be merged"
        )


def _protects(ledger: Ledger) -> set[tuple[str, str]]:
    return {
        (event.unit, event.observer) for event in ledger
        if isinstance(event, GaussianEvent)
    }


def _text(ledger: Ledger) -> str:
    found = sorted(f"{unit}s against {observer}" for unit, observer in _protects(ledger))
    return " and ".join(found) or "nothing"


def _deltas(ledgers: Sequence[Ledger], unit: str) -> list[float]:
    return [ledger.deltas[unit] for ledger in ledgers if unit in ledger.deltas]
