"""The keyed randomness of a group of devices: each one's own noise and coins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.cohort import Draw
from sottovoce.client.coins import HIGH, LOW, example_coins
from sottovoce.client.fleet import LocalTraining
from sottovoce.client.groups import DeviceNoise, GroupData
from sottovoce.privacy.mechanisms.noise import NoiseSource
from sottovoce.privacy.mechanisms.noise_streams import KEY_BYTES, NoiseStreams


class GroupCoins:
    """Randomness of the devices behind `draws` in one round.

    `numbers`: (examples,) of each device, sorted, in the order of the group's batch rows.
    """

    def __init__(
        self,
        source: NoiseSource,
        server_round: int,
        draws: list[Draw],
        numbers: list[NDArray[np.int64]],
    ) -> None:
        self.source, self.round, self.draws, self.numbers = source, server_round, draws, numbers

    def toss(self, data: GroupData, training: LocalTraining, *, dropout: bool) -> DeviceNoise:
        """Give `data` the coins of its examples; the generators of what its devices add."""
        if dropout:
            data.seeds = self.of_examples("dropout", LOW, HIGH)
        noise, example = DeviceNoise(), training.example
        if example is None:
            return noise
        if example.mode == "micro_batch":
            data.micro_batches = self.micro_batches(int(example.units(training.plan.batch_size)))
        if example.noise_multiplier > 0:
            noise.sums = self.streams("device noise")
        if example.threshold == "quantile":
            noise.counts = self.of_devices("device counts")
        return noise

    def of_devices(self, purpose: str) -> list[np.random.Generator]:
        """A generator for each device."""
        return [self.source.generator(purpose, self.round, d.device) for d in self.draws]

    def streams(self, purpose: str) -> NoiseStreams:
        """A stream of normals for each device."""
        devices = (draw.device for draw in self.draws)
        return NoiseStreams(
            self.source.digests(purpose, self.round, numbers=devices, size=KEY_BYTES)
        )

    def of_examples(self, purpose: str, low: int, high: int) -> NDArray[np.int64]:
        """(batch rows, steps) integers from `low` to `high`; 0 where nobody is."""
        rows = sum(len(numbers) for numbers in self.numbers)
        steps = max(len(draw.steps) for draw in self.draws)
        found = np.zeros((rows + 1, steps), dtype=np.int64)
        start = 0
        for generator, numbers, draw in zip(
            self.of_devices(purpose), self.numbers, self.draws, strict=True
        ):
            own = example_coins(generator, numbers, len(draw.steps), low, high)
            found[start : start + len(numbers), : len(draw.steps)] = own
            start += len(numbers)
        return found

    def micro_batches(self, count: int) -> NDArray[np.int64]:
        """(batch rows, steps) micro-batch of each example, `count` of them for each device."""
        found = self.of_examples("micro-batches", 0, count - 1)
        owners = np.repeat(np.arange(len(self.draws)), [len(n) for n in self.numbers])
        found[:-1] += owners[:, None] * count
        found[-1] = -1
        return found
