"""Laws of the tasks: every fast path equals a slow one written out word by word."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.text import perplexity

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.client.examples import Examples, Schema
from sottovoce.client.tasks import TASKS, Batch, IntentSlots, NextWord, make_task
from sottovoce.client.vocabulary import BOS, EOS, PAD, UNK, Pieces

SCHEMA = Schema(("play", "stop", "call"), ("O", "B-who", "I-who", "B-what", "I-what"))
WORDS = [f"w{number}" for number in range(30)]
both_tasks = pytest.mark.parametrize("name", list(TASKS))


@dataclass
class TinyVocabulary:
    """Word k has `k % most` + 1 pieces, so that most = 1 gives one each; word 0 is unknown."""

    most: int = 3
    size: int = 40
    has_unknown: bool = True

    def of(self, word: str) -> list[int]:
        number = int(word[1:])
        if number == 0:
            return [UNK]
        return [
            4 + (5 * number + piece) % (self.size - 4) for piece in range(number % self.most + 1)
        ]

    def ids(self, words: list[str]) -> Pieces:
        pieces = [self.of(word) for word in words]
        offsets = np.concatenate(([0], np.cumsum([len(word) for word in pieces])))
        return Pieces(np.concatenate(pieces).astype(np.int32), offsets.astype(np.int64))


def intent_slots(
    vocabulary: TinyVocabulary, max_length: int = 9, schema: Schema = SCHEMA
) -> IntentSlots:
    return IntentSlots(vocabulary, schema, WORDS, max_length=max_length)  # type: ignore[arg-type]


def next_word(vocabulary: TinyVocabulary, max_length: int = 9) -> NextWord:
    return NextWord(vocabulary, Schema(), WORDS, max_length=max_length)  # type: ignore[arg-type]


def either(name: str) -> IntentSlots | NextWord:
    return intent_slots(TinyVocabulary()) if name == "intent_slots" else next_word(TinyVocabulary())


def random_examples(seed: int = 0, count: int = 60, longest: int = 8) -> Examples:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, longest + 1, count)
    total = int(lengths.sum())
    return Examples(
        tokens=draw.integers(0, len(WORDS), total).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        device_offsets=np.array([0, count], dtype=np.int64),
        intent=draw.integers(0, 3, count).astype(np.int32),
        slots=draw.integers(0, 5, total).astype(np.int32),
    )


def words_of(examples: Examples, row: int) -> list[int]:
    return [int(word) for word in examples.tokens[slice(*examples.offsets[row : row + 2])]]


def tags_of(examples: Examples, row: int) -> list[int]:
    assert examples.slots is not None
    return [int(tag) for tag in examples.slots[slice(*examples.offsets[row : row + 2])]]


class ByToken(nn.Module):
    """Logits that are a fixed function of each token; the intent's are summed over the row."""

    def __init__(self, task: IntentSlots | NextWord, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.tables = nn.ParameterDict(
            {
                output.name: torch.randn(task.vocabulary.size, output.classes, generator=draw)
                for output in task.outputs
            }
        )
        self.per_token = {output.name: output.per_token for output in task.outputs}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        inside = torch.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
        logits = {}
        for name, table in self.tables.items():
            each = table[batch["tokens"]]
            logits[name] = each if self.per_token[name] else (each * inside[..., None]).sum(1)
        return logits


def slow_intent_row(task: IntentSlots, examples: Examples, row: int) -> tuple[list[int], list[int]]:
    """Pieces and tags of one row, word by word."""
    pieces, tags = [], []
    for word, tag in zip(words_of(examples, row), tags_of(examples, row), strict=True):
        for position, piece in enumerate(task.vocabulary.of(WORDS[word])):  # type: ignore[attr-defined]
            pieces.append(piece)
            tags.append(tag if position == 0 else -100)
    return pieces[: task.max_length], tags[: task.max_length]


def slow_text(task: NextWord, examples: Examples, row: int) -> tuple[list[int], list[int]]:
    """Inputs and targets of one row, word by word."""
    text = [BOS]
    for word in words_of(examples, row):
        text += task.vocabulary.of(WORDS[word])  # type: ignore[attr-defined]
    text.append(EOS)
    return text[:-1][: task.max_length], text[1:][: task.max_length]


some_examples = st.builds(
    random_examples, st.integers(0, 10**6), st.integers(0, 12), st.integers(0, 8)
)


@settings(max_examples=60, deadline=None)
@given(some_examples, st.integers(1, 4), st.integers(1, 20))
def test_intent_slots_collate_equals_a_loop_over_words(
    examples: Examples, most: int, max_length: int
) -> None:
    task = intent_slots(TinyVocabulary(most), max_length)
    batch = task.collate(examples)
    rows = [slow_intent_row(task, examples, row) for row in range(len(examples))]
    width = max([1] + [len(pieces) for pieces, _ in rows])
    assert batch["tokens"].shape == batch["slots"].shape == (len(examples), width)
    assert batch["lengths"].tolist() == [len(pieces) for pieces, _ in rows]
    assert batch["intent"].tolist() == examples.intent.tolist()  # type: ignore[union-attr]
    for row, (pieces, tags) in enumerate(rows):
        rest = width - len(pieces)
        assert batch["tokens"][row].tolist() == pieces + [PAD] * rest
        assert batch["slots"][row].tolist() == tags + [-100] * rest
    assert all(values.dtype == torch.int64 for values in batch.values())


@settings(max_examples=60, deadline=None)
@given(some_examples, st.integers(1, 4), st.integers(1, 20))
def test_next_word_collate_equals_a_loop_over_words(
    examples: Examples, most: int, max_length: int
) -> None:
    task = next_word(TinyVocabulary(most), max_length)
    batch = task.collate(examples)
    rows = [slow_text(task, examples, row) for row in range(len(examples))]
    width = max([1] + [len(inputs) for inputs, _ in rows])
    assert batch["tokens"].shape == batch["targets"].shape == (len(examples), width)
    assert batch["lengths"].tolist() == [len(inputs) for inputs, _ in rows]
    for row, (inputs, targets) in enumerate(rows):
        rest = width - len(inputs)
        assert batch["tokens"][row].tolist() == inputs + [PAD] * rest
        assert batch["targets"][row].tolist() == targets + [-100] * rest
    assert all(values.dtype == torch.int64 for values in batch.values())


def slow_intent_loss(task: IntentSlots, model: ByToken, examples: Examples, row: int) -> float:
    pieces, tags = slow_intent_row(task, examples, row)
    if not pieces:
        return 0.0
    intent = model.tables["intent"][pieces].sum(0)
    assert examples.intent is not None
    loss = F.cross_entropy(intent, torch.tensor(int(examples.intent[row]))).item()
    tagged = [
        F.cross_entropy(model.tables["slots"][piece], torch.tensor(tag)).item()
        for piece, tag in zip(pieces, tags, strict=True)
        if tag != -100
    ]
    return loss + sum(tagged) / len(tagged)


def slow_text_losses(task: NextWord, model: ByToken, examples: Examples, row: int) -> list[float]:
    return [
        F.cross_entropy(model.tables["words"][piece], torch.tensor(target)).item()
        for piece, target in zip(*slow_text(task, examples, row), strict=True)
    ]


def test_intent_slots_losses_equal_a_loop_over_tokens() -> None:
    examples, task = random_examples(), intent_slots(TinyVocabulary())
    model = ByToken(task)
    expected = [slow_intent_loss(task, model, examples, row) for row in range(len(examples))]
    losses = task.losses(model, task.collate(examples))
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_next_word_losses_equal_a_loop_over_tokens() -> None:
    examples, task = random_examples(), next_word(TinyVocabulary())
    model = ByToken(task)
    rows = [slow_text_losses(task, model, examples, row) for row in range(len(examples))]
    losses = task.losses(model, task.collate(examples))
    assert losses.tolist() == pytest.approx([np.mean(row) for row in rows], abs=1e-5)


@both_tasks
def test_rows_of_length_zero_lose_nothing_however_they_are_filled(name: str) -> None:
    task = either(name)
    model = ByToken(task)
    real = task.collate(random_examples(count=5, longest=4))
    for filler in (real, {key: torch.zeros_like(values) for key, values in real.items()}):
        batch = {key: torch.cat([real[key], filler[key]]) for key in real}
        batch["lengths"][5:] = 0
        losses = task.losses(model, batch)
        assert losses[5:].tolist() == [0.0] * 5
        torch.testing.assert_close(losses[:5], task.losses(model, real))
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        alone = torch.autograd.grad(task.losses(model, real).sum(), list(model.parameters()))
        torch.testing.assert_close(gradients, alone)


def slow_intent_metrics(task: IntentSlots, model: ByToken, examples: Examples) -> dict[str, float]:
    losses, right, exact, true_tags, guessed_tags = [], [], [], [], []
    for row in range(len(examples)):
        pieces, tags = slow_intent_row(task, examples, row)
        intent = int(model.tables["intent"][pieces].sum(0).argmax())
        guess = [
            int(model.tables["slots"][piece].argmax())
            for piece, tag in zip(pieces, tags, strict=True)
            if tag != -100
        ]
        guess += [0] * (len(words_of(examples, row)) - len(guess))
        assert examples.intent is not None
        losses.append(slow_intent_loss(task, model, examples, row))
        right.append(intent == examples.intent[row])
        exact.append(right[-1] and guess == tags_of(examples, row))
        true_tags.append([SCHEMA.slots[tag] for tag in tags_of(examples, row)])
        guessed_tags.append([SCHEMA.slots[tag] for tag in guess])
    return {
        "loss": float(np.mean(losses)),
        "accuracy": float(np.mean(right)),
        "slot_f1": float(f1_score(true_tags, guessed_tags)),
        "exact_match": float(np.mean(exact)),
    }


@pytest.mark.parametrize(("most", "max_length"), [(1, 9), (3, 9), (3, 4)])
def test_intent_slots_metrics_equal_seqeval_and_a_loop(most: int, max_length: int) -> None:
    examples, task = (
        random_examples(count=200, longest=3),
        intent_slots(TinyVocabulary(most), max_length),
    )
    model = ByToken(task)
    metrics = task.evaluate(model, examples)
    assert metrics == pytest.approx(slow_intent_metrics(task, model, examples), abs=1e-5)
    assert 0 < metrics["slot_f1"] < 1 and 0 < metrics["exact_match"] < metrics["accuracy"]
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(("most", "max_length"), [(1, 9), (3, 9), (3, 4)])
def test_next_word_metrics_equal_a_loop(most: int, max_length: int) -> None:
    examples, task = random_examples(), next_word(TinyVocabulary(most), max_length)
    model = ByToken(task)
    losses, ranks = [], []
    for row in range(len(examples)):
        losses.append(slow_text_losses(task, model, examples, row))
        for piece, target in zip(*slow_text(task, examples, row), strict=True):
            if target not in (UNK, EOS):
                guesses = model.tables["words"][piece].argsort(descending=True).tolist()
                ranks.append(guesses.index(target))
    metrics = task.evaluate(model, examples)
    tokens = sum(len(row) for row in losses)
    assert metrics == pytest.approx(
        {
            "loss": float(np.mean([np.mean(row) for row in losses])),
            "perplexity": math.exp(sum(map(sum, losses)) / tokens),
            "top1_accuracy": float(np.mean([rank < 1 for rank in ranks])),
            "top3_accuracy": float(np.mean([rank < 3 for rank in ranks])),
            "tokens": tokens,
        },
        rel=1e-5,
    )
    assert all(type(value) is float for value in metrics.values())


def test_next_word_metrics_equal_torchmetrics() -> None:
    examples, task = random_examples(), next_word(TinyVocabulary())
    model, batch = ByToken(task), task.collate(examples)
    logits, targets = model(batch)["words"].detach(), batch["targets"]
    words = (targets != UNK) & (targets != EOS) & (targets != -100)
    metrics = task.evaluate(model, examples)
    expected = perplexity(logits, targets, ignore_index=-100).item()
    assert metrics["perplexity"] == pytest.approx(expected, rel=1e-4)
    for count in (1, 3):
        accuracy = multiclass_accuracy(
            logits[words], targets[words], num_classes=40, top_k=count, average="micro"
        )
        assert metrics[f"top{count}_accuracy"] == pytest.approx(accuracy.item())


@both_tasks
def test_metrics_do_not_depend_on_batch_size_or_order(name: str) -> None:
    task = either(name)
    model, examples = ByToken(task), random_examples()
    metrics = task.evaluate(model, examples)
    for size in (1, 7, 60):
        assert task.evaluate(model, examples, batch_size=size) == pytest.approx(metrics, rel=1e-6)
    shuffled = examples.take(np.random.default_rng(0).permutation(len(examples)))
    assert task.evaluate(model, shuffled) == pytest.approx(metrics, rel=1e-6)
    assert task.evaluate(model, examples) == metrics


def test_evaluation_batches_bound_the_logits_in_memory() -> None:
    task = next_word(TinyVocabulary(size=2**20))
    batches = list(task.evaluation_batches(random_examples(), 1024))
    assert max(batch["tokens"].numel() for _, batch in batches) * 2**20 <= 2**24
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(60))


@both_tasks
def test_evaluation_leaves_the_model_as_it_was(name: str) -> None:
    task = either(name)
    model = ByToken(task).train()
    seen: list[bool] = []
    model.register_forward_hook(lambda *call: seen.append(model.training))
    task.evaluate(model, random_examples())
    assert model.training and seen == [False] * len(seen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unigram_perplexity_equals_a_loop_over_texts() -> None:
    task = next_word(TinyVocabulary())
    train, test = random_examples(1), random_examples(2)
    counts = Counter(
        target for row in range(len(train)) for target in slow_text(task, train, row)[1]
    )
    total = sum(counts.values()) + 38  # every id but <pad> and <bos> once more
    targets = [target for row in range(len(test)) for target in slow_text(task, test, row)[1]]
    mean = np.mean([-math.log((counts[target] + 1) / total) for target in targets])
    assert task.unigram_perplexity(train, test) == pytest.approx(math.exp(mean))


def test_a_unigram_model_that_saw_nothing_is_as_perplexed_as_there_are_words() -> None:
    nothing = random_examples().take(np.array([], dtype=np.int64))
    task = next_word(TinyVocabulary(has_unknown=False))
    assert task.unigram_perplexity(nothing, random_examples(2)) == pytest.approx(37)


@dataclass
class TinyPopulation:
    name: str
    schema: Schema


def test_a_population_without_intents_is_refused_for_intent_slots() -> None:
    task = intent_slots(TinyVocabulary())
    task.check(TinyPopulation("assistant", SCHEMA))
    task.check(TinyPopulation("assistant", replace(SCHEMA, slots=())))
    with pytest.raises(DataError, match="population=plays has no intents; use task=next_word"):
        task.check(TinyPopulation("plays", Schema()))
    next_word(TinyVocabulary()).check(TinyPopulation("plays", Schema()))


def test_without_slots_intent_slots_is_plain_classification() -> None:
    task = intent_slots(TinyVocabulary(), schema=replace(SCHEMA, slots=()))
    examples = replace(random_examples(), slots=None)
    model, batch = ByToken(task), task.collate(examples)
    assert set(batch) == {"tokens", "lengths", "intent"}
    expected = F.cross_entropy(model(batch)["intent"], batch["intent"], reduction="none")
    torch.testing.assert_close(task.losses(model, batch), expected * (batch["lengths"] > 0))
    assert set(task.evaluate(model, examples)) == {"loss", "accuracy"}


def test_bad_input_is_refused_in_one_line() -> None:
    task, examples = intent_slots(TinyVocabulary()), random_examples()
    with pytest.raises(DataError, match="examples without `intent`"):
        task.collate(replace(examples, intent=None))
    with pytest.raises(DataError, match="examples without `slots`"):
        task.collate(replace(examples, slots=None))
    with pytest.raises(DataError, match="nothing to evaluate on: 0 examples"):
        task.evaluate(ByToken(task), examples.take(np.array([], dtype=np.int64)))
    with pytest.raises(ConfigError, match="task.max_length=0 must be at least 1"):
        intent_slots(TinyVocabulary(), max_length=0)
    with pytest.raises(ConfigError, match="task=slots does not exist: choose one of intent_slots"):
        make_task("slots", vocabulary=TinyVocabulary(), schema=SCHEMA, words=WORDS, max_length=9)  # type: ignore[arg-type]
