"""How do a driver and its workers talk? `Board`: rows one way, a request to stop the other.

A plain class that Ray makes an actor of, so that it tests without Ray. Its file imports nothing heavy: the actor's
process starts in the time that Python needs.
"""

from typing import Any

Row = dict[str, float | int | str | None]


class Board:
    """What rank 0 and the driver leave for one another."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._stop = False
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
        """The driver asks for a graceful end."""
        self._stop = True

    def stopping(self) -> bool:
        """Workers ask whether to stop."""
        return self._stop

    def finish(self, result: dict[str, Any]) -> None:
        """Rank 0 hands over the result."""
        self._result = result

    def fail(self, error: Exception) -> None:
        """A worker met what only a user can mend: trying again would end the same way."""
        self._error = self._error or error

    def outcome(self) -> tuple[dict[str, Any] | None, Exception | None]:
        """What the run came to."""
        return self._result, self._error
