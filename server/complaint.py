"""One line for a person out of any error: what is wrong, with which value, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedValueType,
    ValidationError,
)

from sottovoce.client.errors import SottovoceError

INTERNAL = "base_"  # names of the dataclasses in the ConfigStore, not for people
UNKNOWN_KEY = re.compile(r"(?:Could not override|Could not append to config\.?|Key) '([^']+)'")


def complaint(error: Exception, keys: Callable[[], Sequence[str]]) -> str:
    """What to print for `error`. `keys`: gives every setting there is, dotted."""
    for link in sorted(_chain(error), key=lambda link: not isinstance(link, SottovoceError)):
        line = _known(link, keys)
        if line is not None:
            return _on_one_line(line)
    kind = type(error).__name__
    return _on_one_line(f"{kind}: {error} (HYDRA_FULL_ERROR=1 shows the traceback)")


def flat_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, groups included."""
    for key in node:
        path = prefix + str(key)
        yield path
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from flat_keys(child, f"{path}.")


def similar(word: str, choices: Iterable[str]) -> str:
    """" (did you mean …?)", or nothing where nothing is close.

    A key is compared as a whole and by its last part, so that `epsilon` finds
    `privacy.device.epsilon`.
    """
    scores = {choice: _likeness(word, choice) for choice in choices}
    best = max(scores.values(), default=0.0)
    found = [choice for choice, score in scores.items() if score >= max(0.65, best - 0.05)]
    found.sort(key=lambda choice: -scores[choice])
    return f" (did you mean {' or '.join(found[:3])}?)" if found else ""


def _likeness(word: str, choice: str) -> float:
    whole = SequenceMatcher(None, word, choice).ratio()
    last = SequenceMatcher(None, word.rpartition(".")[2], choice.rpartition(".")[2]).ratio()
    return max(whole, 0.95 * last)


def _known(error: BaseException, keys: Callable[[], Sequence[str]]) -> str | None:
    if isinstance(error, SottovoceError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _unparsable(error)
    if isinstance(error, MissingConfigException):
        return _no_such_choice(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: give {error.full_key}=VALUE"
    if isinstance(error, (ValidationError, UnsupportedValueType)):
        return f"{error.full_key}: {_first_line(error)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition(error, keys)
    if isinstance(error, OSError):
        where = f": {error.filename!s}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The causes of `error` from the first one up, then itself: the first of ours says most, else
    the first of all."""
    links = [error]
    while (cause := links[-1].__cause__) is not None:
        links.append(cause)
    yield from reversed(links)


def _composition(error: Exception, keys: Callable[[], Sequence[str]]) -> str:
    found = UNKNOWN_KEY.search(str(error))
    if found is None:
        return _first_line(error)
    name = getattr(error, "full_key", None) or found[1]
    return f"{name} is no setting{similar(name, keys())}: --cfg job lists them all"


def _no_such_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    choices = [choice for choice in error.options or () if not choice.startswith(INTERNAL)]
    if not group or not choices:
        return _first_line(error)
    return f"{group}={name} does not exist{similar(name, choices)}: choose {', '.join(choices)}"


def _unparsable(error: OverrideParseException) -> str:
    if "=" not in error.override:
        return f"{error.override}: settings are written key=value"
    key, _, value = error.override.partition("=")
    return f"""{error.override}: cannot be read; quote the value, as in '{key}="{value}"'"""


def _first_line(error: BaseException) -> str:
    text = str(getattr(error, "msg", None) or error).strip() or type(error).__name__
    return text.splitlines()[0].replace("is not Optional", "cannot be null")


def _on_one_line(text: str) -> str:
    return " ".join(text.split())

