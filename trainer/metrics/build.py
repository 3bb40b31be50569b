"""How is a metric built from its text? The house's and torchmetrics' classes, tried on a few samples first."""

import copy
import difflib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, regression, segmentation
from torchmetrics import classification as tm

from thawline.dataio.errors import quoted
from thawline.trainer.errors import RecipeError
from thawline.trainer.metrics.names import MetricCall, parse, snake
from thawline.trainer.metrics.states import by_class, matrix_bytes, of_each
from thawline.trainer.tasks import TASKS, MetricKind, record_of

_MOST_BYTES = 4 << 30
"""What a metric may take on the device: a matrix over 23,000 classes, or 1,000 thresholds of 130,000."""
_BYTES_AN_ENTRY = 32
"""For each of as many bins or thresholds as a number asks for: what torchmetrics holds of them meanwhile."""


def one(text: str, *, task: str, classes: int, side_px: int | None = None) -> Metric:
    """The metric that a text asks for, tried on a few made-up samples of the task.

    It takes what meter.as_metrics_take makes of the model's outputs and the targets.

    Raises:
        RecipeError: no such metric, arguments that it does not take, or it does not give one number for this task.
    """
    asked = parse(text)
    metric = _make(_known(asked, task, classes, side_px), asked)
    _try(metric, text, task, classes)
    return metric


def recall_of_each(task: str, classes: int) -> Metric | None:
    """The recall of each class, (C,) float64, NaN where no sample has it; None for a task without recall."""
    if "recall" not in record_of(task).own_metrics():
        return None
    asked = parse("recall")
    kind = _known(asked, task, classes, None)
    return _make(replace(kind, made_by=of_each(kind.made_by)), asked)


def house_metrics() -> Mapping[str, type[Metric]]:
    """The classes behind the house's own names, of every task."""
    return {name: kind.made_by for task in TASKS.values() for name, kind in task.own_metrics().items()}


@cache
def _theirs() -> Mapping[str, type[Metric]]:
    """torchmetrics' classes of the kinds that a vision model's outputs can be given to."""
    found: dict[str, type[Metric]] = {}
    for module in (segmentation, regression, tm):
        for name in module.__all__:
            kind = getattr(module, name, None)
            if inspect.isclass(kind) and issubclass(kind, Metric) and not inspect.isabstract(kind):
                found[name] = kind
    return found


@cache
def by_column() -> Mapping[str, type[Metric]]:
    """torchmetrics' classes by how their columns begin."""
    return {snake(name): kind for name, kind in _theirs().items()}


def _known(asked: MetricCall, task: str, classes: int, side_px: int | None) -> MetricKind:
    """How the requested metric is made, with the arguments that the task settles filled in."""
    if task not in TASKS:
        raise RecipeError(f"task={quoted(task)!r} has no metrics: give {', '.join(TASKS)}, or your own metrics")
    own = TASKS[task].own_metrics()
    if asked.name in own:
        kind = own[asked.name]
    elif asked.name in _theirs():
        made_by = _theirs()[asked.name]
        words = [p.name for p in inspect.signature(made_by).parameters.values() if p.kind is not p.VAR_KEYWORD]
        kind = MetricKind(made_by, dict.fromkeys(words))
    else:
        raise RecipeError(_unknown(asked, task))
    settled = {**TASKS[task].settled, "num_classes": classes, "num_labels": classes, "validate_args": False}
    settled |= {"side_px": side_px} if side_px else {}
    kind = replace(kind, made_by=by_class(kind.made_by))
    takes = inspect.signature(kind.made_by).parameters
    settled = {key: value for key, value in settled.items() if key in takes}
    free = {key: value for key, value in kind.takes.items() if key not in settled}
    return replace(kind, takes=free, settled={**kind.settled, **settled})


def _unknown(asked: MetricCall, task: str) -> str:
    own = ", ".join(TASKS[task].own_metrics())
    other = [name for name, each in TASKS.items() if asked.name in each.own_metrics()]
    if other:
        return (
            f"metric {quoted(asked.text)!r} is for task {' or '.join(other)} and this one is {task}, so it would count "
            f"nothing sensible; give {own}, or a torchmetrics class that fits"
        )
    # ours come last: they win
    lower = {name.lower(): name for name in (*_theirs(), *TASKS[task].own_metrics())}
    near = [lower[name] for name in difflib.get_close_matches(asked.name.lower(), lower, n=3)]
    instead = (
        " or ".join(near) + " (the nearest names)" if near else f"{own}, or a class of torchmetrics.classification"
    )
    return f"metric {quoted(asked.text)!r} is not known, so it cannot be counted; give {instead}"


def _make(kind: MetricKind, asked: MetricCall) -> Metric:
    takes = list(kind.takes)
    given = [*takes[: len(asked.places)], *(key for key, _ in asked.named)]
    if len(asked.places) > len(takes) or len(set(given)) < len(given) or not set(given) <= set(takes):
        raise RecipeError(
            f"metric {quoted(asked.text)!r} gives arguments that {quoted(asked.name)} does not take, so it cannot be "
            f"made; it takes {', '.join(takes) or 'none here'}"
        )
    chosen: dict[str, Any] = {**dict(zip(takes, asked.places, strict=False)), **dict(asked.named)}
    for key, default in kind.takes.items():
        if isinstance(default, float) and isinstance(chosen.get(key), int):
            chosen[key] = float(chosen[key])  # torchmetrics refuses beta=2
    defaults = {key: value for key, value in kind.takes.items() if value is not None}
    arguments: dict[str, Any] = {**defaults, **chosen, **kind.settled}
    try:
        _check_size(kind, asked, arguments)
        if "validate_args" in arguments:  # looks at the arguments now; left on, it would read back every batch
            sizes = {key: max(2, arguments[key]) for key in ("num_classes", "num_labels") if key in arguments}
            kind.made_by(**(arguments | sizes | {"validate_args": True}))  # one label alone is a question too
        return kind.made_by(**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError, ModuleNotFoundError) as error:
        raise RecipeError(
            f"metric {quoted(asked.text)!r} cannot be made: {_sentence(error)}; {quoted(asked.name)} takes "
            f"{', '.join(takes) or 'none'}"
        ) from error


def _check_size(kind: MetricKind, asked: MetricCall, arguments: Mapping[str, Any]) -> None:
    """Raises RecipeError for a metric that would take more than _MOST_BYTES, before any of it is there."""
    given = [value for value in (*asked.places, *(value for _, value in asked.named)) if isinstance(value, int)]
    needs = _BYTES_AN_ENTRY * max(given, default=0)
    if needs <= _MOST_BYTES:
        try:
            with torch.device("meta"):  # shapes alone
                planned = kind.made_by(**arguments)
        except (NotImplementedError, RuntimeError):  # it looks at numbers as it is made
            return
        states = (getattr(planned, name) for name in planned._defaults)
        kept = sum(state.numel() * state.element_size() for state in states if isinstance(state, Tensor))
        needs = max(kept, matrix_bytes(planned))
    if needs > _MOST_BYTES:
        raise RecipeError(
            f"metric {quoted(asked.text)!r} would take {needs / 2**30:,.0f} GiB on the device, and {_MOST_BYTES >> 30} "
            f"are the most: validation would end the run; give smaller arguments, or one that counts by class (f_beta)"
        )


def _try(metric: Metric, text: str, task: str, classes: int) -> None:
    """Raises RecipeError where the metric takes no such samples, gives no single number or sums badly over ranks."""
    wrong = ""
    for name, reduction in metric._reductions.items():
        if getattr(reduction, "__name__", "") == "dim_zero_mean":
            wrong = f"its {name} is averaged over ranks, a mean of means"
        elif isinstance(getattr(metric, name), list) and getattr(reduction, "__name__", "") != "dim_zero_cat":
            wrong = f"its {name} is a list that torchmetrics does not gather"
    samples = TASKS[task].trial
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = copy.deepcopy(metric)
            trial.distributed_available_fn = lambda: False  # a rank that fails elsewhere would leave this one waiting
            value: object = torch.zeros(())
            if samples is not None:
                trial.update(*samples(classes))
                value = trial.compute()
        if not isinstance(value, Tensor) or value.numel() != 1:
            wrong = "it gives more than one number"
    except Exception as error:  # torchmetrics has no one kind of error for inputs of another kind
        wrong = _sentence(error) or type(error).__name__
    if wrong:
        raise RecipeError(
            f"metric {quoted(text)!r} does not fit task {task} with {classes} classes ({wrong}), so a validation would "
            f"fail or mislead; give one that does, such as {', '.join(TASKS[task].metrics)}"
        )


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
