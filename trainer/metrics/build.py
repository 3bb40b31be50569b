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
"""Largest size of a metric on the device: a matrix over 23,000 classes, or 1,000 thresholds of 130,000."""
_BYTES_AN_ENTRY = 32
"""Temporary memory of torchmetrics for each bin or threshold."""


def one(text: str, *, task: str, classes: int, side_px: int | None = None) -> Metric:
    """The metric that a text names, tried on a few made-up samples of the task.

    Its inputs are outputs and targets as meter.as_metrics_take returns them.

    Raises:
        RecipeError: no such metric, arguments that it does not have, or not one number for this task.
    """
    call = parse(text)
    metric = _make(_kind_of(call, task, classes, side_px), call)
    _try(metric, text, task, classes)
    return metric


def recall_of_each(task: str, classes: int) -> Metric | None:
    """The recall of each class, (C,) float64, NaN where no sample has it; None for a task without recall."""
    if "recall" not in record_of(task).own_metrics():
        return None
    call = parse("recall")
    kind = _kind_of(call, task, classes, None)
    return _make(replace(kind, made_by=of_each(kind.made_by)), call)


def house_metrics() -> Mapping[str, type[Metric]]:
    """The classes behind the house's own names, of every task."""
    return {name: kind.made_by for task in TASKS.values() for name, kind in task.own_metrics().items()}


@cache
def _torchmetrics() -> Mapping[str, type[Metric]]:
    """torchmetrics' classes for classification, regression and segmentation."""
    classes: dict[str, type[Metric]] = {}
    for module in (segmentation, regression, tm):
        for name in module.__all__:
            kind = getattr(module, name, None)
            if inspect.isclass(kind) and issubclass(kind, Metric) and not inspect.isabstract(kind):
                classes[name] = kind
    return classes


@cache
def by_column() -> Mapping[str, type[Metric]]:
    """torchmetrics' classes by the beginning of their columns' names."""
    return {snake(name): kind for name, kind in _torchmetrics().items()}


def _kind_of(call: MetricCall, task: str, classes: int, side_px: int | None) -> MetricKind:
    """The kind of the requested metric, with the arguments that the task settles filled in."""
    if task not in TASKS:
        raise RecipeError(f"task={quoted(task)!r} has no metrics: give {', '.join(TASKS)}, or your own metrics")
    own = TASKS[task].own_metrics()
    if call.name in own:
        kind = own[call.name]
    elif call.name in _torchmetrics():
        made_by = _torchmetrics()[call.name]
        words = [p.name for p in inspect.signature(made_by).parameters.values() if p.kind is not p.VAR_KEYWORD]
        kind = MetricKind(made_by, dict.fromkeys(words))
    else:
        raise RecipeError(_unknown(call, task))
    settled = {**TASKS[task].settled, "num_classes": classes, "num_labels": classes, "validate_args": False}
    settled |= {"side_px": side_px} if side_px else {}
    kind = replace(kind, made_by=by_class(kind.made_by))
    parameters = inspect.signature(kind.made_by).parameters
    settled = {key: value for key, value in settled.items() if key in parameters}
    free = {key: value for key, value in kind.takes.items() if key not in settled}
    return replace(kind, takes=free, settled={**kind.settled, **settled})


def _unknown(call: MetricCall, task: str) -> str:
    own = ", ".join(TASKS[task].own_metrics())
    others = [name for name, record in TASKS.items() if call.name in record.own_metrics()]
    if others:
        return (
            f"metric {quoted(call.text)!r} is for task {' or '.join(others)} and this one is {task}, so it would count "
            f"nothing sensible; give {own}, or a torchmetrics class that fits"
        )
    # the house's names come last, and win
    lower = {name.lower(): name for name in (*_torchmetrics(), *TASKS[task].own_metrics())}
    near = [lower[name] for name in difflib.get_close_matches(call.name.lower(), lower, n=3)]
    instead = (
        " or ".join(near) + " (the nearest names)" if near else f"{own}, or a class of torchmetrics.classification"
    )
    return f"metric {quoted(call.text)!r} is not known, so it cannot be counted; give {instead}"


def _make(kind: MetricKind, call: MetricCall) -> Metric:
    parameters = list(kind.takes)
    names = [*parameters[: len(call.places)], *(key for key, _ in call.named)]
    if len(call.places) > len(parameters) or len(set(names)) < len(names) or not set(names) <= set(parameters):
        raise RecipeError(
            f"metric {quoted(call.text)!r} gives arguments that {quoted(call.name)} does not take, so it cannot be "
            f"made; it takes {', '.join(parameters) or 'none here'}"
        )
    options: dict[str, Any] = {**dict(zip(parameters, call.places, strict=False)), **dict(call.named)}
    for key, default in kind.takes.items():
        if isinstance(default, float) and isinstance(options.get(key), int):
            options[key] = float(options[key])  # torchmetrics refuses beta=2
    defaults = {key: value for key, value in kind.takes.items() if value is not None}
    arguments: dict[str, Any] = {**defaults, **options, **kind.settled}
    try:
        _check_size(kind, call, arguments)
        if "validate_args" in arguments:  # checks the arguments now; left on, it would read back every batch
            sizes = {key: max(2, arguments[key]) for key in ("num_classes", "num_labels") if key in arguments}
            kind.made_by(**(arguments | sizes | {"validate_args": True}))  # one label alone is valid, too
        return kind.made_by(**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError, ModuleNotFoundError) as error:
        raise RecipeError(
            f"metric {quoted(call.text)!r} cannot be made: {_sentence(error)}; {quoted(call.name)} takes "
            f"{', '.join(parameters) or 'none'}"
        ) from error


def _check_size(kind: MetricKind, call: MetricCall, arguments: Mapping[str, Any]) -> None:
    """Raises RecipeError for a metric that would need more than _MOST_BYTES, before it allocates them."""
    sizes = [value for value in (*call.places, *(value for _, value in call.named)) if isinstance(value, int)]
    needs = _BYTES_AN_ENTRY * max(sizes, default=0)
    if needs <= _MOST_BYTES:
        try:
            with torch.device("meta"):  # shapes alone
                planned = kind.made_by(**arguments)
        except (NotImplementedError, RuntimeError):  # it reads numbers while it is made
            return
        states = (getattr(planned, name) for name in planned._defaults)
        state_bytes = sum(state.numel() * state.element_size() for state in states if isinstance(state, Tensor))
        needs = max(state_bytes, matrix_bytes(planned))
    if needs > _MOST_BYTES:
        raise RecipeError(
            f"metric {quoted(call.text)!r} would take {needs / 2**30:,.0f} GiB on the device, and {_MOST_BYTES >> 30} "
            f"are the most: validation would end the run; give smaller arguments, or one that counts by class (f_beta)"
        )


def _try(metric: Metric, text: str, task: str, classes: int) -> None:
    """Raises RecipeError where the metric refuses such samples, returns no single number or sums badly over ranks."""
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
            trial.distributed_available_fn = lambda: False  # if a rank failed elsewhere, this one would wait for it
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
