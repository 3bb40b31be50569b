"""How does an error cross between processes? As the name of its type and its sentence, never as an object.

The receiver builds it anew, from a closed list of our own types: what a stranger sends cannot run anything.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from thawline.dataio.errors import DataError
from thawline.models.errors import ModelError
from thawline.trainer.errors import TrainError

Kinds = Mapping[str, type[Exception]]
"""Types of errors by their names."""


def errors_in(*bases: type[Exception]) -> dict[str, type[Exception]]:
    """Each base and all that derives from it in the base's own module, by name."""
    return {
        kind.__name__: kind
        for base in bases
        for kind in vars(sys.modules[base.__module__]).values()
        if isinstance(kind, type) and issubclass(kind, base)
    }


KINDS: Kinds = errors_in(DataError, ModelError, TrainError)
"""Errors of this floor and those below that a user can mend: their text is a sentence."""


@dataclass(frozen=True)
class Sentence:
    """An error on its way."""

    kind: str
    """The name of its type, or of the nearest one that is in the list; "" where there is none."""
    text: str

    @classmethod
    def of(cls, error: Exception, kinds: Kinds = KINDS) -> Self:
        """An error as it is sent."""
        kind = next((kind.__name__ for kind in type(error).__mro__ if kinds.get(kind.__name__) is kind), "")
        return cls(kind, str(error) if kind else f"{type(error).__name__}: {error}")

    def error(self, kinds: Kinds = KINDS) -> Exception | None:
        """The error again; None where its type is not in the list."""
        return kinds[self.kind](self.text) if self.kind in kinds else None
