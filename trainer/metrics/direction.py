"""Is a higher value of a metric better? By its text or its column; whoever chooses by a metric needs to know."""

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

from thawline.dataio.errors import quoted
from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.names import parse, snake

if TYPE_CHECKING:
    from torchmetrics import Metric

_LOWER_IS_BETTER = ("error_rate", "mse", "mae", "loss", "valid_loss", "train_loss")


def higher(metric: str) -> bool | None:
    """Whether a higher value is better, by the metric's text or its column; None where that is not known."""
    column = parse(metric).column if "(" in metric else snake(metric)
    if any(column == name or column.startswith(f"{name}_") for name in _LOWER_IS_BETTER):
        return False
    from thawline.trainer.metrics.build import by_column, house_metrics  # torchmetrics takes two seconds to import

    for name, kind in house_metrics().items():
        if column == name or column.startswith(f"{name}_"):
            return _higher_is_better(kind)
    for end in range(len(column), 0, -1):  # the longest class name that the column begins with
        if (found := by_column().get(column[:end])) and column[end : end + 1] in ("", "_"):
            if found.higher_is_better is not None:
                return _higher_is_better(found)
            # torchmetrics does not say it of F1Score and the like, but of the classes that they make
            specific = by_column().get(f"multiclass_{column[:end]}") or by_column().get(f"multilabel_{column[:end]}")
            return _higher_is_better(specific) if specific else None
    return None


def _higher_is_better(kind: "type[Metric]") -> bool | None:
    better = kind.higher_is_better
    return better if isinstance(better, bool) else None


def direction(metric: str) -> bool:
    """`higher`, for a metric to choose by. Raises RecipeError where it is not known: the worst might be chosen."""
    better = higher(metric)
    if better is None:
        raise RecipeError(
            f"whether a higher {quoted(metric)!r} is better is not known: the worst might count as the best; give a "
            "metric of which torchmetrics says that, such as accuracy or f_beta"
        )
    return better


def check_measured(metric: str, metrics: Iterable[Hashable], *, name: str = "best") -> None:
    """Raises RecipeError unless `metric` is one of a validation with these metrics, by column.

    name: of the setting that names the metric.
    """
    measured = ("valid_loss", *map(str, metrics))
    if metric not in measured:
        raise RecipeError(
            f"{name}={quoted(metric)!r} is not measured: nothing would ever be the best; give one of "
            f"{', '.join(measured)}"
        )
