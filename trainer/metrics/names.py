"""Which metric does a text name? `f_beta(beta=2)`, or any class of torchmetrics by its name.

A text is a name, with arguments in brackets where it has some: plain values only, nothing is evaluated. A metric's
column is its text in snake case, "f_beta_beta_2", "accuracy_multi_threshold_0_2", "top_k_3": letters, digits and
underscores, which Parquet, PromQL and a command line all accept. A positional argument is written without its name.
"""

import ast
import re
from dataclasses import dataclass, replace
from typing import Any

from thawline.dataio.errors import quoted
from thawline.trainer.errors import RecipeError

IGNORED = 255
"""A mask's value for pixels without a class, as in Pascal VOC."""


@dataclass(frozen=True)
class MetricCall:
    """A metric's text, parsed."""

    text: str
    name: str
    places: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()

    @property
    def column(self) -> str:
        """The name of its column."""
        parts = [snake(self.name), *map(_slug, self.places), *(f"{key}_{_slug(value)}" for key, value in self.named)]
        return "_".join(parts)

    @property
    def call(self) -> str:
        """Its text, normalised."""
        return f"{self.name}({', '.join([*map(repr, self.places), *(f'{k}={v!r}' for k, v in self.named)])})"

    def also(self, **named: Any) -> "MetricCall":
        """The same with further arguments."""
        return replace(self, named=(*self.named, *named.items()))


def parse(text: str) -> MetricCall:
    """Parse a metric's text. Raises RecipeError if it is neither a name nor a call with plain values."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        function, arguments = (call.func, call) if isinstance(call, ast.Call) else (call, None)
        if not isinstance(function, ast.Name):
            raise ValueError
        if arguments is None:
            return MetricCall(text, function.id)
        places = tuple(ast.literal_eval(value) for value in arguments.args)
        named = tuple((str(word.arg), ast.literal_eval(word.value)) for word in arguments.keywords)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise RecipeError(
            f"metric {quoted(text)!r} is neither a name nor a name with plain values in brackets, so nothing can be "
            "built from it; write it as in f_beta(beta=2) or MulticlassCohenKappa(weights='linear')"
        ) from None
    return MetricCall(text, function.id, places, named)


def snake(name: str) -> str:
    """A class's name in the form of a column's."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _slug(value: Any) -> str:
    text = str(value).lower().replace("-", "minus_")
    return re.sub(r"[^0-9a-z]+", "_", text).strip("_")
