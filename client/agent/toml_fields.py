"""Keys of a TOML table, checked by name and type; what is wrong becomes one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from sottovoce.client.errors import ConfigError

Kinds = Mapping[str, type]
"""Type of each key; `list` stands for a list of strings."""

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def checked_fields(values: Mapping[str, Any], kinds: Kinds, table: str) -> dict[str, Any]:
    """`values`, with whole numbers as floats where these are wanted, and lists as tuples.

    `table`: its name and a dot, for errors. Raises ConfigError for unknown keys and wrong types.
    """
    return {name: _checked(name, value, kinds, table) for name, value in values.items()}


def _checked(name: str, value: Any, kinds: Kinds, table: str) -> Any:
    if name not in kinds:
        close = get_close_matches(name, kinds, 1)
        meant = f", did you mean {close[0]}?" if close else f": choose {', '.join(sorted(kinds))}"
        raise ConfigError(f"{table}{name} is no setting{meant}")
    kind = kinds[name]
    if kind is list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f'{table}{name}={value!r} must be a list of strings: ["..."]')
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{table}{name}={value!r} must be {_WORDS[kind]}: correct it")
    return value
