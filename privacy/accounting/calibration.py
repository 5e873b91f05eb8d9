"""How much noise a target epsilon takes: the smallest noise multiplier, rounded up.

Epsilon falls as noise grows, so this is a root; RDP brackets it in milliseconds, PLD on a coarse
grid finds it, and the reported PLD has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import NEARLY, check_delta, composition_epsilon, worst
from sottovoce.privacy.accounting.composition import NON_PRIVATE, Composition, Place, Tally
from sottovoce.privacy.accounting.events import Event, GaussianEvent, LevelEntry, Relation, Sampling
from sottovoce.privacy.accounting.losses import rdp_epsilon

MOST_NOISE = 1e4
_LEAST = 0.01
_DIGITS = 4
_CLOSE = 5e-4


def calibrate_noise(
    target_epsilon: float,
    delta: float,
    sampling_rate: float | None = None,
    steps: int | None = None,
    *,
    mixture: Sequence[tuple[float, int]] | None = None,
    by_level: Sequence[LevelEntry] | None = None,
    shares: Sequence[float] | None = None,
    sampling: Sampling = "poisson",
    relation: Relation = "add_remove",
    spent: Sequence[Event] = (),
    accountant: str = "pld",
) -> float:
    """Smallest noise multiplier, to 4 decimals, that keeps a plan within `target_epsilon`.

    The plan is one of: `steps` releases at `sampling_rate`; a `mixture` of (rate, count), all of
    them for the same unit; or `by_level`, (level, rate, count), of which the worst level counts.
    `shares`: what each entry has for its noise multiplier, over the one that is sought (a schedule,
    a sensitivity of its own); 1 by default. `spent`: further events of the same unit and observer
    `release`, with their own noise (an activity histogram), that the target must cover too.

    *Guarantee*: the plan's epsilon, as `accountant` reports it, is at most `target_epsilon`; it is
    within about 0.1 % of it unless even a noise multiplier of 0.01 would do.
    *Assumes*: what `sottovoce.privacy.accounting.accountants` assumes.

    Raises ConfigError where no noise multiplier up to 10^4 is enough, or a setting is impossible.
    """
    check_delta(delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"target epsilon={target_epsilon} must be a finite number above 0")
    entries = _entries(sampling_rate, steps, mixture, by_level)
    shares = shares or [1.0] * len(entries)
    if not any(rate > 0 and count > 0 for _, rate, count in entries):
        raise ConfigError("nothing is released at these rates and counts: there is no noise to set")

    unit = spent[0].unit if spent else "device"

    def plan(noise: float) -> dict[Place, Composition]:
        tally = Tally(spent)
        for (level, rate, count), share in zip(entries, shares, strict=True):
            tally.add(
                GaussianEvent(
                    noise_multiplier=noise * share,
                    sampling=sampling,
                    relation=relation,
                    by_level=((level, rate, count),),
                    unit=unit,
                    purpose="calibration",
                )
            )
        return tally.compositions(unit, "release")

    def epsilon(noise: float, tolerance: float) -> float:
        return worst(plan(noise), delta, accountant, tolerance)[0]

    def rough(noise: float) -> float:
        return max(rdp_epsilon(s, delta, quick=True) if s else 0.0 for s in plan(noise).values())

    _check_possible(plan(MOST_NOISE), target_epsilon, delta, accountant)
    return _smallest(epsilon, rough, target_epsilon)


def _entries(
    sampling_rate: float | None,
    steps: int | None,
    mixture: Sequence[tuple[float, int]] | None,
    by_level: Sequence[LevelEntry] | None,
) -> list[LevelEntry]:
    """The plan as (level, rate, count); a level may come more than once."""
    plain = sampling_rate is not None and steps is not None
    if plain + (mixture is not None) + (by_level is not None) != 1:
        raise ConfigError("give one of: sampling_rate with steps, mixture, by_level")
    if by_level is not None:
        entries = [(int(level), float(rate), int(count)) for level, rate, count in by_level]
    elif mixture is not None:
        entries = [(0, float(rate), int(count)) for rate, count in mixture]
    else:
        assert sampling_rate is not None and steps is not None
        entries = [(0, float(sampling_rate), int(steps))]
    for _, rate, count in entries:
        if not (0 <= rate <= 1 and count >= 0):
            raise ConfigError(f"rate={rate} must be in [0, 1] and count={count} must be >= 0")
    return entries


def _check_possible(
    quietest: dict[Place, Composition], target: float, delta: float, accountant: str
) -> None:
    if NON_PRIVATE in quietest.values():
        raise ConfigError("something was released without noise: no further noise gives an epsilon")
    least = max(composition_epsilon(steps, delta, accountant) for steps in quietest.values())
    if least > target:
        raise ConfigError(
            f"epsilon={target:g} at delta={delta:g} cannot be reached: even noise_multiplier="
            f"{MOST_NOISE:g} gives {least:.3g}; allow a larger epsilon or fewer steps"
        )


def _smallest(
    epsilon: Callable[[float, float], float], rough: Callable[[float], float], target: float
) -> float:
    """`epsilon` takes noise and tolerance; `rough` is a quick upper bound on it."""
    above = _bisected(rough, target)
    noise, slope = _root(lambda at: epsilon(at, NEARLY), target, above)
    noise = _rounded_up(noise)
    reached = epsilon(noise, 0.0)
    while reached > target:  # decimals of a grid's rounding
        noise = _rounded_up(noise * 1.0005)
        reached = epsilon(noise, 0.0)
    if reached < target * (1 - _CLOSE) and noise > _LEAST:
        closer = _rounded_up(noise * (reached / target * (1 + _CLOSE / 4)) ** (1 / slope))
        if closer < noise and epsilon(closer, 0.0) <= target:
            return closer
    return noise


def _bisected(epsilon: Callable[[float], float], target: float) -> float:
    """A noise multiplier just large enough for the bound `epsilon` to be below `target`."""
    low, high = _LEAST, MOST_NOISE
    if epsilon(high) > target:
        return high
    while high > low * 1.02:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(middle) > target else (low, middle)
    return high


def _root(
    epsilon: Callable[[float], float], target: float, above: float
) -> tuple[float, float]:
    """Noise at which `epsilon` is just below `target`, and how steeply it falls there.

    `above`: noise at which it is certainly below. The Illinois rule in log noise and log epsilon,
    where epsilon is almost a straight line; the slope is that of log epsilon, positive.
    """
    high, at_high = above, _log_ratio(epsilon(above), target)
    low, at_low = high, at_high
    slope = 1.0
    while at_low <= 0:
        if low <= _LEAST:
            return _LEAST, slope
        high, at_high = low, at_low
        low = max(_LEAST, high * max(0.5, min(0.97, math.exp(at_high))))
        at_low = _log_ratio(epsilon(low), target)
    weights = [at_low, at_high]
    kept = None
    for _ in range(30):
        slope = max((at_low - at_high) / math.log(high / low), 0.1)
        if at_high > -_CLOSE / 5 or high - low < 0.1**_DIGITS:
            break
        share = weights[0] / (weights[0] - weights[1])
        middle = low * (high / low) ** min(max(share, 0.02), 0.98)
        value = _log_ratio(epsilon(middle), target)
        side = 0 if value > 0 else 1
        if side == 0:
            low, at_low = middle, value
        else:
            high, at_high = middle, value
        weights[side] = value
        if side == kept:
            weights[1 - side] /= 2
        kept = side
    return high, slope


def _log_ratio(epsilon: float, target: float) -> float:
    """log(epsilon / target), kept finite."""
    return math.log(min(max(epsilon / target, 1e-9), 1e9))


def _rounded_up(noise: float) -> float:
    return float(math.ceil(noise * 10**_DIGITS - 1e-9) / 10**_DIGITS)
