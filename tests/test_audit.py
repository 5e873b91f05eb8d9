"""Laws of the audit: scores to verdict, on a run whose leakage is known."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from sottovoce.client.errors import ConfigError, RunError
from sottovoce.client.examples import Examples, Schema
from sottovoce.privacy import (
    GaussianEvent,
    Ledger,
    NonPrivateRelease,
    RandomisedReport,
    epsilon,
)
from sottovoce.privacy.audit import one_run_p_value
from sottovoce.privacy.audit.attack_run import audit_run
from sottovoce.privacy.audit.attacks import ATTACKS
from sottovoce.privacy.audit.bounds import LowerBound
from sottovoce.privacy.audit.leakage import Leakage, Probe
from sottovoce.privacy.audit.material import FinishedRun, Material, device_means
from sottovoce.privacy.audit.membership import (
    Guesses,
    choose_fractions,
    flip_coins,
    guess,
    measure,
    split_bound,
)
from sottovoce.privacy.audit.outcome import Utility
from sottovoce.privacy.audit.page import render_page
from sottovoce.privacy.audit.record import audit_record, json_text
from sottovoce.privacy.audit.roc import auc, auc_interval, roc, tpr_at_fpr
from sottovoce.privacy.audit.run import AuditConfig, run_audit
from sottovoce.privacy.audit.verdict import (
    Claim,
    Finding,
    Verdict,
    judge,
    judge_claim,
    read_claims,
)
from sottovoce.simulations.population import Population

Array = NDArray[np.float64]

# -- scores ----------------------------------------------------------------------------------------


def _pairs() -> Iterator[tuple[Array, Array]]:
    generator = np.random.default_rng(0)
    yield generator.normal(0.5, 1, 70), generator.normal(0, 2, 40)
    yield generator.integers(0, 4, 50) * 1.0, generator.integers(0, 3, 60) * 1.0  # many ties
    yield np.ones(5), np.zeros(7)
    yield np.zeros(5), np.zeros(7)


@pytest.mark.parametrize(("members", "others"), list(_pairs()))
def test_auc_equals_sklearns_and_the_share_of_won_pairs(members: Array, others: Array) -> None:
    labels = np.repeat([1, 0], [len(members), len(others)])
    expected = roc_auc_score(labels, np.concatenate([members, others]))
    assert auc(members, others) == pytest.approx(expected)
    gaps = members[:, None] - others[None, :]
    assert auc(members, others) == pytest.approx(((gaps > 0) + 0.5 * (gaps == 0)).mean())


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_auc_interval_covers_the_true_area(shift: float) -> None:
    truth = stats.norm.cdf(shift / np.sqrt(2))
    generator = np.random.default_rng(5)
    missed = 0
    for _ in range(300):
        low, high = auc_interval(
            generator.normal(shift, 1, 60), generator.normal(0, 1, 80), 0.95
        )
        missed += not low <= truth <= high
    assert missed <= stats.binom.ppf(0.999, 300, 0.06)


def test_auc_interval_of_perfect_separation_still_has_width() -> None:
    low, high = auc_interval(np.ones(30), np.zeros(30), 0.95)
    assert low == pytest.approx(0.025 ** (1 / 30)) and high == 1.0


@pytest.mark.parametrize(("members", "others"), list(_pairs()))
@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.5])
def test_tpr_at_fpr_equals_the_best_threshold_tried_one_by_one(
    members: Array, others: Array, fpr: float
) -> None:
    best = max(
        (float((members >= t).mean()) for t in [*members, *others, np.inf]
         if (others >= t).mean() <= fpr),
        default=0.0,
    )
    rate, (low, high) = tpr_at_fpr(roc(members, others), fpr, 0.95)
    assert rate == pytest.approx(best) and low <= rate <= high


# -- the split -------------------------------------------------------------------------------------


def test_choosing_on_the_tested_half_raises_false_alarms_and_splitting_does_not() -> None:
    trials, n = 300, 400
    generator = np.random.default_rng(11)
    naive = split = 0
    for _ in range(trials):
        scores, coins = generator.standard_normal(n), generator.random(n) < 0.5
        chosen_here = choose_fractions(scores, coins, 0.05)
        chosen_apart = choose_fractions(generator.standard_normal(n), coins, 0.05)
        naive += _proves_something(guess(scores, coins, *chosen_here))
        split += _proves_something(guess(scores, coins, *chosen_apart))
    assert naive > 0.2 * trials
    assert split <= stats.binom.ppf(0.999, trials, 0.05)


def _proves_something(guesses: Guesses) -> bool:
    made = guesses.as_members + guesses.as_non_members
    return one_run_p_value(guesses.canaries, made, guesses.correct, 0.0, 0.0) <= 0.05


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_split_bound_exceeds_a_known_epsilon_in_at_most_5_percent(truth: float) -> None:
    trials, right = 300, 1 / (1 + np.exp(-truth))
    generator = np.random.default_rng(2)
    alarms = 0
    for _ in range(trials):
        members, others = (
            np.where(generator.random(300) < share, 1.0, -1.0) for share in (right, 1 - right)
        )
        bound, _ = split_bound(members, others, delta=0.0, confidence=0.95, generator=generator)
        alarms += bound.epsilon > truth
    assert alarms <= stats.binom.ppf(0.999, trials, 0.05)


def test_split_bound_comes_near_its_ceiling_where_everything_leaks() -> None:
    generator = np.random.default_rng(0)
    bound, guesses = split_bound(
        np.ones(1000), np.zeros(1000), delta=1e-7, confidence=0.95, generator=generator
    )
    assert guesses.canaries > 800 and bound.ceiling > 5.5
    assert bound.epsilon > bound.ceiling - 0.2


def test_coins_are_binomial_and_never_run_out() -> None:
    generator = np.random.default_rng(4)
    inside = []
    for _ in range(400):
        scores, coins = flip_coins(np.ones(200), np.zeros(5000), generator)
        assert (scores == coins).all()
        inside.append(coins.sum())
    assert np.mean(inside) == pytest.approx(len(coins) / 2, rel=0.02)
    assert np.var(inside) == pytest.approx(len(coins) / 4, rel=0.3)


def test_scores_all_alike_prove_nothing_whatever_their_order() -> None:
    generator = np.random.default_rng(1)
    found = measure(np.zeros(500), np.zeros(500), delta=1e-5, confidence=0.95, generator=generator)
    assert found.bound.epsilon == 0.0 and found.auc == 0.5


def test_guesses_abstain_where_only_the_extremes_are_known() -> None:
    generator = np.random.default_rng(1)
    coins = generator.random(1000) < 0.5
    scores = generator.standard_normal(1000)
    scores[np.flatnonzero(coins)[:50]] += 10
    top, bottom = choose_fractions(scores, coins, 0.05)
    assert 0 < top <= 0.1 and bottom <= 0.05


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_few_canaries_are_measured_too(count: int) -> None:
    generator = np.random.default_rng(1)
    found = measure(
        np.ones(count), np.zeros(count), delta=1e-5, confidence=0.95, generator=generator
    )
    assert found.bound.epsilon <= found.bound.ceiling


# -- verdicts --------------------------------------------------------------------------------------


def _finding(epsilon: float, *, unit: str = "device", ceiling: float = 5.0,
             invalid: str | None = None) -> Finding:
    bound = LowerBound(epsilon, 0.95, "test", ceiling, "coins")
    return Finding("attack", unit, "release", bound, invalid)


def _claim(epsilon: float, unit: str = "device", published: float | None = None) -> Claim:
    return Claim(unit, "release", epsilon, 1e-5, published)


@pytest.mark.parametrize(
    ("claim", "finding", "verdict"),
    [
        (_claim(2.0), _finding(2.1), Verdict.VIOLATION),
        (_claim(2.0), _finding(1.9), Verdict.NO_VIOLATION_FOUND),
        (_claim(8.0), _finding(1.9), Verdict.INCONCLUSIVE),
        (_claim(np.inf), _finding(4.9), Verdict.INCONCLUSIVE),
        (_claim(2.0), _finding(4.0, invalid="another file"), Verdict.INVALID),
        (_claim(2.0), _finding(4.0, unit="example"), Verdict.INCONCLUSIVE),
        (_claim(4.0, published=2.0), _finding(1.0), Verdict.INVALID),
        (_claim(4.0, published=4.01), _finding(1.0), Verdict.NO_VIOLATION_FOUND),
    ],
)
def test_verdict_follows_from_claim_bound_ceiling_and_validity(
    claim: Claim, finding: Finding, verdict: Verdict
) -> None:
    judgement = judge_claim(claim, [finding])
    assert judgement.verdict is verdict
    assert not re.search(r"private|passed", f"{judgement.verdict} {judgement.reason}")


def test_any_violation_outweighs_the_headline_claim() -> None:
    claims = [_claim(4.0), _claim(1.0, unit="example")]
    findings = [_finding(0.0), _finding(1.5, unit="example")]
    assert judge(claims, findings).verdict is Verdict.VIOLATION
    assert judge(claims, findings[:1]).verdict is Verdict.NO_VIOLATION_FOUND


def test_exit_codes_are_the_published_ones() -> None:
    assert {str(v): v.exit_code for v in Verdict} == {
        "VIOLATION": 2, "NO VIOLATION FOUND": 0, "INCONCLUSIVE": 4, "INVALID": 3,
    }


def test_a_bound_is_held_against_the_claim_for_the_neighbours_it_tells_apart() -> None:
    claim = Claim("device", "release", 2.0, 1e-5, exchanged=4.0)
    bound = LowerBound(3.0, 0.95, "test", 5.0, "coins")
    def judged(relation: str) -> Verdict:
        finding = Finding("attack", "device", "release", bound, None, relation)
        return judge_claim(claim, [finding]).verdict

    assert judged("add_remove") is Verdict.VIOLATION
    assert judged("replace_one") is Verdict.NO_VIOLATION_FOUND
    assert judged("zero_out") is Verdict.INVALID


def test_exchanging_doubles_the_sensitivity_and_drops_samples_that_show() -> None:
    def claimed(**fields: Any) -> Claim:
        event = GaussianEvent(noise_multiplier=1.5, **fields)
        ledger = Ledger([event], deltas={"device": 1e-5})
        return read_claims(ledger, {}, epsilon)[0]

    def spent(noise: float) -> float:
        return epsilon(GaussianEvent(noise_multiplier=noise), 1e-5)

    plain = claimed()
    assert plain.epsilon == pytest.approx(spent(1.5))
    assert plain.exchanged == pytest.approx(spent(0.75))
    assert claimed(relation="zero_out").exchanged == plain.exchanged
    shows = claimed(relation="zero_out", sampling="poisson", sampling_rate=0.1)
    assert shows.exchanged == pytest.approx(spent(0.75)) and shows.relation == "zero_out"
    secret = claimed(sampling="poisson", sampling_rate=0.1)
    assert secret.exchanged is not None
    assert secret.epsilon < secret.exchanged < claimed().exchanged  # type: ignore[operator]


def test_only_unsampled_gaussian_ledgers_have_gaussian_claims() -> None:
    def gaussian(*events: Any) -> bool:
        return read_claims(Ledger(events, deltas={"device": 1e-5}), {}, epsilon)[0].gaussian

    unsampled = GaussianEvent(noise_multiplier=1.5, count=3)
    assert gaussian(unsampled)
    assert gaussian(unsampled, GaussianEvent(noise_multiplier=4.0, relation="zero_out"))
    assert not gaussian(GaussianEvent(noise_multiplier=1, sampling="poisson", sampling_rate=0.1))
    assert not gaussian(unsampled, RandomisedReport.from_epsilon(1.0, 4, observer="release"))
    assert not gaussian(unsampled, NonPrivateRelease(purpose="vocabulary"))


def test_a_gaussian_ledger_gets_the_gaussian_bound_and_others_do_not(folder: Path) -> None:
    _, record = _audit(folder, FakeRun(leak=0.4), attacks=["device_loss"])
    assert record["claim"]["mechanism"] == "gaussian"
    assert "Gaussian" in record["attacks"][0]["method"]
    _, record = _audit(folder, FakeRun(leak=0.4, sampling_rate=0.5), attacks=["device_loss"])
    assert record["claim"]["mechanism"] == "any"
    assert "Gaussian" not in record["attacks"][0]["method"]


def test_a_unit_that_no_event_names_has_no_claim() -> None:
    ledger = Ledger([GaussianEvent(noise_multiplier=2.0)], deltas={"device": 1e-5})
    summary = {"epsilon": {"example": {"epsilon": 1.0, "delta": 1e-5}}}
    device, example = read_claims(ledger, summary, lambda *a, **k: 2.3)
    assert device.epsilon == 2.3 and not example.finite


def test_an_epsilon_in_the_summary_without_one_in_the_ledger_is_invalid() -> None:
    summary = {"epsilon": {"device": {"epsilon": 1.0, "delta": 1e-5}}}
    for events in ([], [NonPrivateRelease(purpose="sums", unit="device", observer="release")]):
        claims = read_claims(Ledger(events), summary, lambda *a, **k: math.inf)
        found = judge(claims, [_finding(0.5)])
        assert found.verdict is Verdict.INVALID and "summary states epsilon 1" in found.reason


def test_no_finding_on_one_unit_hides_a_contradiction_about_the_other() -> None:
    claims = [_claim(4.0), _claim(4.0, "example", published=1.0)]
    sound = [_finding(0.5), _finding(0.5, unit="example")]
    assert judge(claims[:1], sound).verdict is Verdict.NO_VIOLATION_FOUND
    assert judge(claims, sound).verdict is Verdict.INVALID
    assert judge(claims, [_finding(4.5), sound[1]]).verdict is Verdict.VIOLATION


# -- a run of known leakage ------------------------------------------------------------------------

DEVICES, HELD_OUT = 800, 400


class TokenPopulation(Population):
    """Every example is one word of its own, so that a model can remember it alone."""

    def __init__(self, *, test_file: str | None = None, held_out: int = HELD_OUT) -> None:
        self.name = "tokens"
        self.words = ["word"]
        self.schema = Schema()
        self.public_words = True
        self.activity = np.tile(np.array([1, 3, 100], np.uint16), DEVICES)[:DEVICES]
        self.held_out = held_out
        self.test_file = test_file
        self.starts = np.concatenate([[0], np.cumsum(self.activity, dtype=np.int64)])

    def examples(
        self, devices: NDArray[np.int64], indices: Sequence[NDArray[np.int64]] | None = None
    ) -> Examples:
        assert indices is not None
        return _examples([self.starts[d] + i for d, i in zip(devices, indices, strict=True)])

    def held_out_devices(self, limit: int | None = None) -> Examples:
        sizes = np.minimum(self.activity[: min(self.held_out, limit or self.held_out)], 20)
        ends = self.starts[-1] + np.cumsum(sizes, dtype=np.int64)
        return _examples([np.arange(e - n, e) for e, n in zip(ends, sizes, strict=True)])

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        first = int(self.starts[-1]) + 100_000
        return _examples([np.arange(first + 5 * d, first + 5 * d + 5) for d in range(limit or 400)])

    def describe(self) -> dict[str, Any]:
        return {"source": "none", "test": self.test_file}


def _examples(rows: Sequence[NDArray[np.int64]]) -> Examples:
    tokens = np.concatenate(rows)
    return Examples(
        tokens=tokens.astype(np.int32),
        offsets=np.arange(len(tokens) + 1),
        device_offsets=np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
    )


class Memory(nn.Module):
    """Loses `leak` less on each of the first `trained` examples than on all others."""

    def __init__(self, trained: int, leak: float) -> None:
        super().__init__()
        difficulty = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
        difficulty[:trained] -= leak
        self.loss = nn.Parameter(difficulty)


class LossTask:
    """The parts of a task that an audit uses."""

    def evaluation_batches(
        self, examples: Examples, batch_size: int
    ) -> Iterator[tuple[NDArray[np.int64], dict[str, Tensor]]]:
        for start in range(0, len(examples), batch_size):
            rows = np.arange(start, min(start + batch_size, len(examples)))
            yield rows, {"tokens": torch.from_numpy(examples.take(rows).tokens.astype(np.int64))}

    def losses(self, model: Memory, batch: dict[str, Tensor]) -> Tensor:
        return model.loss[batch["tokens"]]


@dataclass
class FakeRun:
    leak: float = 0.0
    noise_multiplier: float | None = 1.5
    sampling_rate: float | None = None
    population: TokenPopulation = field(default_factory=TokenPopulation)
    participants: NDArray[np.int64] | None = None
    published: float | None = None
    keep_initial: bool = True
    task: LossTask = field(default_factory=LossTask)
    training: None = None
    codes: tuple[()] = ()

    @property
    def model(self) -> Memory:
        return Memory(int(self.population.starts[-1]), self.leak)

    @property
    def initial_model(self) -> Memory | None:
        return Memory(0, 0.0) if self.keep_initial else None

    @property
    def ledger(self) -> Ledger:
        if self.noise_multiplier is None:
            return Ledger()
        event = GaussianEvent(noise_multiplier=self.noise_multiplier)
        if self.sampling_rate is not None:
            event = replace(event, sampling="poisson", sampling_rate=self.sampling_rate)
        return Ledger([event], deltas={"device": 1e-5})

    @property
    def summary(self) -> dict[str, Any]:
        if self.published is None:
            return {}
        return {"epsilon": {"device": {"epsilon": self.published, "delta": 1e-5}}}

    def __call__(self, folder: Path) -> FinishedRun:
        return cast(FinishedRun, self)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.yaml", "model.safetensors", "ledger.json", "summary.json"):
        (tmp_path / name).touch()
    return tmp_path


def _audit(folder: Path, run: FakeRun, **settings: Any) -> tuple[int, dict[str, Any]]:
    code = run_audit(AuditConfig(run=str(folder), **settings), load=run)
    return code, json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def test_a_leaky_run_is_a_violation(folder: Path) -> None:
    code, record = _audit(folder, FakeRun(leak=2.0))
    assert (code, record["verdict"]) == (2, "VIOLATION")
    strongest = max(attack["epsilon_lower_bound"] for attack in record["attacks"])
    assert strongest > record["claim"]["epsilon"]


def test_a_run_that_leaks_nothing_is_no_violation_found(folder: Path) -> None:
    code, record = _audit(folder, FakeRun(leak=0.0))
    assert (code, record["verdict"]) == (0, "NO VIOLATION FOUND")
    for attack in record["attacks"]:
        assert attack["auc_ci"][0] <= 0.5 <= attack["auc_ci"][1]


def test_a_leak_without_a_claim_is_inconclusive_but_shown(folder: Path) -> None:
    code, record = _audit(folder, FakeRun(leak=2.0, noise_multiplier=None))
    assert (code, record["verdict"]) == (4, "INCONCLUSIVE")
    assert record["claim"]["epsilon"] is None
    assert record["attacks"][0]["auc"] > 0.99 and record["attacks"][0]["valid"]


def test_a_claim_above_the_ceiling_is_inconclusive(folder: Path) -> None:
    code, record = _audit(folder, FakeRun(noise_multiplier=0.3))
    assert code == 4 and record["attacks"][0]["ceiling"] < record["claim"]["epsilon"]


def test_a_summary_that_promises_more_than_its_ledger_is_invalid(folder: Path) -> None:
    code, record = _audit(folder, FakeRun(published=0.5))
    assert code == 3 and "summary states" in record["reason"]


def test_broken_scores_are_invalid(folder: Path) -> None:
    code, record = _audit(folder, FakeRun(leak=float("nan")), attacks=["device_loss"])
    assert code == 3 and "finite" in record["reason"]
    assert record["attacks"][0]["auc"] is None and not record["attacks"][0]["valid"]


def test_non_members_from_another_file_are_shown_but_not_compared(folder: Path) -> None:
    run = FakeRun(leak=2.0, population=TokenPopulation(test_file="test.jsonl"))
    _, record = _audit(folder, run, attacks="example_loss")
    (attack,) = record["attacks"]
    assert not attack["valid"] and "test.jsonl" in attack["note"]


def test_participants_are_shown_but_not_compared(folder: Path) -> None:
    run = FakeRun(leak=2.0, participants=np.arange(300, dtype=np.int64))
    _, record = _audit(folder, run, attacks=["participant_loss"])
    (attack,) = record["attacks"]
    assert attack["n_members"] == 300 and not attack["valid"] and attack["auc"] > 0.99


def test_audit_json_holds_what_other_programs_read(folder: Path) -> None:
    _, record = _audit(folder, FakeRun())
    assert set(record) >= {"verdict", "claim", "attacks", "threat_model", "seconds"}
    assert record["claim"]["unit"] == "device" and record["claim"]["observer"] == "release"
    for attack in record["attacks"]:
        assert set(attack) >= {
            "name", "observer", "unit", "auc", "auc_ci", "tpr_at_fpr", "epsilon_lower_bound",
            "confidence", "method", "ceiling", "seconds", "n_members", "n_non_members", "valid",
            "note", "cost",
        }
        assert set(attack["tpr_at_fpr"]) == {"0.01", "0.001"} and attack["confidence"] == 0.95
        assert 0 <= attack["epsilon_lower_bound"] <= attack["ceiling"]
    assert "participant_loss" in record["skipped"]


def test_the_same_audit_twice_finds_the_same(folder: Path) -> None:
    found = [_audit(folder, FakeRun(leak=0.3), seed=5)[1]["attacks"] for _ in range(2)]
    timeless = [[{**a, "seconds": 0} for a in attacks] for attacks in found]
    assert timeless[0] == timeless[1]


def test_scores_of_an_attack_do_not_depend_on_the_other_attacks(folder: Path) -> None:
    _, everything = _audit(folder, FakeRun(leak=0.3))
    _, alone = _audit(folder, FakeRun(leak=0.3), attacks=["example_loss"])
    by_name = {attack["name"]: attack for attack in everything["attacks"]}
    assert by_name["example_loss"]["auc"] == alone["attacks"][0]["auc"]


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            f"{tag} {name}={value}" for name, value in attrs
            if name in ("src", "href") and not (value or "").startswith("#")
        ]


def test_the_page_is_self_contained_and_leads_with_the_verdict(folder: Path) -> None:
    _audit(folder, FakeRun(leak=2.0))
    page = (folder / "audit.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert not links.found and "http" not in page and "<script" not in page
    body = page[page.index("<body>"):]
    places = [body.index(part) for part in ("VIOLATION", "Claimed ε", "Threat model", "<svg")]
    assert places == sorted(places)


class _Reader(Probe):
    """Reads one secret back."""

    name, unit, observer = "reader", "example", "fleet"
    sees, cost = "a device's update", "one look"

    def measure(self, run: FinishedRun, *, seed: int, confidence: float) -> Leakage:
        return Leakage(
            "reader", "example", "fleet", "a device's update", {"accuracy": 0.75}, "accuracy",
            (0.6, 0.9), 0.1, 1e-4, confidence, 0.2,
            ({"secret": "1 2 3 4", "hits": [True, False]},),
        )


def test_what_is_read_back_is_shown_and_never_held_against_a_claim(folder: Path) -> None:
    cfg = AuditConfig(run=str(folder))
    lines = [{"round": 0, "loss": 1.0}, {"round": 1, "epsilon_device": 2.0},
             {"round": 2, "epsilon_device": 2.76}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    audit = audit_run(folder, cfg, load=FakeRun(), probes=[_Reader()])
    audit = replace(audit, utility=(Utility("accuracy", 0.8, 0.81),))
    assert audit.judgement.verdict is Verdict.NO_VIOLATION_FOUND
    record, page = audit_record(audit), render_page(audit)
    assert record["leakage"][0]["value"] == 0.75 and record["leakage"][0]["seconds"] == 0.2
    assert [point["round"] for point in record["rounds"]] == [1, 2]
    assert record["rounds"][1]["epsilon_lower_bound"] is not None
    assert json.loads(json_text(record)) == json.loads(json.dumps(record))
    for shown in ("accuracy 0.75 [0.6, 0.9]", "1 2 3 4", "What the canaries cost", "0.81",
                  "Theory against practice", "What it cost", "no bound on any epsilon"):
        assert shown in page, shown


def test_bounds_and_estimates_look_different_on_the_page(folder: Path) -> None:
    _audit(folder, FakeRun())
    page = (folder / "audit.html").read_text(encoding="utf-8")
    assert "≥ " in page and "(no bound)" in page and "Power at half the noise" in page


def test_raw_scores_and_their_ids_are_in_audit_json(folder: Path) -> None:
    _, record = _audit(folder, FakeRun())
    for attack in record["attacks"]:
        kept = record["scores"][attack["name"]]
        for side, count in (("members", "n_members"), ("non_members", "n_non_members")):
            assert len(kept[side]["ids"]) == len(set(kept[side]["ids"])) == attack[count]
            assert len(kept[side]["scores"]) == attack[count]
        assert auc(*(np.array(kept[s]["scores"]) for s in ("members", "non_members"))) == (
            pytest.approx(attack["auc"])
        )


def test_the_table_puts_theory_beside_practice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _audit(folder, FakeRun())
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    for word in ("NO VIOLATION FOUND", "claimed", "least", "ceiling", "device_loss", "2.76"):
        assert word in shown
    _audit(folder, FakeRun(), format="json")
    assert json.loads(capsys.readouterr().out)["verdict"] == "NO VIOLATION FOUND"


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"run": None}, ConfigError, "run= is missing"),
        ({"run": "nowhere"}, RunError, "nowhere is not a run folder"),
        ({"attacks": ["device_lost"]}, ConfigError, "device_lost is unknown: choose from device_l"),
        ({"attacks": []}, ConfigError, "names none"),
        ({"attacks": ["participant_loss"]}, ConfigError, "does not say which devices"),
        ({"format": "xml"}, ConfigError, "format=xml"),
        ({"devices": 0}, ConfigError, "devices=0"),
        ({"confidence": 1.5}, ConfigError, "confidence=1.5"),
        ({"seed": -1}, ConfigError, "seed=-1"),
        ({"claim_epsilon": 2.0}, ConfigError, "claim_epsilon=2.0 needs scores="),
        ({"holdout": 0.0}, ConfigError, "holdout=0.0"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    folder: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        run_audit(AuditConfig(**{"run": str(folder), **settings}), load=FakeRun())
    assert "\n" not in str(caught.value)


def test_an_unfinished_run_and_one_without_held_out_data_are_refused(folder: Path) -> None:
    class Bare(TokenPopulation):
        def held_out_examples(self, limit: int | None = None) -> Examples | None:
            return None

    with pytest.raises(RunError, match="holds no devices out"):
        _audit(folder, FakeRun(population=Bare(held_out=0)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match="not finished \\(no model.safetensors\\)"):
        _audit(folder, FakeRun())


def test_members_and_non_members_are_read_equally_long() -> None:
    material = Material(cast(FinishedRun, FakeRun()), devices=300, seed=0)
    assert material.readable == 20
    assert np.diff(material.training_devices.offsets).max() == 20
    assert len(material.training_examples.final) == len(material.held_out_examples.final) == 300


def test_device_means_leave_out_devices_without_examples() -> None:
    means = device_means(np.array([1.0, 3.0, 5.0]), np.array([0, 2, 2, 3]))
    assert means.tolist() == [2.0, 5.0]


def test_every_attack_names_unit_observer_and_cost() -> None:
    for name, attack in ATTACKS.items():
        assert attack.name == name and attack.unit in ("device", "example")
        assert attack.observer in ("release", "server", "fleet") and attack.cost
