"""The population of Parquet and Arrow files: JSONL's, read from columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sottovoce.client.errors import ConfigError
from sottovoce.simulations.corpus_build import load_corpus
from sottovoce.simulations.corpus_population import CorpusPopulation, View, checked_settings
from sottovoce.simulations.jsonl import JsonlConfig
from sottovoce.simulations.parquet_reader import FIELDS, table_format


@dataclass
class ColumnsConfig:
    """Name of the column that holds each field."""

    user_id: str = "user_id"
    text: str = "text"
    tokens: str = "tokens"
    intent: str = "intent"
    slots: str = "slots"


@dataclass
class ParquetConfig(JsonlConfig):
    """Settings of a population read from tables (`population=parquet population.path=FILE`)."""

    name: str = "parquet"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


class ParquetPopulation(CorpusPopulation):
    """Devices from Parquet or Arrow files (IPC file, feather, IPC stream).

    `columns`: name of the column of each field (`user_id`, `text`, `tokens`, `intent`, `slots`)
    where it is another. All else as in `JsonlPopulation`; the same rows give the same population.
    Raises DataError, ConfigError (also where pyarrow is missing).
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        test_path: str | Path | Sequence[str | Path] | None = None,
        *,
        name: str = "parquet",
        columns: Mapping[str, str] | None = None,
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
        for given in columns or ():
            if given not in FIELDS:
                raise ConfigError(
                    f"columns.{given} is no field: set population.columns for {', '.join(FIELDS)}"
                )
        named = {each: each for each in FIELDS} | dict(columns or {})
        settings = checked_settings(
            path, test_path, tuple(named.items()), max_held_out_examples, users=users,
            devices=devices, alpha=alpha, mu=mu, sigma=sigma,
            held_out_fraction=held_out_fraction, seed=seed,
        )
        corpus = load_corpus(settings, table_format(named), index, progress)
        labels = None if labels is None else str(labels)
        super().__init__(corpus, View(name, settings, labels, max_held_out_examples))
