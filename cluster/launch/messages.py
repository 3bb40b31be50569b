"""What do the processes of a run say to one another? Nothing heavy is imported, so that each starts quickly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thawline.trainer.step.sentences import Sentence


@dataclass(frozen=True)
class Asked:
    """What workers are asked to do."""

    stop: bool = False
    """Save and end."""
    taken_at: float | None = None
    """When a machine of theirs will be taken away, unix seconds."""


@dataclass(frozen=True)
class Outcome:
    """What a run has come to so far."""

    result: dict[str, Any] | None = None
    error: Sentence | None = None
    """What only a user can mend."""

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done."""
        return self.result is not None or self.error is not None


@dataclass(frozen=True)
class Rows:
    """Rows are published: see trainer.rows."""

    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Ended:
    """The run has come to its result, or was stopped."""

    result: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """The run met what only a user can mend."""

    error: Sentence


@dataclass(frozen=True)
class Crashed:
    """The process that trains has failed."""

    trace: str


Message = Rows | Ended | Refused | Crashed
"""From the process that trains to the Ray Train worker that it works for, which sends it `Asked` when that changes."""
