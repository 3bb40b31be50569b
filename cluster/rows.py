"""How do rows travel through a job's log? One line each, marked, so that whatever else is printed there is not one.

Ray Jobs carries text alone from a driver to a client. A record begins with RFC 7464's separator, which no prose has.
"""

import json
from typing import Any

from cluster.board import Row

MARK = "\x1e"
"""What a record begins with."""


def encode(row: Row) -> str:
    """The line, without its end."""
    return MARK + json.dumps(row)


def decode(line: str) -> dict[str, Any] | None:
    """The row in a line; None where it is no record, or a broken one."""
    if not line.startswith(MARK):
        return None
    try:
        row = json.loads(line[1:])
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
