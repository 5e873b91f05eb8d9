"""All checks of a run with canary devices, against what its ledger claims."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.audit.checks import LEVEL, Check, shared
from sottovoce.privacy.audit.contribution_checks import clipping, divisor, weighting
from sottovoce.privacy.audit.device_record import DeviceRecord
from sottovoce.privacy.audit.release_checks import NOISE_REUSE, noise_level, noise_reuse


def run_checks(record: DeviceRecord, ledger: Any) -> tuple[Check, ...]:
    """Every check of the releases of a run, at one level for all together.

    *Guarantee*: a run whose noise, clipping and weights are as its ledger says is flagged with
    probability at most `LEVEL`, as far as what each check assumes holds.
    """
    if not len(record.rounds):
        return ()
    size = noise_level(record, claimed_deviations(record, ledger))
    reuse = noise_reuse(record, correlated=is_correlated(ledger))
    if size.p_value is not None and size.p_value <= LEVEL:
        reuse = NOISE_REUSE.inapplicable("noise is not of the claimed size")
    return shared([
        size,
        reuse,
        clipping(record),
        weighting(record),
        divisor(record, poisson=_is_poisson(ledger) and record.all_answered),
    ])


def claimed_deviations(record: DeviceRecord, ledger: Any) -> NDArray[np.float64]:
    """(R,) least deviation of each round's noise by the ledger, 0 where it has none for devices.

    Its multiplier is that of everything that a round releases; the sum alone may have more.
    """
    by_round = {event.round: event.noise_multiplier for event in _device_events(ledger)}
    multipliers = [by_round.get(int(number), 0.0) for number in record.rounds]
    return np.array(multipliers, dtype=np.float64) * record.clip_norm


def is_correlated(ledger: Any) -> bool:
    """Whether the run's noise is correlated over rounds."""
    return any("correlated" in event.purpose for event in _device_events(ledger))


def _is_poisson(ledger: Any) -> bool:
    events = _device_events(ledger)
    return bool(events) and all(event.sampling == "poisson" for event in events)


def _device_events(ledger: Any) -> list[GaussianEvent]:
    return [
        event for event in ledger.events
        if isinstance(event, GaussianEvent) and event.unit == "device"
        and event.observer == "release" and event.round is not None
    ]
