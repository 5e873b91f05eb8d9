"""Poisson batches: every example enters every batch by its own coin.

This is the sampling that the accountant's amplification is proved for. Batches differ in size and
may be empty; an empty one is a step like any other. Shuffled batches of a fixed size are *not*
Poisson: ten shuffled epochs at noise multiplier 1 and rate 0.01 prove epsilon 17.9, not 1.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from sottovoce.privacy.optimizer.draws import Draws, Randomness

Collate = Callable[[list[Any]], Any]


class PoissonBatches:
    """Iterable over batches, each with every example by an independent coin of `sampling_rate`.

    `data`: a number of examples, whose batches are index tensors (n,) int64; a tuple of tensors
    with equal first dimensions, or a TensorDataset, whose batches are tuples of rows; or any
    dataset with `len` and indices, whose batches `collate` makes from a list of examples. `steps`:
    batches of one iteration; or `epochs`, of round(1 / sampling_rate) steps each; one epoch by
    default. Iterating again draws new coins. `generator`: source of the coins, the operating
    system's entropy by default; never torch's.

    An empty batch has the form of any other, with first dimensions of 0.

    *Guarantee*: exactly Poisson sampling at `sampling_rate`, independent from batch to batch.
    *Assumes*: the coins stay secret.

    Raises ValueError for impossible settings.
    """

    def __init__(
        self,
        data: int | tuple[Tensor, ...] | Sized,
        sampling_rate: float,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        generator: Randomness = None,
        collate: Collate = default_collate,
    ) -> None:
        if not 0 < sampling_rate <= 1:
            raise ValueError(f"sampling_rate={sampling_rate} must be above 0 and at most 1")
        if steps is not None and epochs is not None:
            raise ValueError(f"give steps={steps} or epochs={epochs}, not both")
        per_epoch = round(1 / sampling_rate)
        self.steps = per_epoch * (1 if epochs is None else epochs) if steps is None else steps
        self.data = data.tensors if isinstance(data, TensorDataset) else data
        self.sampling_rate, self.collate = sampling_rate, collate
        self.examples = _examples(self.data)
        self.generator = Draws(generator).at("poisson batches", 0)

    @property
    def expected_batch_size(self) -> float:
        return self.sampling_rate * self.examples

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for index in self.indices():
            yield self._batch(index)

    def indices(self) -> Iterator[Tensor]:
        """The batches as indices (n,) int64, in increasing order."""
        for _ in range(self.steps):
            heads = self.generator.random(self.examples) < self.sampling_rate
            yield torch.from_numpy(np.flatnonzero(heads))

    def _batch(self, index: Tensor) -> Any:
        if isinstance(self.data, int):
            return index
        if isinstance(self.data, tuple):
            return tuple(tensor[index.to(tensor.device)] for tensor in self.data)
        return collated(self.data, index.tolist(), self.collate)


def poisson_loader(loader: DataLoader[Any], generator: Randomness = None) -> DataLoader[Any]:
    """A loader like `loader`, workers and all, that draws Poisson batches of the same mean size.

    Its rate is 1 / len(loader), as Opacus has it. Raises ValueError for a dataset without length,
    for a loader without batches, and for a sampler that does not draw every example once.
    """
    if not isinstance(loader.dataset, Sized):
        raise ValueError("the data_loader's dataset has no length: Poisson sampling needs one")
    if loader.batch_size is None or not len(loader):
        raise ValueError(
            f"the data_loader has batch_size={loader.batch_size} and makes {len(loader)} batches: "
            "give it a batch_size between 1 and the number of examples"
        )
    sampler = loader.sampler
    every = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)
    )
    if not every:
        raise ValueError(
            f"the data_loader's {type(sampler).__name__} would be replaced by Poisson sampling of "
            "the whole dataset: cut the dataset itself (torch.utils.data.Subset) and drop it"
        )
    plan = PoissonBatches(
        len(loader.dataset), 1 / len(loader), steps=len(loader), generator=generator
    )
    return DataLoader(
        loader.dataset,
        batch_sampler=_Lists(plan),
        collate_fn=_Collate(loader.dataset, loader.collate_fn),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def collated(data: Any, index: list[int], collate: Collate) -> Any:
    """A batch of the examples at `index`; an empty one is cut from the form of a first example."""
    return collate([data[i] for i in index]) if index else emptied(collate([data[0]]))


def emptied(batch: Any) -> Any:
    """The batch with no example left in it: tensors (0, ...), lists without items."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, Mapping):
        return {key: emptied(value) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        inner = any(isinstance(value, Tensor | Mapping) for value in batch)
        parts = [emptied(value) for value in batch] if inner else []
        return type(batch)(parts) if isinstance(batch, list | tuple) else parts
    return batch


class _Lists:
    """Index batches as lists, which is what a DataLoader asks its datasets for."""

    def __init__(self, plan: PoissonBatches) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.plan.indices())


class _Collate:
    """A collate function that can make an empty batch; an object, so that workers can take it."""

    def __init__(self, data: Any, collate: Collate) -> None:
        self.data, self.collate = data, collate

    def __call__(self, examples: list[Any]) -> Any:
        return self.collate(examples) if examples else emptied(self.collate([self.data[0]]))


def _examples(data: Any) -> int:
    if isinstance(data, tuple):
        lengths = {len(tensor) for tensor in data}
        if len(lengths) != 1:
            raise ValueError(f"tensors have {sorted(lengths)} rows: all need the same number")
    count = data if isinstance(data, int) else len(data[0] if isinstance(data, tuple) else data)
    if count < 1:
        raise ValueError(f"{count} examples: there is nothing to sample")
    return count
