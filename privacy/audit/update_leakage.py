"""What single updates give away, measured on the real training path with and without its noise.

The observer is `fleet`: whoever reads one device's update, as a coordinator without secure
aggregation does. Two fast probes, the embedding table's rows (`update_rows`) and the span of the
first layer's inputs (`update_span`), each asked of several devices. Central noise, added to the sum
by the coordinator, hides nothing from this observer, nor does clipping: only noise on the device.

Fast probes find what is easy to find. That they find nothing is no proof.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from torch import nn

from sottovoce.client.errors import DataError
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.tasks import Task
from sottovoce.privacy.audit.leakage import ABSENCE, Leakage, Probe, share
from sottovoce.privacy.audit.material import FinishedRun
from sottovoce.privacy.audit.roc import auc
from sottovoce.privacy.audit.update_rows import Recovery, recover_tokens
from sottovoce.privacy.audit.update_span import Placed, recover_positions
from sottovoce.privacy.audit.update_view import DeviceUpdate, observed_update
from sottovoce.privacy.mechanisms.noise import NoiseSource

if TYPE_CHECKING:
    from sottovoce.simulations.population import Population

SEES = "one device's update of one round and the model it started from"
Found = Recovery | Placed | str


@dataclass(frozen=True)
class UpdateProbe(Probe):
    """A probe of single updates under some local `training`, of `devices` drawn by the seed.

    `name`: update_rows or update_span.
    """

    name: str
    training: LocalTraining
    devices: int = 8
    engine: str = "grouped"
    unit: str = "example"
    observer: str = "fleet"
    sees: str = SEES
    cost: str = "a device's local training each, and a singular value decomposition"

    def measure(self, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
        model = run.model if run.initial_model is None else run.initial_model
        found = update_leakage(
            run.population, run.task, model, self.training, probes=(self.name,),
            devices=self.devices, engine=self.engine, seed=seed, confidence=confidence,
        )
        return found[0]


def without_noise(training: LocalTraining) -> LocalTraining:
    """The same local training with every clip, and no noise."""
    if training.example is None:
        return training
    return replace(training, example=replace(training.example, noise_multiplier=0.0))


def update_leakage(
    population: Population,
    task: Task,
    model: nn.Module,
    training: LocalTraining,
    *,
    probes: Sequence[str] = ("update_rows", "update_span"),
    devices: int | Sequence[int] = 8,
    engine: str = "grouped",
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Leakage]:
    """What each probe reads out of the first update that `devices` send from `model`.

    `devices`: ids, or how many to draw. The noise is drawn by `seed`, of the size that a run's
    would be. Headline: `recall`, the share of a device's distinct tokens that the probe names;
    `chance`: that of naming as many tokens blindly. Raises DataError where no device has an update.
    """
    from sottovoce.simulations.fleet import SimulatedFleet

    source = NoiseSource.from_seed(seed)
    fleet = SimulatedFleet(population, task, model, training, source, 1, engine=engine)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates: dict[int, DeviceUpdate] = {}
    for device in _chosen(population, devices, seed):
        try:
            updates[device] = observed_update(fleet, parameters, device)
        except DataError:
            continue  # a Poisson draw without any example
    if not updates:
        raise DataError("no device has an update to look at: raise devices=")
    return [_measure(name, task, model, updates, confidence) for name in probes]


def _chosen(population: Population, devices: int | Sequence[int], seed: int) -> list[int]:
    if not isinstance(devices, int):
        return [int(device) for device in devices]
    generator = np.random.default_rng(seed)
    size = min(devices, len(population))
    return sorted(int(i) for i in generator.choice(len(population), size, replace=False))


def _probe(name: str, task: Task, model: nn.Module, update: DeviceUpdate) -> Found:
    if name == "update_rows":
        return recover_tokens(model, update)
    if name == "update_span":
        size = task.vocabulary.size
        return recover_positions(model, update, vocabulary=size, max_length=task.max_length)
    raise ValueError(f"probe {name!r} does not exist: choose update_rows or update_span")


def _measure(
    name: str, task: Task, model: nn.Module, updates: dict[int, DeviceUpdate], confidence: float
) -> Leakage:
    started = time.perf_counter()
    found = {device: _probe(name, task, model, update) for device, update in updates.items()}
    rows = [_row(device, updates[device], one) for device, one in found.items()]
    seconds = time.perf_counter() - started
    kept = [(one.tokens if isinstance(one, Placed) else one) for one in found.values()
            if not isinstance(one, str)]
    empty = Leakage(name, "example", "fleet", SEES, confidence=confidence, seconds=seconds)
    if not kept:
        reason = next(one for one in found.values() if isinstance(one, str))
        return replace(empty, rows=tuple(rows), not_applicable=reason)
    hits = sum(one.hits for one in kept)
    flagged = sum(int(one.flagged.sum()) for one in kept)
    present = sum(int(one.present.sum()) for one in kept)
    candidates = sum(len(one.present) for one in kept)
    recall, interval = share(hits, present, confidence)
    return replace(
        empty,
        figures={
            "recall": recall,
            "precision": hits / flagged if flagged else 1.0,
            "named": flagged / len(kept),
            "tokens": present / len(kept),
            "auc": float(np.mean([_auc(one) for one in kept])),
            "devices": float(len(kept)),
            "noised": float(np.mean([update.noised for update in updates.values()])),
            **_pair_figures([one for one in found.values() if isinstance(one, Placed)]),
        },
        headline="recall",
        interval=interval,
        chance=flagged / candidates,
        p_value=float(stats.hypergeom.sf(hits - 1, candidates, present, flagged)),
        rows=tuple(rows),
        note=f"a fast probe; intervals take tokens for independent; {ABSENCE}",
    )


def _pair_figures(found: Sequence[Placed]) -> dict[str, float]:
    """Precision and recall of tokens at their positions, where the layer tells positions apart."""
    pairs = [one.pairs for one in found if one.pairs is not None]
    if not pairs:
        return {}
    hits = sum(one.hits for one in pairs)
    flagged = sum(int(one.flagged.sum()) for one in pairs)
    return {
        "placed_recall": hits / sum(int(one.present.sum()) for one in pairs),
        "placed_precision": hits / flagged if flagged else 1.0,
    }


def _row(device: int, update: DeviceUpdate, found: Found) -> dict[str, Any]:
    row: dict[str, Any] = {"device": device, "examples": len(update.batch["lengths"])}
    if isinstance(found, str):
        unknown = ("tokens", "named", "precision", "recall", "auc")
        return {**row, **dict.fromkeys(unknown), "not_applicable": found}
    tokens = found.tokens if isinstance(found, Placed) else found
    return {
        **row,
        "tokens": int(tokens.present.sum()),
        "named": int(tokens.flagged.sum()),
        "precision": tokens.precision,
        "recall": tokens.recall,
        "auc": _auc(tokens),
        "not_applicable": None,
    }


def _auc(found: Recovery) -> float:
    if found.present.all() or not found.present.any():
        return 0.5
    return auc(found.score[found.present], found.score[~found.present])
