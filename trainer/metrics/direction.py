"""Is more of a metric better? By its text or its column; what is chosen by a metric needs to know."""

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from thawline.dataio.errors import quoted
from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.names import parse, snake

if TYPE_CHECKING:
    from torchmetrics import Metric

_LOWER_IS_BETTER = ("error_rate", "mse", "mae", "loss", "valid_loss", "train_loss")


def higher(metric: str) -> bool | None:
    """Whether more of a metric is better, by its text or its column; None where that is not known."""
    column = parse(metric).column if "(" in metric else snake(metric)
    if any(column == name or column.startswith(f"{name}_") for name in _LOWER_IS_BETTER):
        return False
    from thawline.trainer.metrics.build import by_column, house_metrics  # torchmetrics takes two seconds to import

    for name, kind in house_metrics().items():
        if column == name or column.startswith(f"{name}_"):
            return _said(kind)
    for end in range(len(column), 0, -1):  # the longest class name that the column begins with
        if (found := by_column().get(column[:end])) and column[end : end + 1] in ("", "_"):
            if found.higher_is_better is not None:
                return _said(found)
            # of F1Score and the like torchmetrics does not say, but of what they make
            made = by_column().get(f"multiclass_{column[:end]}") or by_column().get(f"multilabel_{column[:end]}")
            return _said(made) if made else None
    return None


def _said(kind: "type[Metric]") -> bool | None:
    better = kind.higher_is_better
    return better if isinstance(better, bool) else None


def direction(metric: str) -> bool:
    """`higher`, where something is chosen by it. Raises RecipeError where it is not known: the worst might be."""
    known = higher(metric)
    if known is None:
        raise RecipeError(
            f"whether more of {quoted(metric)!r} is better is not known: the worst might be taken for the best; give a "
            "metric of which torchmetrics says that, such as accuracy or f_beta"
        )
    return known


def check_measured(metric: str, metrics: Iterable[Hashable], *, name: str = "best") -> None:
    """Raises RecipeError unless a validation with these metrics, by column, measures what is chosen by.

    name: of the setting that says so.
    """
    measured = ("valid_loss", *map(str, metrics))
    if metric not in measured:
        raise RecipeError(
            f"{name}={quoted(metric)!r} is not measured: nothing would ever be the best; give one of "
            f"{', '.join(measured)}"
        )
