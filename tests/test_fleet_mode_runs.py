"""Runs in every mode: what the ledger says of them is never less than what devices went through."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import SMALL, metrics, run, summary

from sottovoce.client.batches import BatchPlan
from sottovoce.client.errors import ConfigError
from sottovoce.client.fleet import ExampleClipping
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.accounting.ledger import Ledger
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.server.account import account
from sottovoce.server.config import validate
from sottovoce.server.settings import compose
from sottovoce.server.setup import local_noise_bound, make_setup, settings_text
from sottovoce.simulations.experiment import build_experiment, example_noise

NOISE = 2.0
SETTINGS = ("seed=1", f"privacy.example.noise_multiplier={NOISE:g}", "strategy.max_rate=0.5")
MODES = {
    "clipping=micro_batch": [NOISE / 2],
    "threshold=automatic": [NOISE],
    "threshold=quantile": [NOISE],
    "threshold=layer_wise": [NOISE],
    "noise=decay": [NOISE * 0.99**2, NOISE * 0.99, NOISE],
    "clipping=micro_batch privacy.example.noise=decay privacy.example.threshold=quantile": [
        NOISE / 2 * 0.99**2, NOISE / 2 * 0.99, NOISE / 2,
    ],
}


def example_events(folder: Path) -> list[GaussianEvent]:
    events = Ledger.load(folder / "ledger.json").events
    return [e for e in events if isinstance(e, GaussianEvent) and e.unit == "example"]


@pytest.mark.parametrize(
    ("privacy", "mode"),
    [("example", mode) for mode in MODES]
    + [("both", "noise=decay"), ("both", "threshold=quantile")],
)
def test_a_run_in_any_mode_books_the_noise_that_it_had(
    privacy: str, mode: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    central = ("privacy.device.epsilon=null", "privacy.device.noise_multiplier=1.5")
    more = central if privacy == "both" else ()
    settings = [f"privacy.example.{mode.split()[0]}", *mode.split()[1:]]
    assert run(folder, f"privacy={privacy}", *more, *SETTINGS, *settings) == 0
    events = example_events(folder)
    counts: dict[int, int] = {}
    for event in events:
        for level, _, _ in event.by_level or ():
            expected = MODES[mode][min(counts.get(level, 0), len(MODES[mode]) - 1)]
            assert event.noise_multiplier == pytest.approx(expected, rel=1e-12)
            counts[level] = counts.get(level, 0) + 1
    assert max(counts.values()) > 1
    assert all(record["update_norm"] > 0 for record in metrics(folder)[1:])
    claim = summary(folder)["epsilon"]["example"]
    facts = account({"run": str(folder), "unit": "example", "observer": "server"})
    assert facts["epsilon"] == pytest.approx(claim["epsilon"], rel=1e-9)


@given(
    st.integers(1, 12).flatmap(
        lambda rounds: st.tuples(
            st.just(rounds), st.lists(st.sets(st.integers(1, rounds)), min_size=1, max_size=5)
        )
    ),
    st.floats(0.5, 0.99),
)
def test_the_ledger_of_a_decay_covers_every_device(
    plan: tuple[int, list[set[int]]], decay: float
) -> None:
    """After each round, every device's own noises find as many of the ledger's, none larger."""
    rounds, devices = plan
    example = ExampleClipping(1.0, 1.0, noise_decay=decay, rounds=rounds)
    ledger: list[float] = []
    for now in range(1, rounds + 1):
        histories = [[example.at(r).noise_multiplier for r in sorted(d) if r <= now]
                     for d in devices]
        while len(ledger) < max(map(len, histories)):
            ledger.append(example.booked(len(ledger) + 1))
        for history in histories:
            for own, booked in zip(sorted(history), sorted(ledger), strict=False):
                assert booked <= own * (1 + 1e-12)


def test_noise_for_a_target_epsilon_is_enough_for_every_mode() -> None:
    """In the ledger that a run may at most end with: all participations, none without its event."""
    plan = BatchPlan(8, local_epochs=1, max_examples=16, poisson=True)
    for mode in ("clipping=micro_batch", "noise=decay"):
        config = compose([
            *SMALL, "privacy=example", "privacy.example.epsilon=3", "rounds=30",
            "privacy.example.noise_multiplier=null", "privacy.example.max_participations=6",
            "privacy.example.noise_decay=0.9", f"privacy.example.{mode}",
        ])
        noise = example_noise(config, plan, 1e-5)
        decay = 0.9 if mode == "noise=decay" else 1.0
        half = 2.0 if "micro" in mode else 1.0
        for most in (1, 6):
            ledger = Ledger()
            for k in range(most):
                for level in range(5):
                    ledger.append(GaussianEvent(
                        noise_multiplier=noise * decay ** (29 - k) / half, sampling="poisson",
                        by_level=((level, plan.rate(level), plan.steps(level, 1 << level)),),
                        unit="example", observer="server",
                    ))
            spent = epsilon(ledger, 1e-5, unit="example", observer="server")
            assert spent <= 3 * (1 + 1e-9)
        assert spent > 3 * 0.99


def test_the_bound_on_devices_noise_follows_the_decay() -> None:
    config = compose([
        *SMALL, "privacy=both", "privacy.device.epsilon=null",
        "privacy.device.noise_multiplier=1.5", "privacy.example.noise_multiplier=2", "seed=1",
        "privacy.example.noise=decay", "privacy.example.noise_decay=0.5",
    ])
    text = settings_text(config)
    experiment = build_experiment(text)
    setup = make_setup(experiment, NoiseSource.from_seed(1), None, text)
    bounds = []
    for number in (1, 2, 3):
        mechanism = setup.strategy._mechanism(number)
        own = local_noise_bound(experiment.training.at(number), setup.sampler)
        assert mechanism.local_variance_bound == pytest.approx(own, rel=1e-9)
        assert mechanism.noise_multiplier == 1.5
        bounds.append(own)
    assert bounds[1] == pytest.approx(bounds[0] / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("clipping=rows", "per_example or micro_batch"),
        ("threshold=median", "fixed or automatic or quantile or layer_wise"),
        ("noise=falling", "constant or decay"),
        ("noise_decay=1.1", "above 0 and at most 1"),
        ("micro_batch_size=0", "at least 1"),
        ("target_quantile=1", "between 0 and 1"),
        ("count_noise=3", "only used by privacy.example.threshold=quantile"),
        ("count_noise=0.5 privacy.example.threshold=quantile", "must be above half of"),
        ("enabled=false privacy.example.noise_multiplier=null privacy.example.noise=decay",
         "does nothing while"),
    ],
)
def test_impossible_modes_are_refused_in_one_line(settings: str, message: str) -> None:
    given_ = [f"privacy.example.{settings.split()[0]}", *settings.split()[1:]]
    config = compose([*SMALL, "privacy=both", "privacy.example.noise_multiplier=2", *given_])
    with pytest.raises(ConfigError, match=message) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_a_moving_threshold_beside_device_privacy_warns() -> None:
    config = compose([*SMALL, "privacy=both", "seed=1", "privacy.example.threshold=quantile"])
    text = settings_text(config)
    setup = make_setup(build_experiment(text), NoiseSource.from_seed(1), None, text)
    assert any("privacy.example.threshold=quantile clips" in line for line in setup.warnings)
