"""How does an error cross between processes? As the name of its type and its sentence, and never as an object.

Whoever hears it makes it anew, out of a closed list of our own types: what a stranger sends can run nothing.
"""

import sys
from collections.abc import Mapping

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
"""What a user can mend, up to this floor: errors whose text is a sentence."""


def to_words(error: Exception, kinds: Kinds = KINDS) -> list[str]:
    """[type, sentence]. One that is not in the list goes by the nearest type that is; "" where there is none."""
    name = next((kind.__name__ for kind in type(error).__mro__ if kinds.get(kind.__name__) is kind), "")
    return [name, str(error) if name else f"{type(error).__name__}: {error}"]


def from_words(words: list[str], kinds: Kinds = KINDS) -> Exception | None:
    """The error again; None where its type is none of the list."""
    name, text = words
    return kinds[name](text) if name in kinds else None
