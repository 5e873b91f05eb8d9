"""The population of JSONL files, plain or gzipped: small ones in memory, others indexed.

See `corpus_population` for what a device is, `corpus_build` for the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sottovoce.simulations.corpus_build import load_corpus
from sottovoce.simulations.corpus_population import CorpusPopulation, View, checked_settings
from sottovoce.simulations.row_files import JsonLines


@dataclass
class JsonlConfig:
    """Settings of a population read from JSONL (`population=jsonl population.path=FILE`)."""

    name: str = "jsonl"
    path: str = "???"  # mandatory; several files are separated by commas
    test_path: str | None = None
    users: str = "auto"
    devices: int = 500  # assigned devices only, held-out ones included
    max_examples_per_round: int = 32
    seed: int = 0
    alpha: float = 1.0
    mu: float = 2.3
    sigma: float = 1.3
    held_out_fraction: float = 0.1
    max_held_out_examples: int = 100  # evaluated examples of one held-out device
    labels: str | None = None
    index: str | None = "auto"  # null: always in memory; a folder: always indexed, there


class JsonlPopulation(CorpusPopulation):
    """Devices from JSONL files.

    `path`: a file, several separated by commas, or a list. `test_path`: likewise, held-out
    examples. `users`: `natural` (one device per `user_id`), `assigned` (`devices` of them, label-
    Dirichlet `alpha` x log-normal activity `mu`, `sigma`), `auto` (natural where every line has a
    user). `held_out_fraction` of the devices never train; at most `max_held_out_examples` of each
    are evaluated. `labels`: a JSON file with the public label sets `intents` and `slots`; without
    it they are read from the data and treated as public. `index`: None to hold everything in
    memory, a folder to keep an index in, `auto` for an index in the cache folder where the files
    are large (`corpus_build.LARGE`). `progress`: whether building it shows a bar on a terminal.
    Raises DataError, ConfigError.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        test_path: str | Path | Sequence[str | Path] | None = None,
        *,
        name: str = "jsonl",
        users: str = "auto",
        devices: int = 500,
        alpha: float = 1.0,
        mu: float = 2.3,
        sigma: float = 1.3,
        held_out_fraction: float = 0.1,
        max_held_out_examples: int = 100,
        labels: str | Path | None = None,
        seed: int = 0,
        index: str | Path | None = "auto",
        progress: bool = False,
    ) -> None:
        settings = checked_settings(
            path, test_path, None, max_held_out_examples, users=users, devices=devices,
            alpha=alpha, mu=mu, sigma=sigma, held_out_fraction=held_out_fraction, seed=seed,
        )
        corpus = load_corpus(settings, JsonLines, index, progress)
        labels = None if labels is None else str(labels)
        super().__init__(corpus, View(name, settings, labels, max_held_out_examples))
