"""One run of `sottovoce simulate` on the peer's users and model (`simulation.py` starts it).

The verb itself runs: coordinator, Flower messages, ledger, checkpoints, metrics, fleet. Only the
parts that settings name are replaced: population, task, model and who is drawn, which is the cohort
of the peer's bench (uniform, with replacement; so the ledger's claim is about no real sampler).
Figures are named as in the peer's `bench_pfl.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from safetensors.torch import load_file
from simulation_measure import descendants
from simulation_models import (
    TASK,
    Numbered,
    SyntheticUsers,
    bench_module,
    load,
    make_bench_task,
    our_form,
    our_name,
)
from torch import nn

from sottovoce.client import batch_draws
from sottovoce.privacy.mechanisms.philox import WORDS
from sottovoce.server import setup, simulate, training
from sottovoce.server.evaluation import Evaluator
from sottovoce.server.settings import compose
from sottovoce.simulations import experiment as experiments
from sottovoce.strategies.sampling import UniformSampler

BENCH = Path(__file__).parents[1].parent / "shared" / "bench"


class BenchCohorts(UniformSampler):
    """The cohorts of the peer's bench: a user may be in one twice."""

    def __init__(self, synth: Any, seed: int, size: int, users: int) -> None:
        super().__init__(users, size)
        self._draw = lambda number: synth.cohort(seed, number - 1, size, users)

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        drawn: NDArray[np.int64] = np.sort(self._draw(round))
        return drawn


@dataclass(frozen=True)
class BenchExperiment(experiments.Experiment):
    """An experiment that starts from a given model."""

    first: nn.Module | None = None

    def initial_model(self) -> nn.Module:
        assert self.first is not None
        return copy.deepcopy(self.first)


class TimedEvaluator(Evaluator):
    """Knows how long it took, so that a round's time can leave it out, as the peer's does."""

    seconds = 0.0
    cpu = 0.0

    def __call__(self, parameters: Any) -> dict[str, float]:
        began, cpu = time.perf_counter(), cpu_seconds()
        found = super().__call__(parameters)
        TimedEvaluator.seconds += time.perf_counter() - began
        TimedEvaluator.cpu += cpu_seconds() - cpu
        return found


class Clock:
    """A callback in place of the progress bar: when each round was over, files and all."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.cpu: list[float] = []
        self.records: list[dict[str, Any]] = []

    def on_round(self, state: Any, record: dict[str, Any]) -> None:
        self.stamps.append(time.perf_counter() - TimedEvaluator.seconds)
        self.cpu.append(cpu_seconds() - TimedEvaluator.cpu)
        self.records.append(record)


def cpu_seconds() -> float:
    """CPU time of this process and of all its descendants, ended or not (Linux)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(map(process_cpu_seconds, descendants(os.getpid())))
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def process_cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settings(options: argparse.Namespace, rounds: int) -> DictConfig:
    """The settings that the peer's run has, in our words."""
    both = options.privacy == "example"
    overrides = [
        f"privacy={'both' if both else 'device'}", "strategy=fedavg", "strategy.sampler=uniform",
        f"strategy.learning_rate={options.local_lr}", f"strategy.batch_size={options.local_batch}",
        "strategy.local_epochs=1", f"privacy.device.clip_norm={options.clip}",
        "privacy.device.epsilon=null", f"privacy.device.noise_multiplier={options.noise}",
        f"population.devices={options.users}", "population.max_examples_per_round=64",
        f"cohort_size={options.cohort}", f"rounds={rounds}", f"run.evaluate_every={rounds}",
        f"run.checkpoint_every={rounds}",  # the peer's run writes none
        f"run.workers={options.workers}", "run.report=false", "run.progress=false",
        *options.set,
    ]
    if both:
        overrides += [
            f"privacy.example.noise_multiplier={options.example_noise}",
            "privacy.example.epsilon=null",
        ]
    return compose(overrides)


def make_experiment(options: argparse.Namespace, config: DictConfig) -> BenchExperiment:
    """The bench's users, task and model in place of those that the settings name."""
    synth = bench_module(options.bench, "synth_users")
    models = bench_module(options.bench, "models")
    task_name = TASK[options.model]
    cohorts = [
        synth.cohort(options.seed, number, options.cohort, options.users)
        for number in range(config.rounds)
    ]
    prepared = np.concatenate(cohorts) if options.data == "cached" else None
    population = SyntheticUsers(synth, options.seed, options.users, task_name, prepared)
    return BenchExperiment(
        config=config,
        population=population,
        vocabulary=Numbered(synth.VOCAB_SIZE),
        task=make_bench_task(synth, population, task_name),
        training=experiments.local_training(config, options.users),
        first=our_form(options.model, models.make_model(options.model, options.seed)),
    )


@contextmanager
def in_place(options: argparse.Namespace, made: BenchExperiment, clock: Clock) -> Iterator[None]:
    """`simulate` with the bench's parts: experiment, cohorts, a clock, a timed evaluator."""
    synth = bench_module(options.bench, "synth_users")
    cohorts = BenchCohorts(synth, options.seed, options.cohort, options.users)
    with ExitStack() as stack:
        for where, name, part in (
            (training, "build_experiment", lambda text: made),
            (experiments, "build_experiment", lambda text: made),
            (setup, "sampler_of", lambda *others: cohorts),
            (training, "Bar", lambda progress: clock),
            (training, "Evaluator", TimedEvaluator),
        ):
            stack.enter_context(patch.object(where, name, part))
        if options.in_order:
            stack.enter_context(patch.object(batch_draws, "philox", rising_words))
        yield


def rising_words(key: tuple[int, int], counters: Any) -> NDArray[np.uint64]:
    """In place of random words: those that leave a device's examples in their own order."""
    number = np.asarray(counters[0])[:, None] * WORDS + np.arange(WORDS)
    return number.astype(np.uint64) << np.uint64(40)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One whole run and its figures."""
    began = time.perf_counter()
    total = options.warmup + options.rounds
    config = settings(options, total)
    made = make_experiment(options, config)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, in_place(options, made, clock):
        with redirect_stdout(StringIO()):
            simulate.simulate(config, Path(folder))
        weights = load_file(Path(folder) / "model.safetensors")
    return figures(options, clock, began) | {"test": tested(options, weights)}


def figures(options: argparse.Namespace, clock: Clock, began: float) -> dict[str, Any]:
    seconds = np.diff(clock.stamps)[options.warmup :]
    cpu = np.diff(clock.cpu)[options.warmup :]
    clients = options.cohort * options.rounds
    records = clock.records[1 + options.warmup :]
    return {
        "framework": "sottovoce",
        "model": options.model,
        "users": options.users,
        "privacy": options.privacy,
        "clients_per_second": clients / seconds.sum(),
        "median_clients_per_second": options.cohort / float(np.median(seconds)),
        "clients_per_cpu_second": clients / cpu.sum(),
        "iteration_seconds": seconds.tolist(),
        "setup_seconds": clock.stamps[0] - began,
        "first_iteration_seconds": clock.stamps[1] - clock.stamps[0],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trained_devices": sum(record["devices"] for record in records),
        "examples": sum(record["examples"] for record in records),
        "clipped_fraction": float(np.mean([record["clipped_fraction"] for record in records])),
    }


def tested(options: argparse.Namespace, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss and accuracy of the final weights in the bench's own model and by its own measure."""
    models = bench_module(options.bench, "models")
    synth = bench_module(options.bench, "synth_users")
    model = models.make_model(options.model, options.seed)
    load(model, {name: weights[our_name(name)] for name, _ in model.named_parameters()})
    test = synth.make_users(options.seed + 1, np.arange(100), TASK[options.model])
    found: dict[str, float] = models.evaluate(model, test.inputs, test.targets)
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--bench", type=Path, default=BENCH)
    found.add_argument("--model", choices=list(TASK), default="bag")
    found.add_argument("--users", type=int, default=10_000)
    found.add_argument("--cohort", type=int, default=200)
    found.add_argument("--rounds", type=int, default=20)
    found.add_argument("--warmup", type=int, default=2)
    found.add_argument("--local-batch", type=int, default=8)
    found.add_argument("--local-lr", type=float, default=0.1)
    found.add_argument("--clip", type=float, default=1.0)
    found.add_argument("--noise", type=float, default=0.01)
    found.add_argument("--example-noise", type=float, default=1.0)
    found.add_argument("--privacy", choices=["none", "example"], default="none")
    found.add_argument("--workers", type=int, default=1)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--data", choices=["cached", "fly"], default="cached")
    found.add_argument("--in-order", action="store_true", help="batches as the peer's")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return found
