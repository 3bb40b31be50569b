"""Figures by their data: what a line shows is what the rows say."""

import io
import warnings

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from thawline.cluster.results.figures import write
from thawline.trainer.analysis import plots
from thawline.trainer.analysis.diagnosis import smooth
from thawline.trainer.errors import RecipeError

WINDOWS = 60
COLUMNS = ("loss", "lr", "momentum", "images_per_s", "data_wait_fraction")


@pytest.fixture
def rows() -> pa.Table:
    """Five epochs of twelve windows and a validation each, with a checkpoint row among them."""
    random = np.random.default_rng(2)
    table: list[dict[str, float | str | None]] = []
    for i in range(WINDOWS):
        epoch = (i + 1) / 12
        train = dict(zip(COLUMNS, random.uniform(0.01, 0.9, len(COLUMNS)).tolist(), strict=True))
        table.append({"kind": "train", "step": 10 * i, "epoch": epoch, **train})
        if i % 12 == 11:
            table.append({"kind": "valid", "step": 10 * i, "epoch": epoch, "valid_loss": 1 / epoch, "error_rate": 0.5})
            table.append({"kind": "checkpoint", "step": 10 * i, "epoch": epoch})
    names = dict.fromkeys(name for row in table for name in row)
    return pa.table({name: [row.get(name) for row in table] for name in names})


def column(rows: pa.Table, kind: str, name: str) -> tuple[list[float], list[float]]:
    """(epochs, values) by plain Python."""
    kept = [row for row in rows.to_pylist() if row["kind"] == kind]
    return [row["epoch"] for row in kept], [row[name] for row in kept]


def drawn(figure: Figure, label: str) -> tuple[list[float], list[float]]:
    """(x, y) of the one line with this label."""
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == label]
    assert len(lines) == 1, [line.get_label() for axes in figure.axes for line in axes.get_lines()]
    return list(lines[0].get_xdata()), list(lines[0].get_ydata())  # type: ignore[arg-type]


def test_loss_shows_every_window_and_every_validation(rows: pa.Table) -> None:
    figure = plots.plot_loss(rows)
    assert drawn(figure, "train, as recorded") == column(rows, "train", "loss")
    assert drawn(figure, "validation") == column(rows, "valid", "valid_loss")
    assert drawn(figure, "train, smoothed")[0] == column(rows, "train", "loss")[0]


def test_schedule_shows_lr_on_the_left_and_momentum_on_the_right(rows: pa.Table) -> None:
    figure = plots.plot_schedule(rows)
    assert drawn(figure, "learning rate") == column(rows, "train", "lr")
    assert drawn(figure, "momentum") == column(rows, "train", "momentum")
    left, right = figure.axes
    assert [line.get_label() for line in left.get_lines()] == ["learning rate"]
    assert [line.get_label() for line in right.get_lines()] == ["momentum"]
    assert right.yaxis.get_ticks_position() == "right"


def test_metric_throughput_and_data_wait_show_their_rows(rows: pa.Table) -> None:
    assert drawn(plots.plot_metric(rows, "error_rate"), "error rate") == column(rows, "valid", "error_rate")
    assert drawn(plots.plot_data_wait(rows), "waiting") == column(rows, "train", "data_wait_fraction")
    figure = plots.plot_throughput(rows)
    speeds = column(rows, "train", "images_per_s")
    assert drawn(figure, "images/s") == speeds
    _, median = drawn(figure, f"median {np.median(speeds[1]):,.0f}")
    assert median == [np.median(speeds[1])] * 2


def test_the_one_epoch_of_a_metric_has_a_whole_number() -> None:
    figure = plots.plot_metric(pa.table({"kind": ["valid"], "epoch": [1.0], "error_rate": [0.5]}), "error_rate")
    figure.canvas.draw()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1"]


def test_every_metric_gets_axes_of_its_own(rows: pa.Table) -> None:
    kind, epoch = rows["kind"].to_pylist(), rows["epoch"].to_pylist()
    for i in range(4):
        values = [e * i if k == "valid" else None for k, e in zip(kind, epoch, strict=True)]
        rows = rows.append_column(f"metric_{i}", pa.array(values, pa.float64()))
    figure = plots.plot_metrics(rows)
    names = ["error_rate", "metric_0", "metric_1", "metric_2", "metric_3"]
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in shown] == [name.replace("_", " ") for name in names]
    for name, axes in zip(names, shown, strict=True):
        (line,) = axes.get_lines()
        assert (list(line.get_xdata()), list(line.get_ydata())) == column(rows, "valid", name)  # type: ignore[arg-type]
    assert figure.canvas.manager is None
    figure.canvas.draw()


def test_a_run_without_metrics_gives_an_empty_figure() -> None:
    figure = plots.plot_metrics(pa.table({"kind": ["train"], "epoch": [1.0], "loss": [2.0]}))
    figure.canvas.draw()
    assert not any(axes.axison for axes in figure.axes)


def test_data_wait_is_read_in_percent_and_fits(rows: pa.Table) -> None:
    axes: Axes = plots.plot_data_wait(rows).axes[0]
    assert axes.yaxis.get_major_formatter()(0.25, None) == "25%"
    assert axes.get_ylim() == (0, 1)
    quiet = rows.set_column(rows.column_names.index("data_wait_fraction"), "data_wait_fraction", [[0.01] * len(rows)])
    assert plots.plot_data_wait(quiet).axes[0].get_ylim() == pytest.approx((0, 0.1))


def test_every_figure_names_its_axes_and_leaves_pyplot_alone(rows: pa.Table) -> None:
    makers = [plots.plot_loss, plots.plot_schedule, plots.plot_throughput, plots.plot_data_wait]
    for figure in [make(rows) for make in makers] + [plots.plot_metric(rows, "valid_loss")]:
        assert figure.get_size_inches().tolist() == [6.0, 3.2]
        assert figure.axes[0].get_xlabel() == "epoch"
        assert all(axes.get_ylabel() for axes in figure.axes)
        assert figure.axes[0].get_title(loc="left")
        assert figure.canvas.manager is None, "a manager is pyplot's"


def test_a_run_with_nothing_to_show_gives_empty_axes() -> None:
    rows = pa.table({"kind": pa.array([], pa.string()), "epoch": pa.array([], pa.float64()), "loss": pa.nulls(0)})
    for make in (plots.plot_loss, plots.plot_schedule, plots.plot_throughput, plots.plot_data_wait):
        figure = make(rows)
        figure.canvas.draw()
        assert all(len(line.get_xdata()) == 0 for line in figure.axes[0].get_lines())  # type: ignore[arg-type]


def test_a_metric_that_was_not_recorded_gets_a_sentence(rows: pa.Table) -> None:
    with pytest.raises(RecipeError, match=r"metric 'f1' was not recorded.*error_rate"):
        plots.plot_metric(rows, "f1")


@pytest.mark.parametrize("size", [1, 2, 3, 49, 400])
def test_smoothing_keeps_constants_and_length(size: int) -> None:
    np.testing.assert_allclose(smooth(np.full(size, 3.0)), np.full(size, 3.0))


def test_smoothing_does_not_lag_and_passes_over_nan() -> None:
    line = np.linspace(0, 1, 200)
    inner = slice(20, -20)
    np.testing.assert_allclose(smooth(line)[inner], line[inner], atol=1e-12)
    line[100] = np.nan
    np.testing.assert_allclose(smooth(line)[inner], np.linspace(0, 1, 200)[inner], atol=2e-3)


def test_letters_that_the_font_lacks_are_no_word_on_stderr() -> None:
    figure, file = Figure(), io.BytesIO()
    figure.suptitle("\u732b \x1b[31m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(figure, file, "png")
    assert file.getvalue().startswith(b"\x89PNG")
