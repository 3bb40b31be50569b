"""What did a run look like? Recorder rows to figures, one question each.

Takes the recorder's Arrow table (plot_sweep: a sweep's numbers), gives a `matplotlib.figure.Figure`; knows no files
and no window, and leaves pyplot's global state alone, so that it draws in a server, a worker and a notebook alike.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from thawline.trainer.analysis.diagnosis import smooth
from thawline.trainer.errors import RecipeError
from thawline.trainer.records.rows import metric_columns

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f6690", "#d1603d", "#3a7d44", "#7a4f9a", "#5c6670"
Floats = NDArray[np.float64]


def plot_loss(rows: pa.Table) -> Figure:
    """Training loss by window, as recorded and smoothed, and the validation loss of each epoch."""
    figure, axes = _canvas("Loss", "loss")
    epoch, loss = _series(rows, "train", "loss")
    _trace(axes, epoch, loss, BLUE, "train")
    epoch, loss = _series(rows, "valid", "valid_loss")
    axes.plot(epoch, loss, "o-", color=ORANGE, label="validation", markersize=4)
    _legend(axes)
    return figure


def plot_schedule(rows: pa.Table) -> Figure:
    """Learning rate of the last layer group (left) and momentum (right)."""
    figure, axes = _canvas("Schedule", "learning rate, last layer group")
    axes.plot(*_series(rows, "train", "lr"), color=BLUE, label="learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.label.set_color(BLUE)
    right = axes.twinx()
    right.plot(*_series(rows, "train", "momentum"), color=ORANGE, label="momentum")
    right.set_ylabel("momentum", color=ORANGE)
    right.spines[["top", "left", "bottom"]].set_visible(False)
    right.spines["right"].set_color("#c4c9ce")
    right.tick_params(colors=GREY, labelsize=9)
    return figure


def plot_metric(rows: pa.Table, name: str) -> Figure:
    """One validation metric by epoch, its last value written out. Raises RecipeError for no such column."""
    columns = rows.column_names
    if name not in columns:
        raise RecipeError(
            f"metric {name!r} was not recorded, so nothing can be drawn; give one of {', '.join(columns)}"
        )
    words = name.replace("_", " ")
    figure, axes = _canvas(words[:1].upper() + words[1:], words)
    _metric(axes, rows, name)
    return figure


def plot_metrics(rows: pa.Table) -> Figure:
    """Every validation metric by epoch, each in axes of its own: their scales differ."""
    names = metric_columns(rows.to_pylist())
    across = min(3, max(1, len(names)))
    down = max(1, -(-len(names) // across))
    figure = Figure(figsize=(max(6, 3.6 * across), max(3.2, 2.4 * down)), dpi=110, layout="constrained")
    places = figure.subplots(down, across, squeeze=False).ravel()
    for axes, name in zip(places, names, strict=False):
        _dress(axes, name.replace("_", " "), "", xlabel="epoch")
        _metric(axes, rows, name)
    for axes in places[len(names) :]:
        axes.set_axis_off()
    return figure


def plot_sweep(thresholds: Floats, values: Floats, *, best: float, metric: str) -> Figure:
    """A metric by threshold, and the threshold to take."""
    figure, axes = _canvas("Threshold", metric, xlabel="threshold")
    axes.xaxis.set_major_locator(MaxNLocator())
    axes.plot(thresholds, values, "o-", color=GREEN, label=metric, markersize=3)
    axes.axvline(best, color=ORANGE, linestyle="--", linewidth=1, label=f"best at {best:.3g}")
    _legend(axes)
    return figure


def plot_throughput(rows: pa.Table) -> Figure:
    """Images a second by window, over all ranks, and their median."""
    figure, axes = _canvas("Throughput", "images/s")
    epoch, speed = _series(rows, "train", "images_per_s")
    axes.plot(epoch, speed, color=BLUE, label="images/s")
    if len(speed):
        median = float(np.nanmedian(speed))
        axes.axhline(median, color=GREY, linestyle="--", linewidth=1, label=f"median {median:,.0f}")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def plot_data_wait(rows: pa.Table) -> Figure:
    """The share of each window's time in which the step waited for data."""
    figure, axes = _canvas("Waiting for data", "share of time")
    epoch, share = _series(rows, "train", "data_wait_fraction")
    axes.plot(epoch, share, color=BLUE, label="waiting")
    axes.fill_between(epoch, share, color=BLUE, alpha=0.15, linewidth=0)
    highest = float(np.nanmax(share, initial=0.0))
    axes.set_ylim(0, min(1.0, max(0.1, 1.2 * highest)))  # below 10 % nobody needs a microscope
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def plot_lr_curve(curve: pa.Table, suggestions: Mapping[str, float]) -> Figure:
    """The lr finder's loss over the learning rate (log), with what it suggests marked on the smoothed curve.

    curve: `lr_finder.LrCurve.table`, columns lr, loss (smoothed) and raw.
    """
    figure, axes = _canvas("Learning rate finder", "loss")
    lr, loss, raw = (curve[name].to_numpy() for name in ("lr", "loss", "raw"))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=GREY)
    axes.plot(lr, raw, color=BLUE, alpha=0.3, linewidth=0.8, label="loss, as recorded")
    axes.plot(lr, loss, color=BLUE, label="loss, smoothed")
    for (name, value), color in zip(suggestions.items(), (ORANGE, GREEN, PURPLE, GREY), strict=False):
        height = np.interp(np.log(value), np.log(lr), loss)
        axes.plot(value, height, "o", color=color, label=f"{name} {value:.2g}", markersize=6)
    low, high = float(loss.min()), float(loss.max())
    axes.set_ylim(low - 0.1 * (high - low), high + 0.25 * (high - low))  # a batch's own loss may lie far out
    _legend(axes)
    return figure


def _trace(axes: Axes, x: Floats, y: Floats, color: str, label: str) -> None:
    axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8, label=f"{label}, as recorded")
    if len(y):
        axes.plot(x, smooth(y), color=color, label=f"{label}, smoothed")


def _metric(axes: Axes, rows: pa.Table, name: str) -> None:
    epoch, value = _series(rows, "valid", name)
    axes.plot(epoch, value, "o-", color=GREEN, label=name.replace("_", " "), markersize=4)
    if len(value):
        axes.annotate(f"{value[-1]:.3g}", (epoch[-1], value[-1]), (0, 7), textcoords="offset points", ha="center")
    axes.margins(x=0.06, y=0.15)
    if len(epoch) == 1:
        axes.set_xticks(epoch)  # the locator would show thousandths of an epoch around it


def _series(rows: pa.Table, kind: str, column: str) -> tuple[Floats, Floats]:
    """(epoch, column) where rows of this kind have it, float64; empty where the column was never written."""
    if column not in rows.column_names:
        return np.empty(0), np.empty(0)
    kept = rows.filter(pc.and_(pc.equal(rows["kind"], kind), pc.is_valid(rows[column])))
    return tuple(kept[name].to_numpy().astype(np.float64) for name in ("epoch", column))


def _canvas(title: str, ylabel: str, *, xlabel: str = "epoch") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 3.2), dpi=110)
    # Margins for numbers of nine digits and a second scale: a layout engine would draw everything once more to know.
    axes = figure.subplots(gridspec_kw={"left": 0.15, "right": 0.87, "bottom": 0.16, "top": 0.9})
    _dress(axes, title, ylabel, xlabel=xlabel)
    return figure, axes


def _dress(axes: Axes, title: str, ylabel: str, *, xlabel: str) -> None:
    # A metric's name may hold a class's, in which $ begins no formula.
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel(xlabel, color=GREY)
    axes.set_ylabel(ylabel, color=GREY, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c9ce")
    axes.tick_params(colors=GREY, labelsize=9)


def _legend(axes: Axes) -> None:
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
