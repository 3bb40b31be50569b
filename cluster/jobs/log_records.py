"""How are rows sent through a job's log? One line each, with a mark that no other line has.

Ray Jobs sends only text from a driver to a client. A record begins with RFC 7464's separator, which prose never has.
"""

import json
import math
from typing import Any

from thawline.cluster.launch.board import Row
from thawline.cluster.words import as_json

MARK = "\x1e"
"""The first character of a record."""


def encode(row: Row) -> str:
    """The line of a row, without the line break."""
    return MARK + as_json(row)


def decode(line: str) -> dict[str, Any] | None:
    """The row in a line; None for a line that is no record, or a broken one.

    A metric that was not a number becomes NaN again, so that it keeps its place in the epoch table.
    """
    if not line.startswith(MARK):
        return None
    try:
        row = json.loads(line[1:])
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    if row.get("kind") == "valid":
        return {name: math.nan if value is None else value for name, value in row.items()}
    return row
