"""Bounds on the privacy loss of a composition: PLD, exact Gaussian, RDP and PRV figures.

Every function takes a `Composition` that some noise protects and returns an upper bound on epsilon;
`inf` where its method has none. The libraries are imported on first use: they take a second.

Facts about dp-accounting 0.6 that this file guards against, each with a test:

- A composition is computed by FFT, and its rounding error grows with the number of steps: 10^5
  steps at delta = 1e-10 come out 0.1 % *below* the exact epsilon. `_rounding` takes that out of
  delta.
- A grid of 1e-4 needs 10^6 cells and seconds where noise is small: there the grid is coarser, which
  only raises epsilon.
- Accumulated tiny Renyi divergences may round to a negative number, read as epsilon = 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr

from sottovoce.privacy.accounting.composition import Composition, Step
from sottovoce.privacy.accounting.loss_grids import epsilon_at, gaussian_losses

FINEST = 1e-4
"""Grid of the privacy loss in reported figures (dp-accounting's value_discretization_interval)."""

_GRIDS = [m * 10.0**e for e in range(-4, 0) for m in (1, 2, 5)]
_MOST_CELLS = 400_000
_LARGEST = 500.0
"""Beyond this epsilon no PLD is computed: rougher bounds stand, and none protects anybody."""
_LEAST_DELTA = 1e-12
_FEW_ORDERS = [*range(2, 33), 40, 48, 63, 128]


def pld_epsilon(steps: Composition, delta: float, tolerance: float = 0.0) -> float:
    """Epsilon by privacy loss distributions; exact where nothing is sampled.

    `tolerance`: by how much of itself the figure may be too large, for speed; 0: the finest grid.
    """
    if any(step.kind == "fixed_size" for step, _ in steps):
        amplified = rdp_epsilon(steps, delta)
        return min(amplified, pld_epsilon(_without_amplification(steps), delta, tolerance))
    rough = _gaussian_epsilon(_without_sampling(steps), delta)
    if all(step.kind == "none" for step, _ in steps):
        return rough
    rough = min(rough, _pure_epsilon(steps), rdp_epsilon(steps, delta, quick=True))
    guess = min(rough, rdp_epsilon(_as_add_remove(steps), delta, quick=True))
    finest = _affordable_grid(steps, guess)
    if guess > _LARGEST or delta < _LEAST_DELTA or finest is None:
        return min(rough, rdp_epsilon(steps, delta))
    grid = max(finest, _sufficient_grid(steps, delta, guess / 3, tolerance))
    found = _grid_epsilon(steps, delta, grid)
    sufficient = max(finest, _sufficient_grid(steps, delta, found, tolerance))
    if sufficient < grid:
        found = _grid_epsilon(steps, delta, sufficient)
    return min(found, rough)


def rdp_epsilon(steps: Composition, delta: float, *, quick: bool = False) -> float:
    """Epsilon by Renyi DP. `quick`: from few orders, a little larger and several times faster."""
    from dp_accounting import rdp

    total = sum((count * _renyi(step, quick) for step, count in steps), np.zeros(1))
    with _silent():
        return float(rdp.compute_epsilon(_orders(quick), total, delta)[0])


def prv_epsilon(steps: Composition, delta: float) -> float:
    """Epsilon by Opacus' PRV accountant: a second opinion, with about 0.01 of slack.

    `inf` where it does not apply or is known to fail: other than Poisson sampling under add/remove,
    delta below 1e-9 (its bound falls below the truth), large epsilon, very many steps (slow); or
    Opacus is not installed.
    """
    plain = all(step.kind in ("poisson", "none") for step, _ in steps)
    few = sum(count for _, count in steps) <= 100_000
    if not (plain and few and delta >= 1e-9 and rdp_epsilon(steps, delta, quick=True) < 50):
        return math.inf
    try:
        from opacus.accountants import PRVAccountant
    except ImportError:
        return math.inf
    accountant = PRVAccountant()
    accountant.history = [(step.noise, step.rate, count) for step, count in steps]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(delta))
    except (ArithmeticError, ValueError, RuntimeError):
        return math.inf


# -- privacy loss distributions --------------------------------------------------------------------


def _gaussian_epsilon(noise: float, delta: float) -> float:
    """Exact epsilon of one Gaussian release: Balle and Wang 2018, arXiv:1805.06530, theorem 8.

    As `dp_accounting.get_epsilon_gaussian`, thirty times as fast: budgets ask after every round.
    """
    if noise == 0:
        return math.inf
    if _gaussian_log_delta(noise, 0.0) <= math.log(delta):
        return 0.0
    most = 1 / (2 * noise**2) + math.sqrt(2 * math.log(1 / delta)) / noise + 1e-6  # of any Gaussian
    with np.errstate(all="ignore"):
        found = float(brentq(
            lambda e: _gaussian_log_delta(noise, e) - math.log(delta), 0.0, most, xtol=1e-14
        ))
    return found * (1 + 1e-11) + 1e-13


def _gaussian_log_delta(noise: float, epsilon: float) -> float:
    """Logarithm of the delta of one Gaussian release at `epsilon`."""
    near = float(log_ndtr(1 / (2 * noise) - epsilon * noise))
    far = float(log_ndtr(-1 / (2 * noise) - epsilon * noise))
    gap = epsilon + far - near
    return near + math.log(-math.expm1(gap)) if gap < 0 else -math.inf


def _without_sampling(steps: Composition) -> float:
    """Noise of the one Gaussian release that all of `steps` would be worth, were none sampled."""
    if any(step.kind == "report" for step, _ in steps):
        return 0.0
    noises = ((step.noise / (1 + (step.kind == "poisson_replace")), n) for step, n in steps)
    return float(sum(count / noise**2 for noise, count in noises) ** -0.5)


def _pure_epsilon(steps: Composition) -> float:
    """Epsilon at delta = 0: finite where there is nothing but randomised reports."""
    pure = all(step.kind == "report" for step, _ in steps)
    return math.fsum(count / step.noise for step, count in steps) if pure else math.inf


def _as_add_remove(steps: Composition) -> Composition:
    """Steps of about the same cost for which RDP has a figure; good enough to choose a grid by."""
    return tuple(
        (Step("poisson", s.noise / 2, s.rate) if s.kind == "poisson_replace" else s, count)
        for s, count in steps
    )


def _without_amplification(steps: Composition) -> Composition:
    """The same releases, as if everyone was drawn each time that a fixed number was."""
    return tuple(
        (Step("none", step.noise, 1.0) if step.kind == "fixed_size" else step, count)
        for step, count in steps
    )


def _grid_epsilon(steps: Composition, delta: float, grid: float) -> float:
    left = delta - _rounding(steps)
    if left <= 0:
        return math.inf
    try:
        total, *others = [_composed(step, count, grid) for step, count in steps]
        for other in others:
            total = total.compose(other)
        return epsilon_at(total, left)
    except (ValueError, ArithmeticError):  # the library gives up in some numerical corners
        return math.inf


def _rounding(steps: Composition) -> float:
    """Part of delta that covers the FFT's rounding, which powers amplify: measured with margin."""
    return 1e-14 + 2e-16 * sum(count for _, count in steps)


@lru_cache(maxsize=4)
def _composed(step: Step, count: int, grid: float) -> Any:
    if step.kind == "none":
        return _single(Step("none", step.noise / math.sqrt(count), 1.0), grid)
    return _single(step, grid).self_compose(count)


@lru_cache(maxsize=32)
def _single(step: Step, grid: float) -> Any:
    """The loss distribution of one step. `accountants` explains the kinds."""
    from dp_accounting.pld import common
    from dp_accounting.pld import privacy_loss_distribution as pld

    if step.kind == "report":
        pure = common.DifferentialPrivacyParameters(1 / step.noise, 0.0)
        return pld.from_privacy_parameters(pure, value_discretization_interval=grid)
    sampled = step.kind in ("poisson", "poisson_replace")
    relation = "replace" if step.kind == "poisson_replace" else "add_remove"
    distribution = gaussian_losses(step.noise, step.rate if sampled else 1.0, grid, relation)
    if step.kind != "revealed":
        return distribution
    return distribution.compute_mixture(pld.identity(grid), step.rate)


def _affordable_grid(steps: Composition, rough: float) -> float | None:
    """The finest grid with a bearable number of cells, None where no grid has one."""
    span = max(
        1 / step.noise if step.kind == "report" else 13.5 / step.noise + 0.5 / step.noise**2
        for step, _ in steps
    )
    least = max(span / _MOST_CELLS, rough / (4 * _MOST_CELLS))
    return next((grid for grid in _GRIDS if grid >= least), None)


def _sufficient_grid(
    steps: Composition, delta: float, epsilon: float, tolerance: float
) -> float:
    """The coarsest grid that raises `epsilon` by about `tolerance` of itself at most.

    A grid of width h adds at most about h^2/4 to each step's variance of the loss; epsilon goes
    with the root of the total variance, times sqrt(2 ln 1/delta).
    """
    sampled = sum(count for step, count in steps if step.kind not in ("none", "report"))
    variance = epsilon**2 / (2 * math.log(1 / delta))
    width = math.sqrt(16 * tolerance * variance / max(sampled, 1))
    return max((grid for grid in _GRIDS if grid <= min(width, 1e-2)), default=FINEST)


# -- Renyi DP --------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _orders(quick: bool) -> NDArray[np.float64]:
    from dp_accounting.rdp import rdp_privacy_accountant

    orders = _FEW_ORDERS if quick else rdp_privacy_accountant.DEFAULT_RDP_ORDERS
    return np.array(orders, dtype=np.float64)


@lru_cache(maxsize=512)
def _renyi(step: Step, quick: bool) -> NDArray[np.float64]:
    """Renyi divergence of one step at each order, with a margin for its rounding."""
    orders = _orders(quick)
    if step.kind == "poisson_replace":
        return np.full(len(orders), np.inf)  # no bound is known
    if step.kind == "none":
        return orders / (2 * step.noise**2)
    if step.kind == "report":
        return _report_renyi(1 / step.noise, orders)
    if step.kind == "revealed":
        exponent = orders * (orders - 1) / (2 * step.noise**2)
        moment = np.logaddexp(math.log1p(-step.rate), math.log(step.rate) + exponent)
        found = moment / (orders - 1)
    else:
        found = _library_renyi(step, orders)
    return np.maximum(found, 0.0) + 1e-15


def _report_renyi(epsilon: float, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the coin that lies with probability 1 / (1 + e^epsilon), told one way or the other."""
    truth, lie = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    moment = np.logaddexp(orders * truth + (1 - orders) * lie, orders * lie + (1 - orders) * truth)
    return np.minimum(np.maximum(moment / (orders - 1), 0.0), epsilon) + 1e-15


def _library_renyi(step: Step, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    import dp_accounting as dp

    gaussian = dp.GaussianDpEvent(step.noise)
    if step.kind == "poisson":
        accountant = dp.rdp.RdpAccountant(orders)
        event: Any = dp.PoissonSampledDpEvent(step.rate, gaussian)
    else:
        accountant = dp.rdp.RdpAccountant(orders, dp.NeighboringRelation.REPLACE_ONE)
        of = 10**9
        event = dp.SampledWithoutReplacementDpEvent(of, math.ceil(step.rate * of), gaussian)
    with _silent():
        return np.asarray(accountant.compose(event).rdp, dtype=np.float64)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the library from warning of orders that it leaves out by itself."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
