"""How do a driver and its workers talk? `Board`: rows one way; a request to stop, or a warning, the other.

A plain class that Ray makes an actor of, so that it tests without Ray. Its file imports nothing heavy: the actor's
process starts in the time that Python needs.
"""

from typing import Any

Row = dict[str, float | int | str | None]

NAMESPACE = "thawline"
"""Of Ray, in which a running job's board is called as `board_name` says: so a client can ask for a stop."""


def board_name(job: str) -> str:
    """What the board of the job called so is called."""
    return f"board of {job}"


class Board:
    """What rank 0 and the driver leave for one another."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._stop = self._leave = False
        self._taken_at: float | None = None
        self._groups = 0
        self._error: Exception | None = None
        self._result: dict[str, Any] | None = None

    def publish(self, rows: list[Row]) -> None:
        """Rank 0 leaves rows."""
        self._rows += rows

    def take(self) -> list[Row]:
        """The driver takes what has come."""
        rows, self._rows = self._rows, []
        return rows

    def request_stop(self) -> None:
        """The driver, or a client through messenger, asks for a graceful end."""
        self._stop = True

    def make_way(self) -> None:
        """The driver could start a larger group of workers: this one shall save and end, and the run go on."""
        self._leave = True

    def warn(self, taken_at: float) -> None:
        """The driver has heard that a machine will be taken away then (unix seconds)."""
        self._taken_at = taken_at

    def warned(self) -> bool:
        """Whether the last group of workers was warned."""
        return self._taken_at is not None

    def asked(self) -> tuple[bool, float | None]:
        """Workers ask: shall we stop? When will a machine of ours be taken?"""
        return self._stop or self._leave, self._taken_at

    def begin(self) -> int:
        """Rank 0 of a group of workers is there; how many groups there were before."""
        self._groups += 1
        self._taken_at, self._leave = None, False  # what was said to the group before
        return self._groups - 1

    def finish(self, result: dict[str, Any]) -> None:
        """Rank 0 hands over the result; one that only made way has none."""
        if result["status"] != "stopped" or self._stop:
            self._result = result

    def fail(self, error: Exception) -> None:
        """A worker met what only a user can mend: trying again would end the same way."""
        self._error = self._error or error

    def outcome(self) -> tuple[dict[str, Any] | None, Exception | None]:
        """What the run came to."""
        return self._result, self._error
