"""A small cohort in the place of a large one: what utility a larger deployment would have.

A round's sum is blown up by (noise cohort / cohort), as if each sampled device stood for that many
alike; noise, divisor and accounting are those of the large cohort. On the mean, the noise is then
what the large cohort's would be, at the cost of simulating the small one. De facto standard: the
"noise cohort size" of Granqvist et al. 2024 (pfl-research), arXiv:2404.06430.

Such a run is a *projection*: the model it trained does not have the epsilon it states. A model
trained with that noise on that large a cohort would.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sottovoce.client.fleet import FleetReply
from sottovoce.strategies.sampling import Sampler

_STREAM = 0x70F1EC7


class ProjectedSampler(Sampler):
    """A sampler of large cohorts of which every device stays with probability `share`.

    All that is public about it, rates included, is that of `whole`, the large cohorts' sampler.

    *Guarantee*: none for this run. The rates are those at which the large cohort is accounted.
    """

    def __init__(self, whole: Sampler, share: float) -> None:
        self.whole, self.share = whole, share
        self.sampling = whole.sampling  # type: ignore[misc]
        self.reported = whole.reported
        super().__init__(
            whole.devices, whole.rates, whole.expected_cohort_size, whole.counts, whole.seed
        )

    def sample(self, round: int, attempt: int = 0) -> NDArray[np.int64]:
        """Ids of the devices that are simulated, sorted."""
        drawn = self.whole.sample(round, attempt)
        seeds = np.random.SeedSequence((_STREAM, self.whole.seed, round))
        return drawn[np.random.default_rng(seeds).random(len(drawn)) < self.share]

    def describe(self) -> dict[str, Any]:
        return self.whole.describe()


def projected(total: FleetReply, factor: float) -> FleetReply:
    """The sums and totals of `factor` times the devices; `total` itself where that is 1."""
    if factor == 1:
        return total
    return replace(
        total,
        sums={name: tensor * factor for name, tensor in total.sums.items()},
        devices_by_level={k: round(factor * n) for k, n in total.devices_by_level.items()},
        totals={name: factor * value for name, value in total.totals.items()},
    )
