"""Has torchrun started this process, or another launcher that speaks its words? What the environment says, checked.

Variables that are left over from another job, or of which half is missing, are told as such: nothing may wait for
processes that do not exist.
"""

import os
from dataclasses import dataclass

from thawline.cluster.errors import LaunchError

_WANTED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    here: int
    """How many of them this machine has."""
    meeting: str
    """HOST:PORT of rank 0's store."""


def place() -> Place | None:
    """This process's place; None where it is the only one. Raises LaunchError for words that make no sense."""
    size = _number("WORLD_SIZE", "1", least=1)
    if size == 1:
        return None
    missing = [name for name in _WANTED if not os.environ.get(name, "").strip()]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE={size} is set, but not {' or '.join(missing)}: which of {size} processes this is, or where "
            "they meet, is not known; start it with torchrun, or unset WORLD_SIZE"
        )
    rank = _number("RANK", "0", least=0)
    if rank >= size:
        raise LaunchError(
            f"RANK={rank} with WORLD_SIZE={size}: ranks end at {size - 1}; start it with torchrun, or unset both"
        )
    meeting = f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT', '', least=1)}"
    local_rank = _number("LOCAL_RANK", str(rank), least=0)
    return Place(rank, size, local_rank, _number("LOCAL_WORLD_SIZE", str(size), least=1), meeting)


def _number(name: str, default: str, *, least: int) -> int:
    text = os.environ.get(name, "").strip() or default
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(
            f"{name}={text[:80]!r} is not a whole number from {least} on: torchrun sets it, and so did something else; "
            f"unset {name}"
        )
    return int(text)


def stay_on_this_machine() -> None:
    """Have gloo listen on loopback alone, unless the user names an interface: all ranks are here."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
