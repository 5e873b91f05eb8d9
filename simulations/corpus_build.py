"""A corpus in memory or in an index, which is built where there is none yet.

The files are read once, in bounded memory, and a build that was killed goes on. All work happens in
`NAME.partial`: files are read into chunks (`corpus_scan`), words and users numbered
(`corpus_numbers`), devices chosen (`corpus_devices`), chunks sorted and merged by device
(`corpus_arrange`). The folder gets its name when it is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sottovoce.client.errors import ConfigError, DataError, SottovoceError
from sottovoce.simulations.corpus import Corpus, CorpusSettings
from sottovoce.simulations.corpus_index import HEADER, open_corpus
from sottovoce.simulations.corpus_key import build_lock, cache_folder, index_name
from sottovoce.simulations.corpus_memory import read_corpus
from sottovoce.simulations.corpus_progress import IndexProgress
from sottovoce.simulations.corpus_scan import BuildLimits
from sottovoce.simulations.corpus_stages import JOURNAL, Build
from sottovoce.simulations.flat_arrays import sync_folder
from sottovoce.simulations.row_files import RowFormat

LARGE = 64 << 20  # bytes of files that `index=auto` does not hold in memory


def load_corpus(
    settings: CorpusSettings,
    format: RowFormat,
    index: str | Path | None = "auto",
    progress: bool = False,
) -> Corpus:
    """The corpus of some files. `index`: None, `auto` or the folder that indexes are kept in.

    Raises DataError for malformed files or a damaged index, ConfigError for an impossible folder.
    """
    if index is None or (index == "auto" and _bytes(settings) <= LARGE):
        return read_corpus(settings, format)
    if not str(index).strip():
        raise ConfigError("population.index is empty: set it to a folder, auto or null")
    root = cache_folder() if index == "auto" else Path(index)
    return indexed_corpus(settings, format, root, progress)


def indexed_corpus(
    settings: CorpusSettings,
    format: RowFormat,
    root: Path,
    progress: bool = False,
    limits: BuildLimits | None = None,
) -> Corpus:
    """The corpus of the files' index in `root`, which is built first where it is missing.

    One process builds, others wait for it. Raises DataError.
    """
    folder = root / index_name(settings)
    if not (folder / HEADER).exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _build(settings, format, folder, progress, limits or BuildLimits())
        except OSError as error:
            raise DataError(
                f"the index {folder} cannot be written ({error.strerror}): free the disk or set"
                " population.index to another folder; what was done is kept there"
            ) from None
    return open_corpus(folder)


def _build(
    settings: CorpusSettings, format: RowFormat, folder: Path, progress: bool, limits: BuildLimits
) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    with IndexProgress(progress) as bar, build_lock(
        folder.with_name(f"{folder.name}.lock"),
        lambda other: bar.message(f"waiting for {other}, which builds the index {folder}"),
    ):
        if (folder / HEADER).exists():
            return
        try:
            if not (partial / HEADER).exists():
                Build(settings, format, partial, limits, bar).run()
            if index_name(settings) != folder.name:
                raise DataError(
                    f"{settings.paths[0]} or a file beside it changed while it was read: run again"
                )
        except SottovoceError:  # the files must change, and a changed file has another index
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (partial / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # what is left of one without a header
        partial.rename(folder)
        sync_folder(folder.parent)


def _bytes(settings: CorpusSettings) -> int:
    """Bytes of all files; those that are missing are named by the reader."""
    files = [*settings.paths, *settings.test_paths]
    return sum(path.stat().st_size for path in files if path.is_file())
