"""Devices with intents but no slots, bag-of-words models, and both ways to train them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sottovoce.client.bag_trainer import make_bag_trainer
from sottovoce.client.batches import BatchPlan
from sottovoce.client.cohort import Chunk, chunks, cut_group, draw_cohort
from sottovoce.client.examples import Examples, Schema, gather_ranges
from sottovoce.client.fleet import ExampleClipping, LocalTraining
from sottovoce.client.groups import DeviceNoise, LocalUpdates
from sottovoce.client.round_sum import RoundSum
from sottovoce.client.tasks import Batch, IntentSlots, Logits
from sottovoce.client.training import GroupTrainer
from sottovoce.client.vocabulary import HashVocabulary
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.noise_streams import KEY_BYTES, NoiseStreams, _padded
from sottovoce.simulations.population import Population

INTENTS, WORDS, LONGEST = 5, 30, 7
CLIPPED = ExampleClipping(clip_norm=0.3, noise_multiplier=0.0)
NOISED = ExampleClipping(clip_norm=0.3, noise_multiplier=0.7)
AUTOMATIC = ExampleClipping(clip_norm=0.3, noise_multiplier=0.7, threshold="automatic")


class Sayings(Population):
    """`devices` that say a few words of few, often the same one twice; `even`: always `LONGEST`."""

    name, public_words, held_out = "sayings", True, 3

    def __init__(self, devices: int = 40, *, even: bool = False, seed: int = 1) -> None:
        random = np.random.default_rng(seed)
        everyone = devices + self.held_out
        counts = random.integers(1, 14, everyone)
        rows = int(counts.sum())
        lengths = np.full(rows, LONGEST) if even else random.integers(1, LONGEST + 1, rows)
        tokens = (WORDS * random.random(int(lengths.sum())) ** 2).astype(np.int32)
        self._all = Examples(
            tokens, np.append(0, np.cumsum(lengths)), np.append(0, np.cumsum(counts)),
            random.integers(0, INTENTS, rows).astype(np.int32),
        )
        self.activity = counts[:devices].astype(np.uint8)
        self.words = [f"w{number}" for number in range(WORDS)]
        self.schema = Schema(intents=tuple("abcde"))

    def examples(
        self, devices: NDArray[np.int64], indices: Sequence[NDArray[np.int64]] | None = None
    ) -> Examples:
        own = self._all.device_offsets
        if indices is None:
            rows, bounds = gather_ranges(own, devices)
        else:
            rows = np.concatenate([own[d] + some for d, some in zip(devices, indices, strict=True)])
            bounds = np.append(0, np.cumsum([len(some) for some in indices]))
        found = self._all.take(rows)
        return Examples(found.tokens, found.offsets, bounds, found.intent)

    def held_out_devices(self, limit: int | None = None) -> Examples:
        return self.examples(np.arange(len(self), len(self) + min(self.held_out, limit or 3)))

    def held_out_examples(self, limit: int | None = None) -> Examples | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"source": self.name, "devices": len(self)}


class Bag(nn.Module):
    """A bag with `widths` of hidden layers."""

    sparse_inputs = {"emb": "tokens"}

    def __init__(
        self, widths: Sequence[int] = (9,), mode: str = "mean", padding: int | None = 0,
        bias: bool = True, width: int = 6, vocabulary: int = 44, seed: int = 3,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.emb = nn.EmbeddingBag(vocabulary, width, mode=mode, padding_idx=padding)
            sizes = [width, *widths, INTENTS]
            self.linear = nn.ModuleList(
                nn.Linear(a, b, bias=bias) for a, b in zip(sizes, sizes[1:], strict=False)
            )

    def forward(self, batch: Batch) -> Logits:
        features = self.emb(batch["tokens"])
        for layer in self.linear[:-1]:
            features = F.relu(layer(features))
        return {"intent": self.linear[-1](features)}


class Told(NoiseStreams):
    """Streams that can tell once more what was drawn of them, however it is asked for then."""

    def __init__(self, streams: int) -> None:
        self._all_keys = [(k + 1).to_bytes(KEY_BYTES, "big") for k in range(streams)]
        super().__init__(self._all_keys)

    def handed_over(
        self, sizes: NDArray[np.int64], first: int = 0
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        self._sizes = sizes
        return super().handed_over(sizes, first)

    def again(self) -> Still:
        drawn = NoiseStreams(self._all_keys).flat(self._sizes.tolist()).numpy()
        return Still(np.split(drawn, np.cumsum(self._sizes)[:-1]))


class Still(NoiseStreams):
    """What each stream draws, one after another."""

    def __init__(self, draws: list[NDArray[np.float32]]) -> None:
        self._draws, self._at = draws, [0] * len(draws)

    def __len__(self) -> int:
        return len(self._draws)

    def flat(self, counts: Sequence[int], deviation: float = 1.0, first: int = 0) -> Tensor:
        parts = [np.zeros(0, dtype=np.float32)]
        for k, count in enumerate(counts, first):
            parts.append(self._draws[k][self._at[k] : self._at[k] + count])
            self._at[k] += count
            assert len(parts[-1]) == count, "more is drawn than the kernel drew"
        return torch.from_numpy(np.concatenate(parts) * np.float32(deviation))

    def draw(self, counts: Sequence[int], deviation: float | Tensor = 1.0) -> Tensor:
        assert not isinstance(deviation, Tensor)
        return _padded(self.flat(counts, deviation), np.cumsum([0, *counts]))


def task_of(population: Population) -> IntentSlots:
    return IntentSlots(HashVocabulary(40), population.schema, population.words, max_length=LONGEST)


def training_of(
    example: ExampleClipping | None, clip: float | None = None, rate: float = 0.5, epochs: int = 2
) -> LocalTraining:
    plan = BatchPlan(4, local_epochs=epochs, max_examples=10, poisson=example is not None)
    return LocalTraining(rate, plan, example, clip)


def chunk_of(
    population: Population, training: LocalTraining, devices: NDArray[np.int64], number: int = 1
) -> Chunk:
    source = NoiseSource.from_seed(5)
    draws = draw_cohort(population, devices, training.plan, number, source)
    (found,) = chunks(population, task_of(population), draws, len(draws))
    return found


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def together(
    model: nn.Module, population: Population, training: LocalTraining, chunk: Chunk,
    parameters: dict[str, Tensor] | None = None, streams: NoiseStreams | None = None,
) -> tuple[RoundSum, LocalUpdates]:
    """All devices of a chunk by `GroupTrainer`."""
    trainer = GroupTrainer(model, task_of(population), training, len(chunk.draws), lends=True)
    total = RoundSum(model, training, 1)
    vocabulary = len(dict(model.named_parameters())[trainer.table]) if trainer.table else 0
    data = cut_group(chunk, 0, len(chunk.draws), trainer.table_input, vocabulary)
    updates = trainer.train(parameters or parameters_of(model), data, 1, DeviceNoise(streams))
    total.add(chunk.draws, data, updates)
    return total, updates


def natively(
    model: nn.Module, population: Population, training: LocalTraining, chunk: Chunk,
    parameters: dict[str, Tensor] | None = None, streams: NoiseStreams | None = None,
    group: int = 0,
) -> tuple[RoundSum, list[LocalUpdates]]:
    """The same by `BagTrainer`, in groups of `group`."""
    trainer = make_bag_trainer(model, task_of(population), training)
    assert trainer is not None
    total, all_updates = RoundSum(model, training, 1), []
    count = len(chunk.draws)
    given = streams if streams is not None else Told(count)
    noised = training.step_deviation > 0
    assert group in (0, count) or not noised
    for first in range(0, count, group or count):
        updates = trainer.train(
            parameters or parameters_of(model), chunk, first, group or count,
            given if noised else None, total,
        )
        total.note(chunk.draws[first : first + (group or count)], updates)
        all_updates.append(updates)
    return total, all_updates


def both(
    model: nn.Module, population: Population, training: LocalTraining, chunk: Chunk,
    parameters: dict[str, Tensor] | None = None,
) -> tuple[tuple[RoundSum, LocalUpdates], tuple[RoundSum, LocalUpdates]]:
    """By `GroupTrainer` and by `BagTrainer`, with the same noise."""
    told = Told(len(chunk.draws)) if training.step_deviation > 0 else None
    fast, (found,) = natively(model, population, training, chunk, parameters, told)
    again = None if told is None else told.again()
    return together(model, population, training, chunk, parameters, again), (fast, found)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Equal to `tolerance` of the largest number."""
    scale = max(float(expected.abs().max()), 1e-9)
    assert float((found - expected).abs().max()) <= tolerance * scale
