"""Laws of example canaries: fair coins, levels that tell nothing, data that is in or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats
from small_runs import model, resume, run, run_until_killed, strict, summary
from torch import nn

from sottovoce.client.errors import ConfigError
from sottovoce.client.examples import Examples
from sottovoce.client.vocabulary import GrammarVocabulary, HashVocabulary
from sottovoce.privacy.audit import references
from sottovoce.privacy.audit.attack_run import audit_run
from sottovoce.privacy.audit.canary_attacks import CANARY_ATTACKS, least_expected, offline_lira
from sottovoce.privacy.audit.canary_claims import implied_claims
from sottovoce.privacy.audit.canary_gradients import norms, projections
from sottovoce.privacy.audit.canary_view import CanaryView
from sottovoce.privacy.audit.claims import Claim
from sottovoce.privacy.audit.material import FinishedRun
from sottovoce.privacy.audit.run import AuditConfig, run_audit
from sottovoce.server import runs
from sottovoce.server.settings import compose
from sottovoce.server.setup import settings_text
from sottovoce.simulations.assistant import AssistantPopulation
from sottovoce.simulations.canaries import CanaryPopulation, with_canaries
from sottovoce.simulations.canary_slots import Slots, choose_slots
from sottovoce.simulations.canary_texts import KINDS, unused_words
from sottovoce.simulations.experiment import build_experiment
from sottovoce.simulations.jsonl import JsonlPopulation
from sottovoce.simulations.population import Population
from sottovoce.strategies.levels import activity_levels

BASE = AssistantPopulation(devices=300, held_out_devices=5)


def _texts(population: Population, examples: Examples) -> list[tuple[Any, ...]]:
    """What each example says, labels included."""
    edges = zip(examples.offsets, examples.offsets[1:], strict=False)
    return [
        (
            " ".join(population.words[t] for t in examples.tokens[a:b]),
            None if examples.intent is None else int(examples.intent[k]),
            None if examples.slots is None else tuple(examples.slots[a:b].tolist()),
        )
        for k, (a, b) in enumerate(edges)
    ]


def _with(
    kind: str, base: Population = BASE, *, number: int = 100, seed: int = 3, task: str | None = None
) -> CanaryPopulation:
    config = compose([
        f"audit.canaries={kind}", f"audit.number={number}", f"audit.seed={seed}",
        f"task={task or ('intent_slots' if base.schema.intents else 'next_word')}",
    ])
    vocabulary = GrammarVocabulary(base.words) if base.public_words else HashVocabulary(4096)
    found, _ = with_canaries(base, vocabulary, config)
    assert isinstance(found, CanaryPopulation)
    return found


def _jsonl(folder: Path, index: str | None) -> JsonlPopulation:
    rows = [
        f'{{"user_id": "u{i * i % 41}", "text": "words {i} of {i % 7} users"}}' for i in range(900)
    ]
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return JsonlPopulation(path, index=index)


# -- coins and slots -------------------------------------------------------------------------------


def test_coins_are_fair_and_do_not_follow_seed_or_neighbour() -> None:
    empty = np.zeros(20_000, np.int64)
    one, two = (Slots(empty, empty, seed).coins for seed in (0, 1))
    for coins in (one, two, one ^ two, one[1:] ^ one[:-1]):
        assert stats.binomtest(int(coins.sum()), len(coins)).pvalue > 1e-6


def test_coins_do_not_depend_on_data_or_on_slots() -> None:
    other = AssistantPopulation(devices=200, held_out_devices=5, seed=9)
    assert (_with("natural").slots.coins == _with("mislabelled", other).slots.coins).all()


def test_slots_do_not_depend_on_what_devices_hold() -> None:
    activity = BASE.activity
    first, again = choose_slots(activity, 50, 4), choose_slots(activity.copy(), 50, 4)
    assert (first.devices == again.devices).all() and (first.numbers == again.numbers).all()
    assert len({*zip(first.devices.tolist(), first.numbers.tolist(), strict=True)}) == 50
    assert (first.numbers < activity[first.devices]).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("append", [False, True])
def test_levels_do_not_depend_on_the_coins_even_when_every_slot_is_taken(
    seed: int, append: bool
) -> None:
    activity, levels = BASE.activity.astype(int), activity_levels(BASE.activity)
    room = 2 ** levels.astype(int) - 1 if append else activity - 2 ** levels.astype(int)
    slots = choose_slots(BASE.activity, int(room.sum()), seed, append=append)
    after = slots.numbers >= activity[slots.devices]
    assert after.any() == append
    for most, few in ((activity, slots.devices[~after]), (activity, slots.devices[:0])):
        most = most + np.bincount(slots.devices[after], minlength=len(BASE))
        fewest = activity - np.bincount(few, minlength=len(BASE))
        assert (activity_levels(most) == levels).all()
        assert (activity_levels(fewest) == levels).all()
    with pytest.raises(ConfigError, match="room for within"):
        choose_slots(BASE.activity, int(room.sum()) + 1, seed, append=append)


# -- what devices hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["assistant", "memory", "index"])
def test_a_candidate_is_in_one_device_once_or_nowhere(
    kind: str, source: str, tmp_path: Path
) -> None:
    index = str(tmp_path / "index") if source == "index" else None
    base = BASE if source == "assistant" else _jsonl(tmp_path, index)
    population = _with(kind, base, number=100 if kind == "natural" else 500)
    slots, candidates = population.slots, _texts(population, population.candidates())
    every = np.arange(len(base))
    taken = {*zip(slots.devices.tolist(), slots.numbers.tolist(), strict=True)}
    for device in every:
        held = _texts(population, population.examples(np.array([device])))
        plain = _texts(base, base.examples(np.array([device])))
        kept = [text for k, text in enumerate(plain) if (int(device), k) not in taken]
        mine = np.flatnonzero((slots.devices == device) & slots.coins)
        expected = kept + [candidates[i] for i in mine]
        assert sorted(held, key=repr) == sorted(expected, key=repr)
        assert len(held) == population.activity[device]


def test_wrong_labels_are_wrong_and_unique_words_are_nobodys() -> None:
    original = _texts(BASE, _with("natural").candidates())
    wrong = _texts(BASE, _with("mislabelled").candidates())
    for (text, intent, tags), (same, other, others) in zip(original, wrong, strict=True):
        assert text == same and intent != other
        assert all(a != b for a, b in zip(tags, others, strict=True))
    unique = _with("unique_token")
    assert unique.candidates().tokens.min() >= len(BASE.words)
    assert len({text for text, _, _ in _texts(unique, unique.candidates())}) == 100


def test_shuffled_texts_keep_lengths_and_words_but_not_order() -> None:
    plain, mixed = (_with(k, task="next_word").candidates() for k in ("natural", "mislabelled"))
    assert (plain.lengths == mixed.lengths).all()
    assert (np.sort(plain.tokens) == np.sort(mixed.tokens)).all()
    assert (plain.tokens != mixed.tokens).mean() > 0.8


def test_unique_words_have_ids_that_no_other_word_has() -> None:
    words = [f"word{i}" for i in range(500)]
    vocabulary = HashVocabulary(1000)
    found, _ = unused_words(vocabulary, words, 50)
    ids = vocabulary.ids(found).ids.tolist()
    assert len(set(ids)) == 50 and not set(ids) & set(vocabulary.ids(words).ids.tolist())
    with pytest.raises(ConfigError, match="raise task.vocabulary.buckets"):
        unused_words(HashVocabulary(20), words, 50)


def test_any_examples_asked_for_are_the_same_as_all_of_them() -> None:
    population = _with("mislabelled")
    generator = np.random.default_rng(0)
    devices = generator.permutation(300)[:80].astype(np.int64)
    indices = [generator.permutation(int(n))[: generator.integers(0, n + 1)]
               for n in population.activity[devices]]
    found = population.examples(devices, indices)
    said, expected = _texts(population, found), []
    for device, own in zip(devices, indices, strict=True):
        whole = _texts(population, population.examples(np.array([device])))
        expected += [whole[i] for i in own]
    assert said == expected
    assert np.diff(found.device_offsets).tolist() == [len(own) for own in indices]
    touched = int(population.slots.devices[0])
    with pytest.raises(IndexError):
        population.examples(np.array([touched]), [np.array([population.activity[touched]])])


def test_others_are_training_data_without_any_candidate() -> None:
    population = _with("natural")
    devices = np.arange(len(population))
    assert len(population.others(devices)) == BASE.activity.sum() - len(population.slots)


class Watched(Population):
    """A population that notes what is read of it."""

    def __init__(self, population: CanaryPopulation) -> None:
        self.__dict__.update(population.__dict__)
        self.inner, self.read = population, list[tuple[Any, ...]]()

    def examples(
        self, devices: np.ndarray, indices: Sequence[np.ndarray] | None = None
    ) -> Examples:
        found = self.inner.examples(devices, indices)
        self.read += _texts(self.inner, found)
        return found

    def held_out_devices(self, limit: int | None = None) -> Examples:
        return self.inner.held_out_devices(limit)

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        return self.inner.held_out_examples(limit)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


def test_training_reads_who_is_in_and_nobody_who_is_out() -> None:
    from sottovoce.privacy.mechanisms.noise import NoiseSource
    from sottovoce.simulations.fleet import SimulatedFleet

    text = settings_text(compose([
        "population.devices=30", "population.held_out_devices=2", "privacy=none",
        "model.embedding_size=4", "model.hidden_size=4", "audit.canaries=unique_token",
        "audit.number=60", "audit.seed=1", "cohort_size=20", "strategy.max_rate=1",
        "strategy.local_epochs=1", "population.max_examples_per_round=10000",
    ]))
    experiment = build_experiment(text)
    watched = Watched(cast(CanaryPopulation, experiment.population))
    first = experiment.initial_model()
    fleet = SimulatedFleet(
        watched, experiment.task, first, experiment.training, NoiseSource.from_seed(0)
    )
    parameters = {name: p.detach() for name, p in first.named_parameters()}
    fleet.train(parameters, np.arange(30), 1)
    names = _texts(watched, watched.inner.candidates())
    times = np.array([watched.read.count(name) for name in names])
    assert (times == watched.inner.slots.coins).all()


# -- runs ------------------------------------------------------------------------------------------

CANARIES = ("audit.canaries=mislabelled", "seed=5")


def test_a_resumed_run_equals_one_with_workers_that_never_stopped(tmp_path: Path) -> None:
    plain = [*CANARIES, "audit.number=100", "rounds=2", "cohort_size=8"]
    run(tmp_path / "whole", *plain, "run.workers=2")
    run_until_killed(tmp_path / "cut", *plain, "run.workers=1", at=1)
    assert resume(tmp_path / "cut") == 0
    assert model(tmp_path / "cut") == model(tmp_path / "whole")


def test_an_open_seed_is_settled_once_and_differs_from_run_to_run() -> None:
    plain = compose([CANARIES[0]])
    texts = [settings_text(plain), settings_text(plain)]
    seeds = [build_seed(text) for text in texts]
    assert None not in seeds and seeds[0] != seeds[1]
    assert build_seed(settings_text(compose([CANARIES[0], "seed=7"]))) == 7


def build_seed(text: str) -> int | None:
    line = next(line for line in text.split("\naudit:")[1].splitlines() if "  seed:" in line)
    value = line.split(":")[1].strip()
    return None if value == "null" else int(value)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["timeline=continual"], "needs data that stay"),
        (["task.vocabulary.source=training_text"], "cannot test a vocabulary"),
        (["audit.number=0"], "audit.number=0 must be at least 1"),
        (["audit.canaries=fake"], "audit.canaries=fake does not exist"),
    ],
)
def test_settings_that_do_not_fit_canaries_are_refused(
    overrides: list[str], complaint: str
) -> None:
    from sottovoce.server.limits import validate

    with pytest.raises(ConfigError, match=complaint):
        validate(compose([CANARIES[0], *overrides]))


NAMES = ("canary_loss", "canary_loss_drop", "canary_gradient", "canary_gradient_norm")


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without privacy that learnt its canaries by heart."""
    folder = tmp_path_factory.mktemp("memorised") / "run"
    run(
        folder, *CANARIES, "privacy=none", "strategy=fedavg", "strategy.sampler=uniform",
        "strategy.max_rate=1", "population.devices=4", "cohort_size=4", "audit.number=200",
        "population.mu=5.3", "population.sigma=0.1", "population.max_examples_per_round=1000",
        "strategy.device_optimizer=adam", "strategy.learning_rate=0.02",
        "strategy.local_epochs=8", "rounds=2", "run.workers=1",
        "model.hidden_size=24", "model.embedding_size=16",
    )
    return folder


def test_a_run_without_privacy_gives_its_canaries_away(memorised: Path) -> None:
    audit = audit_run(memorised, AuditConfig(run=str(memorised), attacks=list(NAMES)))
    found = {r.attack.name: r for r in audit.results}
    for name in ("canary_loss", "canary_loss_drop"):
        measured = found[name].membership
        assert measured is not None and measured.auc > 0.8, name
        assert measured.bound.assumes.startswith("each candidate was put into the training data")
    assert found["canary_loss"].attack.relation == "add_remove"


def test_canaries_that_were_never_trained_on_prove_nothing(memorised: Path) -> None:
    """The same run, but coins that had no part in it."""
    known = runs.load_run(memorised)
    assert known.canaries is not None
    wrong = SimpleNamespace(
        slots=Slots(known.canaries.slots.devices, known.canaries.slots.numbers, 77),
        candidates=known.canaries.candidates, others=known.canaries.others,
        activity=known.canaries.activity,
    )
    foreign = cast(FinishedRun, replace(known, canaries=cast(Any, wrong)))
    cfg = AuditConfig(run=str(memorised), attacks=list(NAMES))
    audit = audit_run(memorised, cfg, load=lambda _: foreign)
    for result in audit.results:
        assert result.membership is not None
        assert result.membership.bound.epsilon == 0.0


def test_the_audit_of_a_run_writes_canaries_and_what_they_cost(
    memorised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "STEPS", 60)
    cfg = AuditConfig(
        run=str(memorised), without=str(memorised), output=str(tmp_path), format="json",
        attacks=["canary_loss", "canary_rmia", "canary_lira", "canary_gradient"],
    )
    assert run_audit(cfg) == 4
    record = strict((tmp_path / "audit.json").read_text())
    assert [a["name"] for a in record["attacks"]] == cfg.attacks
    assert min(a["auc"] for a in record["attacks"]) > 0.6
    assert record["utility"][0]["with_canaries"] == record["utility"][0]["without"]
    ids = record["scores"]["canary_loss"]
    assert len(ids["members"]["ids"]) + len(ids["non_members"]["ids"]) == 200
    assert "canaries" in summary(memorised)["population"]


# -- scores ----------------------------------------------------------------------------------------


def _view(memorised: Path) -> CanaryView:
    return CanaryView(cast(FinishedRun, runs.load_run(memorised)), references=2, seed=0)


def test_no_score_reads_a_coin(memorised: Path) -> None:
    """Scores are the same whatever the coins of the run say."""
    known = runs.load_run(memorised)
    assert known.canaries is not None
    scores = {a.name: a.score(_view(memorised)) for a in CANARY_ATTACKS[:4]}
    known.canaries.slots.__dict__["coins"] = ~known.canaries.slots.coins
    try:
        view = CanaryView(cast(FinishedRun, known), references=2, seed=0)
        for attack in CANARY_ATTACKS[:4]:
            assert (attack.score(view) == scores[attack.name]).all()
    finally:
        known.canaries.slots.__dict__["coins"] = ~known.canaries.slots.coins


def test_gradient_scores_equal_a_loop_over_single_candidates(memorised: Path) -> None:
    view = _view(memorised)
    first, last = view.initial_model, view.model
    way = [b.detach() - a.detach()
           for a, b in zip(first.parameters(), last.parameters(), strict=True)]
    size, cosine = norms(view), projections(view)
    for i in (0, 7, 150):
        batch = view.task.collate(view.candidates.take(np.array([i])))
        expected = 0.0
        for network in (first, last):
            gradient = torch.autograd.grad(
                view.task.losses(network, batch).sum(), list(network.parameters())
            )
            length = sum(float(g.double().square().sum()) for g in gradient) ** 0.5
            along = sum(float((g * w).double().sum()) for g, w in zip(gradient, way, strict=True))
            expected -= along / length / _length(way) / 2
        assert size[i] == pytest.approx(length, rel=1e-3)
        assert cosine[i] == pytest.approx(expected, rel=1e-2, abs=1e-5)


def _length(tensors: list[torch.Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


def test_min_k_equals_a_loop_over_single_words() -> None:
    text = settings_text(compose([
        "task=next_word", "population.devices=50", "population.held_out_devices=2",
        "model.embedding_size=4", "model.hidden_size=4", "privacy=none",
        "audit.canaries=natural", "audit.number=20", "audit.seed=0",
    ]))
    experiment = build_experiment(text)
    network = experiment.initial_model()
    run_like = SimpleNamespace(
        canaries=experiment.population, task=experiment.task, model=network, initial_model=network
    )
    view = CanaryView(cast(FinishedRun, run_like), references=0, seed=0)
    scores = least_expected(view)
    for i in (0, 5, 19):
        batch = experiment.task.collate(view.candidates.take(np.array([i])))
        with torch.no_grad():
            rows = network(batch)["words"][0].double().log_softmax(1)
        standard = []
        for place in range(int(batch["lengths"][0])):
            p, log_p = rows[place].exp(), rows[place]
            mean = float((p * log_p).sum())
            spread = float((p * (log_p - mean) ** 2).sum()) ** 0.5
            standard.append((float(log_p[batch["targets"][0, place]]) - mean) / spread)
        kept = sorted(standard)[: max(1, round(0.2 * len(standard)))]
        assert scores[i] == pytest.approx(sum(kept) / len(kept), rel=1e-4)


def test_lira_prefers_what_the_reference_models_do_not_explain() -> None:
    class Fixed(nn.Module):
        def __init__(self, loss: list[float]) -> None:
            super().__init__()
            self.loss = nn.Parameter(torch.tensor(loss))

    class OneNumber:
        outputs = ()

        def evaluation_batches(self, examples: Examples, size: int) -> Any:
            yield np.arange(2), {}

        def losses(self, network: Any, batch: Any) -> torch.Tensor:
            return network.loss

    view = SimpleNamespace(
        task=OneNumber(), candidates=range(2), final=np.array([0.1, 0.1]),
        shadows=SimpleNamespace(models=(Fixed([2.0, 0.1]), Fixed([2.5, 0.2]))),
    )
    first, second = offline_lira(cast(CanaryView, view))
    assert first > second + 1


# -- claims ----------------------------------------------------------------------------------------


def test_a_claim_per_device_covers_examples_at_its_replace_one_epsilon_only() -> None:
    device = Claim("device", "release", 4.0, 1e-6, 4.0, exchanged=9.0)
    none = Claim("example", "release", float("inf"), None)
    claims, notes = implied_claims([device, none])
    assert [c.epsilon for c in claims] == [4.0, 9.0] and "follows from" in notes[0]
    assert claims[1].published is None and claims[1].unit == "example"
    own = Claim("example", "release", 3.0, 1e-6, 3.0)
    assert implied_claims([device, own]) == ([device, own], [])
    assert implied_claims([none, none])[1] == []
