"""The epsilon of a plan that rests on a participation schedule: correlated noise, no sampling."""

from __future__ import annotations

import math

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.calibration import calibrate_noise
from sottovoce.privacy.accounting.composition import LEAST_NOISE
from sottovoce.privacy.mechanisms.correlated import CorrelatedMechanism, zcdp_epsilon
from sottovoce.privacy.mechanisms.optimised import make_factorisation
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.server.account import AccountConfig, Facts
from sottovoce.server.account_plan import by_accountant, leading

MECHANISMS = ("independent", "tree", "banded", "bisr", "blt")
NOT_USED = (
    "sampling_rate", "solve", "sweep", "devices", "cohort_size", "levels", "preset", "values",
    "max_rate", "example_steps", "example_sampling_rate", "example_delta", "example_epsilon",
    "example_noise_multiplier",
)


def of_schedule(config: AccountConfig) -> Facts:
    """Facts of the plan: those of any, and `schedule`, with sensitivity, rho and zCDP's epsilon.

    `noise_multiplier` is that of the noise before it is correlated, over the clip norm, as
    published for DP-FTRL; `schedule["worth"]` that of the one release that the run amounts to.
    """
    _check(config)
    assert config.steps is not None and config.delta is not None
    try:
        schedule = Schedule(config.steps, config.min_separation or 1, config.max_participations)
        name = config.mechanism or "independent"
        name = "identity" if name == "independent" else name
        factorisation = make_factorisation(name, schedule, config.bands)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    noise = config.noise_multiplier
    if noise is None:
        assert config.target_epsilon is not None
        noise = factorisation.sensitivity(schedule) * calibrate_noise(
            config.target_epsilon, config.delta, 1.0, 1, sampling="none", relation="zero_out",
            accountant=config.accountant,
        )
    planned = CorrelatedMechanism(1.0, noise, factorisation, schedule)
    event = planned.event(1)
    found = by_accountant([event], config.delta, "device", "release", None)
    rho = 0.5 * planned.worth**-2 if planned.worth > LEAST_NOISE else math.inf
    return {
        "epsilon": leading(found, config.accountant),
        "delta": config.delta,
        "noise_multiplier": noise,
        "sampling_rate": 1.0,
        "steps": schedule.rounds,
        "accountant": config.accountant,
        "unit": event.unit,
        "observer": event.observer,
        "relation": event.relation,
        "by_accountant": found,
        "schedule": {
            "mechanism": factorisation.name,
            "min_separation": schedule.min_separation,
            "max_participations": schedule.participations,
            "squared_sensitivity": planned.sensitivity**2,
            "worth": planned.worth,
            "rho": rho,
            "epsilon_by_zcdp": rho if math.isinf(rho) else zcdp_epsilon(rho, config.delta),
            "mean_error": noise * factorisation.mean_error(schedule) / planned.sensitivity,
        },
    }


def _check(config: AccountConfig) -> None:
    for name in NOT_USED:
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(
                f"{name}={value} has no meaning in a plan with min_separation or mechanism, which "
                "rests on a schedule: drop one"
            )
    if config.mechanism not in (None, *MECHANISMS):
        raise ConfigError(
            f"mechanism={config.mechanism} does not exist: choose {' or '.join(MECHANISMS)}"
        )
    if config.observer not in (None, "release"):
        raise ConfigError(f"observer={config.observer} needs run=RUN: a plan is about release")
    missing = [name for name in ("steps", "delta") if getattr(config, name) is None]
    given = [config.noise_multiplier, config.target_epsilon]
    if given == [None, None]:
        missing.insert(0, "noise_multiplier (or target_epsilon)")
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: give them, or run=RUN for a finished run")
    if None not in given:
        raise ConfigError("noise_multiplier and target_epsilon contradict each other: give one")
    if config.unit not in (None, "device"):
        raise ConfigError(f"unit={config.unit} has no schedule: it is devices that rest")
