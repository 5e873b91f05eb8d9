"""A run from its folder's settings to its finished folder, on any grid."""

from __future__ import annotations

import json
import math
import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from rich.console import Console

from sottovoce.client.errors import RunError
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.callbacks import Bar, Checkpoints, LedgerFile, MetricsFile, RequestLog
from sottovoce.server.checkpoints import (
    RunState,
    discard_drafts,
    load_latest,
    save_checkpoint,
)
from sottovoce.server.conditions_limits import projection_factor
from sottovoce.server.coordinator import Coordinator, Plan
from sottovoce.server.device_canaries import CanaryFiles
from sottovoce.server.evaluation import Evaluator
from sottovoce.server.finish import write_results
from sottovoce.server.gateway.gauges import gauges
from sottovoce.server.live_limits import is_live
from sottovoce.server.metrics_setup import wanted
from sottovoce.server.progress import Progress
from sottovoce.server.schedule_setup import CLAIM as CORRELATED
from sottovoce.server.setup import Setup, make_setup
from sottovoce.server.timeline_setup import make_evaluator, round_facts
from sottovoce.simulations.code_population import keep_codes
from sottovoce.simulations.experiment import Experiment, build_experiment
from sottovoce.simulations.workers import private_kb

HELD_OUT_EXAMPLES = 2000
ENDED = {
    "finished": "has finished all {rounds} rounds",
    "budget_spent": "has spent its privacy budget in {rounds} rounds",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status`: finished, budget_spent, interrupted. `run`: a live one's name."""

    status: str
    reason: str | None
    summary: dict[str, Any]
    run: str = ""


def start_run(grid: Grid, folder: Path) -> Outcome:
    """Round 1 to the end of the run whose settings are in `folder`/config.yaml."""
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    experiment = build_experiment(text)
    seed = experiment.config.seed
    source = NoiseSource.from_system() if seed is None else NoiseSource.from_seed(seed)
    setup = make_setup(experiment, source, None, text)
    source.save(folder / "checkpoints")
    keep_codes(experiment.population, folder)
    parameters = {
        name: p.detach().clone()
        for name, p in experiment.initial_model().named_parameters()
        if p.requires_grad
    }
    state = RunState(0, parameters, ledger=setup.strategy.ledger)
    save_checkpoint(folder / "checkpoints", state, experiment.config.run.keep_checkpoints)
    return _run(grid, folder, experiment, setup, state)


def continue_run(
    grid: Grid, folder: Path, *, progress: bool | None = None, afresh: bool = False
) -> Outcome:
    """The rest of a stopped run: the same result as if it had never stopped.

    `progress`: whether to show a bar, in place of the folder's own setting. `afresh`: whether
    fleets draw new batches and noise for a round that they are asked for again; what they may have
    answered before, and what the ledger on disk knows to have been released, is then booked as
    releases of their own.
    """
    refuse_ended(folder)
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    state, complaints = load_latest(folder / "checkpoints")
    source = NoiseSource.load(folder / "checkpoints")
    experiment = build_experiment(text)
    settle_ledger(folder / "ledger.json")
    if afresh:
        keep_releases(folder / "ledger.json", state)
    setup = make_setup(experiment, source, state, text)
    setup.warnings += complaints
    if afresh:
        book_lost(folder, setup, state)
    discard_drafts(folder)
    discard_drafts(folder / "checkpoints")
    MetricsFile(folder).keep_until(state.round or -1)  # round 0 is evaluated again
    return _run(grid, folder, experiment, setup, state, progress)


def settle_ledger(path: Path) -> None:
    """Finish what a killed process was about to append to the ledger. RunError where it is torn."""
    if path.exists():
        Ledger.load(path).save(path)


def keep_releases(path: Path, state: RunState) -> None:
    """Let `state` go on with the ledger on disk, where that knows of releases after the checkpoint.

    They stay counted, and the rounds are released once more. RunError where their noise hangs
    together with that of other rounds, so that none of it can be drawn anew.
    """
    if not path.exists():
        return
    ledger = Ledger.load(path)
    if len(ledger) <= len(state.ledger):
        return
    released = any(event.unit == "device" for event in ledger.events[len(state.ledger) :])
    if CORRELATED in ledger.claims and released:
        raise RunError(
            f"{path.parent} released more after its last whole checkpoint (round {state.round}), "
            "with noise that is correlated over rounds and cannot be drawn anew: start a new run"
        )
    state.ledger = ledger


def book_lost(folder: Path, setup: Setup, state: RunState) -> None:
    """Book each request after `state` whose round was lost, in the ledger of `state`, once."""
    requests = RequestLog(folder / "checkpoints")
    known = requests.booked_after(state.round)
    for number in requests.after(state.round):
        setup.strategy.book_lost(number, again=known[number] > 0)
        known[number] -= 1


def book_interrupted(folder: Path, setup: Setup, state: RunState) -> None:
    """Book what real devices were asked for in vain by an interrupted run, should it not go on.

    The ledger on disk has it when this returns, and a resume does not book it a second time.
    """
    requests = RequestLog(folder / "checkpoints")
    keep_releases(folder / "ledger.json", state)
    setup.strategy.ledger = state.ledger
    new = Counter(requests.after(state.round)) - requests.booked_after(state.round)
    book_lost(folder, setup, state)
    state.ledger.save(folder / "ledger.json")
    for number in new.elements():
        requests.booked(number)


def refuse_ended(folder: Path) -> None:
    """Raise RunError where the run in `folder` has ended: by its plan or by its budget."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        status, rounds = summary["status"], summary["rounds"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if status in ENDED:
        NoiseSource.forget(folder / "checkpoints")
        raise RunError(
            f"{folder} {ENDED[status].format(rounds=rounds)}: nothing to resume; start a new run"
        )


def _run(
    grid: Grid,
    folder: Path,
    experiment: Experiment,
    setup: Setup,
    state: RunState,
    shows: bool | None = None,
) -> Outcome:
    config = experiment.config
    shows = config.run.progress if shows is None else shows
    began = time.perf_counter()
    model = experiment.initial_model()
    evaluator = make_evaluator(
        experiment.population,
        lambda population: Evaluator(
            population, experiment.task, model,
            devices=config.run.evaluation_devices, examples=HELD_OUT_EXAMPLES,
            private=wanted(config),
        ),
        lambda: setup.strategy.current.number if setup.strategy.current else 0,
    )
    progress = Progress(config.rounds, state.round, experiment.task.headline, shows)
    keeper = Checkpoints(
        folder / "checkpoints", config.run.checkpoint_every, config.run.keep_checkpoints
    )
    canaries = CanaryFiles(folder, setup.strategy.canaries)
    canaries.begin(setup.sampler, state.round)
    coordinator = Coordinator(
        setup.strategy,
        evaluator,
        setup.budget,
        Plan(config.rounds, config.run.evaluate_every),
        [LedgerFile(folder), MetricsFile(folder), canaries, keeper, Bar(progress), *gauges(config)],
        RequestLog(folder / "checkpoints").on_request,
        round_facts(experiment.population, projection=projection_factor(config) != 1),
    )
    status, reason = "finished", None
    with progress:
        for line in setup.warnings:
            Console(stderr=True).print(
                f"warning: {line}", style="red", markup=False, highlight=False, soft_wrap=True
            )
        try:
            state, reason = coordinator.run(grid, state)
            status = "finished" if reason is None else "budget_spent"
        except KeyboardInterrupt:
            status = "interrupted"
    if status == "interrupted":
        state, _ = load_latest(folder / "checkpoints")
        MetricsFile(folder).keep_until(state.round)
        if is_live(config):
            book_interrupted(folder, setup, state)
    elif state.round % config.run.checkpoint_every:
        save_checkpoint(folder / "checkpoints", state, config.run.keep_checkpoints)
    summary = write_results(
        folder, experiment, setup, state, status,
        seconds=time.perf_counter() - began, peak_memory_mb=peak_memory_mb(),
    )
    if status != "interrupted":
        NoiseSource.forget(folder / "checkpoints")
        RequestLog(folder / "checkpoints").forget()
    return Outcome(status, reason, summary, str(config.population.get("run") or ""))


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, and what its workers add to it, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return math.ceil((peak + private_kb()) / 1024)
