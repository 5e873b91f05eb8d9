"""Laws of correlated noise: sensitivity by brute force, streams by dense algebra, known figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sottovoce.client.errors import ConfigError
from sottovoce.privacy.accounting.accountants import epsilon
from sottovoce.privacy.accounting.calibration import calibrate_noise
from sottovoce.privacy.accounting.events import GaussianEvent
from sottovoce.privacy.mechanisms import series, tree
from sottovoce.privacy.mechanisms.correlated import zcdp_epsilon
from sottovoce.privacy.mechanisms.factorisation import (
    Banded,
    Buffered,
    Factorisation,
    InverseBanded,
    from_json,
)
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.optimised import NAMES, bisr, blt, make_factorisation
from sottovoce.privacy.mechanisms.separation import Schedule
from sottovoce.server.account import account

SOURCE = NoiseSource.from_seed(3)


def of_round(number: int) -> np.random.Generator:
    return SOURCE.generator("test noise", number)


def every_kind(schedule: Schedule) -> list[Factorisation]:
    return [make_factorisation(name, schedule) for name in NAMES]


@st.composite
def schedules(draw: st.DrawFn, most_rounds: int = 11) -> Schedule:
    rounds = draw(st.integers(1, most_rounds))
    return Schedule(rounds, draw(st.integers(1, rounds)), draw(st.integers(1, 5)))


# -- schedules -------------------------------------------------------------------------------------


@given(schedules())
def test_schedules_list_all_sets_of_rounds_that_they_allow(schedule: Schedule) -> None:
    listed = list(schedule.all_allowed())
    assert len(set(listed)) == len(listed)
    assert max(map(len, listed)) == schedule.participations
    for taken in listed:
        assert all(b - a >= schedule.min_separation for a, b in zip(taken, taken[1:], strict=False))
    if schedule.min_separation == 1 and schedule.participations == schedule.rounds:
        assert len(listed) == 2**schedule.rounds


@pytest.mark.parametrize(
    ("rounds", "apart", "most", "words"),
    [(0, 1, 1, "rounds=0"), (5, 0, 1, "min_separation=0"), (5, 6, 1, "more than rounds=5"),
     (5, 1, 0, "max_participations=0"), (5, 1.5, 1, "whole number")],
)  # fmt: skip
def test_impossible_schedules_are_refused(rounds: int, apart: int, most: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(rounds, apart, most)


# -- sensitivity -----------------------------------------------------------------------------------


def brute_force(matrix: np.ndarray, schedule: Schedule) -> float:
    """Largest |C u| over schedules, all contributions being the same unit vector."""
    return max(
        float(np.linalg.norm(matrix[:, list(taken)].sum(axis=1)))
        for taken in schedule.all_allowed()
    )


@settings(max_examples=40)
@given(schedules(), st.sampled_from(NAMES))
def test_sensitivity_is_that_of_the_worst_schedule(schedule: Schedule, name: str) -> None:
    one = make_factorisation(name, schedule)
    matrix = one.strategy_matrix()
    assert (matrix >= 0).all(), "one direction for all contributions is the worst"
    truth = brute_force(matrix, schedule)
    assert truth * (1 - 1e-9) <= one.sensitivity(schedule) <= truth * (1 + 1e-9)


@settings(max_examples=60)
@given(
    schedules(9),
    st.lists(st.floats(-1, 1), min_size=1, max_size=9),
    st.integers(0, 2**31),
)
def test_no_contributions_in_any_directions_pass_the_sensitivity(
    schedule: Schedule, coefficients: list[float], seed: int
) -> None:
    """Any Toeplitz C, signs and growth included; vectors of norm at most 1 in three dimensions."""
    column = [1.0, *coefficients]
    bound = series.sensitivity(column, schedule)
    matrix = series.toeplitz(column, schedule.rounds)
    generator = np.random.default_rng(seed)
    for taken in schedule.all_allowed():
        vectors = generator.standard_normal((len(taken), 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        signs = np.sign(generator.standard_normal(len(taken)))[:, None] * [[1.0, 0, 0]]
        for contributions in (vectors, signs):
            moved = matrix[:, list(taken)] @ contributions
            assert np.linalg.norm(moved) <= bound * (1 + 1e-9)


@settings(max_examples=40)
@given(st.integers(2, 60), st.data())
def test_sensitivity_grows_with_participations_and_falls_with_separation(
    rounds: int, data: st.DataObject
) -> None:
    apart = data.draw(st.integers(1, rounds - 1))
    most = data.draw(st.integers(1, 8))
    tight = Schedule(rounds, apart, most)
    looser = [Schedule(rounds, apart, most + 1), Schedule(rounds, max(1, apart - 1), most)]
    for name in ("identity", "tree", "bisr", "blt"):
        one = make_factorisation(name, tight)
        for other in looser:
            assert one.sensitivity(tight) <= one.sensitivity(other) * (1 + 1e-12)
    assert make_factorisation("identity", tight).sensitivity(tight) == pytest.approx(
        math.sqrt(tight.participations)
    )


@pytest.mark.parametrize("rounds", [1, 2, 7, 12, 16, 17])
def test_the_tree_is_searched_exactly_and_bounded_from_above(rounds: int) -> None:
    matrix = tree.strategy_matrix(rounds)
    for apart in range(1, rounds + 1):
        for most in (1, 2, 3, 6):
            schedule = Schedule(rounds, apart, most)
            truth = round(brute_force(matrix, schedule) ** 2)
            assert max(tree.node_counts(rounds, t) for t in schedule.all_allowed()) == truth
            assert tree._worst(rounds, apart, schedule.participations) == truth
            block = 1 << (apart.bit_length() - 1)
            rough = tree._free(rounds, block, schedule.participations).max()
            assert rough >= truth
            assert apart != block or rough == truth


def test_banded_participations_are_orthogonal() -> None:
    schedule = Schedule(200, 20, 4)
    one = make_factorisation("banded", schedule, 20)
    assert isinstance(one, Banded)
    norm = math.sqrt(sum(c * c for c in one.numbers["bands"]))
    assert one.sensitivity(schedule) == pytest.approx(2 * norm)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [Schedule(9, 2, 3), Schedule(12, 4), Schedule(8)])
def test_the_noise_that_is_streamed_hides_every_schedule_as_promised(
    name: str, schedule: Schedule
) -> None:
    """From the covariance of the streamed rows alone: u^T covariance^-1 u is the squared mu of
    Gaussian DP for a change u of the sums, whatever C is said to be."""
    one = make_factorisation(name, schedule)
    rows = noise_matrix(one)
    precision = np.linalg.inv(rows @ rows.T)
    worst = 0.0
    for taken in schedule.all_allowed():
        for signs in range(2 ** max(len(taken) - 1, 0)):
            change = np.zeros(schedule.rounds)
            change[list(taken)] = [1 - 2 * (signs >> at & 1) for at in range(len(taken))]
            worst = max(worst, float(change @ precision @ change))
    promised = one.sensitivity(schedule) ** 2
    assert worst <= promised * (1 + 1e-4)
    assert worst >= promised * (1 - 1e-4) or name == "tree"


# -- published figures -----------------------------------------------------------------------------


def test_the_spanish_keyboard_of_2022_has_its_published_figures() -> None:
    """Tree, sigma 7, 2,000 rounds, 313 apart, at most 6: Xu et al. 2023, arXiv:2305.18465."""
    schedule = Schedule(2000, 313, 6)
    squared = tree.squared_sensitivity(schedule)
    assert squared == 79
    rho = squared / (2 * 7.0**2)
    assert rho == pytest.approx(0.806, abs=5e-4)
    assert zcdp_epsilon(rho, 1e-10) == pytest.approx(8.90, abs=5e-3)


@pytest.mark.parametrize(("rho", "published"), [(0.1507, 3.42), (0.01434, 0.994)])
def test_zcdp_of_a_gaussian_gives_the_published_exact_epsilon(rho: float, published: float) -> None:
    event = GaussianEvent(noise_multiplier=1 / math.sqrt(2 * rho), relation="zero_out")
    assert epsilon(event, 1e-10) == pytest.approx(published, rel=1.5e-3)
    assert epsilon(event, 1e-10) < zcdp_epsilon(rho, 1e-10)


def test_the_command_line_gives_the_published_figures() -> None:
    plan = {"mechanism": "tree", "noise_multiplier": 7.0, "steps": 2000, "min_separation": 313,
            "max_participations": 6, "delta": 1e-10}
    found = account(plan)
    assert found["schedule"]["squared_sensitivity"] == pytest.approx(79)
    assert found["schedule"]["rho"] == pytest.approx(0.806, rel=1e-3)
    assert found["schedule"]["epsilon_by_zcdp"] == pytest.approx(8.90, rel=1e-3)
    assert found["epsilon"] == pytest.approx(8.526, abs=1e-3) and found["relation"] == "zero_out"
    for target in (8.0, 1.0):
        wanted = {k: v for k, v in plan.items() if k != "noise_multiplier"}
        reached = account(wanted | {"target_epsilon": target})["epsilon"]
        assert target * (1 - 1e-3) < reached <= target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanism": "wave"}, "mechanism=wave does not exist"),
        ({"mechanism": "tree", "bands": 3}, "bands=3 has no meaning"),
        ({"mechanism": "banded", "bands": 11}, "bands=11 are more than min_separation=10"),
        ({"min_separation": 101}, "more than rounds=100"),
        ({"sampling_rate": 0.1}, "sampling_rate=0.1 has no meaning"),
        ({"noise_multiplier": None}, "noise_multiplier .or target_epsilon. missing"),
        ({"target_epsilon": 3.0}, "contradict each other"),
        ({"unit": "example"}, "unit=example has no schedule"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, Any], words: str) -> None:
    plan = {"min_separation": 10, "noise_multiplier": 1.0, "steps": 100, "delta": 1e-6}
    with pytest.raises(ConfigError, match=words):
        account(plan | changes)


def test_noise_is_found_for_a_target_epsilon() -> None:
    schedule = Schedule(2000, 313, 6)
    worth = calibrate_noise(8.0, 1e-10, 1.0, 1, sampling="none", relation="zero_out")
    event = GaussianEvent(noise_multiplier=worth, relation="zero_out")
    assert 8.0 * (1 - 1e-3) <= epsilon(event, 1e-10) <= 8.0
    assert worth * math.sqrt(79) == pytest.approx(7.41, abs=0.01)
    assert make_factorisation("tree", schedule).sensitivity(schedule) == math.sqrt(79)


# -- errors ----------------------------------------------------------------------------------------


def prefix_sums(rounds: int) -> np.ndarray:
    return np.tril(np.ones((rounds, rounds)))


def noise_matrix(one: Factorisation) -> np.ndarray:
    """C^-1; for the tree, rows of the stream by feeding it unit vectors of z."""
    if one.name != "tree":
        return np.linalg.inv(one.strategy_matrix())
    nodes = len(one.strategy_matrix())
    at = iter(np.eye(nodes, dtype=np.float32))
    stream, rows = one.stream(), []
    for _ in range(one.rounds):
        stream.at += 1
        rows.append(stream._row(lambda: next(at).copy()))
    return np.array(rows, dtype=np.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounds", [1, 2, 13, 32])
def test_variances_are_those_of_the_dense_matrices(name: str, rounds: int) -> None:
    schedule = Schedule(rounds, max(1, rounds // 3))
    one = make_factorisation(name, schedule)
    rows = noise_matrix(one)
    sums = prefix_sums(rounds) @ rows
    np.testing.assert_allclose((rows**2).sum(1), one.row_variances(), rtol=1e-5)
    np.testing.assert_allclose((sums**2).sum(1), one.prefix_variances(), rtol=1e-5)
    error = one.sensitivity(schedule) * np.sqrt((sums**2).sum(1))
    assert one.max_error(schedule) == pytest.approx(error.max(), rel=1e-5)
    assert one.mean_error(schedule) == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    np.testing.assert_allclose(sums @ one.strategy_matrix(), prefix_sums(rounds), atol=2e-5)


def test_momentum_is_a_workload_of_its_own() -> None:
    one = make_factorisation("banded", Schedule(20, 5))
    assert isinstance(one, Banded)
    work = series.toeplitz(series.workload(20, 0.9), 20)
    velocity = series.toeplitz(0.9 ** np.arange(20), 20)
    np.testing.assert_allclose(work, prefix_sums(20) @ velocity)
    dense = ((work @ np.linalg.inv(one.strategy_matrix())) ** 2).sum(1)
    np.testing.assert_allclose(one.prefix_variances(momentum=0.9), dense)


def test_square_roots_square_to_prefix_sums() -> None:
    root = series.toeplitz(series.square_root(30), 30)
    np.testing.assert_allclose(root @ root, prefix_sums(30), atol=1e-12)
    inverse = series.toeplitz(series.inverse_square_root(30), 30)
    np.testing.assert_allclose(inverse @ root, np.eye(30), atol=1e-12)
    full = bisr(Schedule(30, 30), bands=30)
    np.testing.assert_allclose(full.strategy_matrix(), root, atol=1e-12)


def test_correlated_noise_beats_independent_noise_on_long_runs() -> None:
    schedule = Schedule(1000, 200, 5)
    errors = {one.name: one.mean_error(schedule) for one in every_kind(schedule)}
    assert errors["tree"] < errors["identity"] / 2
    assert errors["banded"] < errors["identity"] / 3
    assert errors["bisr"] < errors["identity"] / 3
    assert errors["blt"] < errors["tree"]
    wide = make_factorisation("banded", schedule, 200)
    assert wide.mean_error(schedule) < errors["banded"]


def test_buffers_come_close_to_the_square_root_with_few_rows_of_memory() -> None:
    """One participation: the square root is within a few percent of the best Toeplitz C."""
    schedule = Schedule(1000, 1000, 1)
    best = bisr(schedule, bands=1000).mean_error(schedule)
    assert blt(schedule, 4).mean_error(schedule) < 1.03 * best


def test_a_search_never_ends_above_where_it_began() -> None:
    schedule = Schedule(300, 30, 5)
    cut = Banded(300, {"bands": series.square_root(30)})
    assert make_factorisation("banded", schedule, 30).mean_error(schedule) <= cut.mean_error(
        schedule
    )


def test_optimised_columns_do_not_grow_so_that_their_sensitivity_is_exact() -> None:
    for schedule in (Schedule(300, 30, 5), Schedule(64, 8), Schedule(500, 500)):
        for name in ("banded", "bisr", "blt"):
            one = make_factorisation(name, schedule)
            assert isinstance(one, Banded | InverseBanded | Buffered)
            assert (one.column >= 0).all()
            assert (np.diff(one.column) <= 1e-12).all()


# -- streams ---------------------------------------------------------------------------------------


def rows_of(one: Factorisation, size: int, rounds: int) -> np.ndarray:
    stream = one.stream()
    return np.array([stream.next(size, of_round(r)) for r in range(1, rounds + 1)])


@pytest.mark.parametrize("name", ["identity", "banded", "bisr", "blt"])
def test_streamed_rows_are_the_dense_product(name: str) -> None:
    rounds, size = 40, 7
    one = make_factorisation(name, Schedule(rounds, 10))
    fresh = [of_round(r).standard_normal(size, dtype=np.float32) for r in range(1, rounds + 1)]
    z = np.array(fresh)
    dense = np.linalg.solve(one.strategy_matrix(), z.astype(np.float64))
    np.testing.assert_allclose(rows_of(one, size, rounds), dense, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_streamed_noise_has_the_variance_of_each_round(name: str) -> None:
    rounds, size = 12, 40_000
    one = make_factorisation(name, Schedule(rounds, 3))
    rows = rows_of(one, size, rounds).astype(np.float64)
    close = 6 * math.sqrt(2 / size)
    np.testing.assert_allclose(rows.var(1), one.row_variances(), rtol=close)
    sums = np.cumsum(rows, axis=0)
    np.testing.assert_allclose(sums.var(1), one.prefix_variances(), rtol=close)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stopped", [0, 1, 5, 16, 29])
def test_a_replayed_stream_goes_on_as_if_it_had_never_stopped(name: str, stopped: int) -> None:
    rounds, size = 30, 5
    one = make_factorisation(name, Schedule(rounds, 10))
    through = rows_of(one, size, rounds)
    stream = one.stream()
    asked: list[int] = []
    stream.replay(stopped, size, lambda number: asked.append(number) or of_round(number))  # type: ignore[func-returns-value]
    later = [stream.next(size, of_round(r)) for r in range(stopped + 1, rounds + 1)]
    assert np.array_equal(np.array(later), through[stopped:])
    if name == "identity":
        assert asked == []
    if name == "bisr":
        assert len(asked) < len(one.numbers["bands"])


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_keeps_few_rows(name: str) -> None:
    rounds = 100
    one = make_factorisation(name, Schedule(rounds, 10))
    stream = one.stream()
    most = {"identity": 0, "tree": 7, "banded": 9, "bisr": 31, "blt": 4}[name]
    for number in range(1, rounds + 1):
        stream.next(3, of_round(number))
        kept = [vars(stream).get(place, []) for place in ("_rows", "_nodes", "_buffers")]
        assert sum(map(len, kept)) <= most


def test_a_stream_ends_with_its_plan() -> None:
    stream = make_factorisation("blt", Schedule(3)).stream()
    for number in range(1, 4):
        stream.next(2, of_round(number))
    with pytest.raises(ValueError, match="round 4 is beyond the 3 rounds"):
        stream.next(2, of_round(4))


def test_a_schedule_longer_than_the_plan_has_no_sensitivity() -> None:
    for one in every_kind(Schedule(10, 2)):
        assert one.sensitivity(Schedule(9, 2)) <= one.sensitivity(Schedule(10, 2))
        with pytest.raises(ValueError, match="rounds=11 are more than the 10"):
            one.sensitivity(Schedule(11, 2))


# -- files and refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_factorisation_survives_its_json_exactly(name: str) -> None:
    import json

    one = make_factorisation(name, Schedule(50, 7, 3))
    other = from_json(json.loads(json.dumps(one.to_json())))
    assert type(other) is type(one) and other.to_json() == one.to_json()
    assert np.array_equal(rows_of(other, 3, 50), rows_of(one, 3, 50))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: make_factorisation("fourier", s), "mechanism='fourier'"),
        (lambda s: make_factorisation("banded", s, 6), "bands=6 are more than min_separation=5"),
        (lambda s: make_factorisation("blt", s, 0), "bands=0"),
        (lambda s: make_factorisation("bisr", s, 51), "bands=51"),
        (lambda s: make_factorisation("tree", s, 3), "no meaning"),
        (lambda s: from_json({"name": "tree"}), "lacks or garbles 'rounds'"),
        (lambda s: from_json({"name": "wavelet", "rounds": 3}), "wavelet"),
    ],
)
def test_impossible_factorisations_are_refused(
    make: Callable[[Schedule], Factorisation], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make(Schedule(50, 5))
