"""The simulation benchmark does the peer's work: same users, same functions, same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCH = Path(os.environ.get("SOTTOVOCE_BENCH", ROOT.parent / "shared" / "bench"))

needs_bench = pytest.mark.skipif(
    not (BENCH / "synth_users.py").exists(),
    reason="no bench of the peer: name its folder in SOTTOVOCE_BENCH",
)
MODELS = ["bag", "lstm", "lm"]


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, found as when one of them is run."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import simulation_measure
    import simulation_models
    import simulation_ours
    import simulation_peer

    yield SimpleNamespace(
        models=simulation_models, ours=simulation_ours, measure=simulation_measure,
        peer=simulation_peer,
    )
    sys.path[:] = before


def bench(scripts: SimpleNamespace) -> tuple[Any, Any]:
    module = scripts.models.bench_module
    return module(BENCH, "synth_users"), module(BENCH, "models")


@needs_bench
@pytest.mark.parametrize("name", MODELS)
def test_our_forms_have_the_losses_and_gradients_of_the_benchs_models(
    scripts: SimpleNamespace, name: str
) -> None:
    synth, models = bench(scripts)
    kind = scripts.models.TASK[name]
    peer = models.make_model(name, 3)
    ours = scripts.models.our_form(name, peer)
    population = scripts.models.SyntheticUsers(synth, 0, 50, kind)
    task = scripts.models.make_bench_task(synth, population, kind)
    users = np.array([7, 3, 41])
    batch = task.collate(population.examples(users))
    data = synth.make_users(0, users, kind)
    theirs = peer.loss(torch.as_tensor(data.inputs), torch.as_tensor(data.targets))
    loss = task.losses(ours, batch).mean()
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    theirs.backward()
    loss.backward()
    found = dict(ours.named_parameters())
    assert {scripts.models.our_name(n) for n, _ in peer.named_parameters()} == found.keys()
    for key, parameter in peer.named_parameters():
        gradient = found[scripts.models.our_name(key)].grad
        assert torch.allclose(gradient, parameter.grad, atol=1e-6)


@needs_bench
@pytest.mark.parametrize("kind", ["intent", "lm"])
def test_users_have_the_benchs_examples_whether_kept_or_made_anew(
    scripts: SimpleNamespace, kind: str
) -> None:
    synth, _ = bench(scripts)
    users = np.array([5, 90, 5, 17])
    chosen = [np.array([2, 0]), np.array([1]), np.array([], dtype=np.int64), np.array([3])]
    kept = scripts.models.SyntheticUsers(synth, 1, 100, kind, users)
    made = scripts.models.SyntheticUsers(synth, 1, 100, kind)
    assert np.array_equal(kept.activity, synth.user_sizes(1, np.arange(100)))
    for indices in (None, chosen):
        found = [population.examples(users, indices) for population in (kept, made)]
        tokens, bounds = [], [0]
        for k, user in enumerate(users):
            inputs, targets = synth.make_user(1, user, kind)
            rows = inputs if kind == "intent" else np.hstack([inputs, targets[:, -1:]])
            rows = rows if indices is None else rows[indices[k]]
            tokens.append(rows.ravel())
            bounds.append(bounds[-1] + len(rows))
        for examples in found:
            assert np.array_equal(examples.tokens, np.concatenate(tokens))
            assert np.array_equal(examples.device_offsets, bounds)


@needs_bench
@pytest.mark.parametrize("privacy", ["none", "example"])
def test_a_run_trains_everyone_whom_the_bench_draws_even_twice(
    scripts: SimpleNamespace, privacy: str
) -> None:
    options = scripts.ours.parser().parse_args([
        "--bench", str(BENCH), "--users", "40", "--cohort", "20", "--rounds", "1",
        "--warmup", "1", "--privacy", privacy,
    ])
    synth, _ = bench(scripts)
    cohort = synth.cohort(0, 1, 20, 40)
    assert len(np.unique(cohort)) < 20
    figures = scripts.ours.run(options)
    assert figures["trained_devices"] == 20
    if privacy == "none":
        assert figures["examples"] == synth.user_sizes(0, cohort).sum()
    assert len(figures["iteration_seconds"]) == 1
    assert np.isfinite(figures["test"]["loss"])


def test_ratios_are_taken_pair_by_pair(scripts: SimpleNamespace) -> None:
    mine = [{"pace": 2.0}, {"pace": 9.0}, {"pace": 4.0}]
    other = [{"pace": 1.0}, {"pace": 3.0}, {"pace": 4.0}]
    found = scripts.measure.pair_ratios(mine, other, "pace")
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_process_is_measured_with_its_children(scripts: SimpleNamespace) -> None:
    child = "import time; held = bytearray(60 << 20); time.sleep(1)"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    text += "; print('{}')"
    found = scripts.measure.measured([sys.executable, "-c", text], dict(os.environ))
    assert found["process_seconds"] > 1
    if Path("/proc/self/task").exists():
        assert found["children_peak_mib"] > 60


def test_a_process_that_fails_is_quoted(scripts: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match="ended with 1:\n(.|\n)*ValueError: no users"):
        scripts.measure.measured(
            [sys.executable, "-c", "raise ValueError('no users')"], dict(os.environ)
        )


def test_a_peer_that_cannot_be_installed_is_named_with_the_remedy(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "pip\nERROR: no network\n")

    monkeypatch.setattr(scripts.peer.subprocess, "run", fails)
    with pytest.raises(SystemExit, match="ERROR: no network\n(.|\n)*--peer none"):
        scripts.peer.peer_python(tmp_path / "absent")
