"""Which text may reach a terminal, a log or a JSON file? Names come from strangers: classes, files, addresses.

`printable` for whatever is printed, `quoted` and `cut` for a value within a sentence, `as_json` for numbers that may be
none.
"""

import json
import logging
import math
import re
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

_MOST = 80
_SECRET = re.compile(r"(\w://[^\s/:@?#]*):[^\s/?#]*@")
_BY_OPTION = re.compile(r"([?&][^=&\s]*(?:secret|password|token)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
_TURNS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that let text be shown in another order than it is written."""


def printable(text: object) -> str:
    """The text without what a terminal would obey, which is escaped, and without the passwords of addresses."""
    said = _BY_OPTION.sub(r"\1***", _SECRET.sub(r"\1:***@", str(text)))
    if said.isascii() and said.isprintable():
        return said
    return "".join(_escaped(c) if _obeyed(c) else c for c in said)


def _obeyed(character: str) -> bool:
    return character not in "\n\t" and (unicodedata.category(character) in ("Cc", "Cs") or character in _TURNS)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def quoted(value: object) -> str:
    """The value as Python writes it, cut at 80 characters."""
    try:
        said = repr(value)
    except RecursionError:
        said = f"a {type(value).__name__} within others, hundreds deep"
    return cut(said)


def cut(text: str) -> str:
    """At most 80 characters of it."""
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def say(text: object) -> None:
    """Print a line to stderr."""
    print(printable(text), file=sys.stderr)


class Plain(logging.Formatter):
    """Log messages as `printable` has them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(super().format(record))


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as everybody can read it: a number that is none (NaN, infinite) becomes null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The same mappings and sequences, None in place of every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value
