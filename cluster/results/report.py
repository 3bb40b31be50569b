"""What are a run's results, on one page? `report.html`: self-contained, to be opened anywhere, years later."""

import base64
import io
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from torch import Tensor

from thawline.cluster.results.figures import write
from thawline.cluster.run.folder import write_text
from thawline.dataio.batch import Batch
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.show import DRAWINGS, Drawing, denormalise, grid
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import ImageLoader
from thawline.trainer.analysis import plots
from thawline.trainer.analysis.diagnosis import diagnose
from thawline.trainer.records.rows import metric_columns
from thawline.trainer.tasks import record_of

SHOWN = 24
"""Images in one picture."""


def write_report(
    root: Root,
    result: dict[str, Any],
    rows: pa.Table,
    outcomes: pa.Table,
    valid: ImageLoader,
    *,
    outputs_of: Callable[[Batch], Tensor],
) -> None:
    """Write a run's report.html: the result, the epoch table, curves with findings, validation images with predictions.

    root: the run's folder. rows: the recorder's.
    outcomes: of Predictions.table, one row a validation image. outputs_of: what the model with the final weights puts
    out for a batch on the CPU; asked of the images that are shown, where the rows do not have all of a prediction.
    """
    epochs = [row for row in rows.to_pylist() if row["kind"] == "valid"]
    metrics = metric_columns(rows.to_pylist())
    names = ["train_loss", "valid_loss", *metrics]
    page = (
        pages()
        .get_template("report.html.j2")
        .render(
            result=result,
            epochs=epochs,
            names=names,
            classes=_by_class(outcomes) if any(row.get("recalls") for row in epochs) else [],
            findings=diagnose(rows),
            judged=record_of(valid.task).right is not None,
            curves=[(_embedded(figure), caption) for figure, caption in _curves(rows, metrics)],
            legend=DRAWINGS[valid.task].legend,
            worst=shown("Hardest", outcomes, valid, np.argsort(-outcomes["loss"].to_numpy())[:SHOWN], outputs_of),
            sample=shown("Evenly spaced", outcomes, valid, _spread(len(outcomes)), outputs_of),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    write_text(root, "report.html", page)


def pages(*folders: Path) -> jinja2.Environment:
    """The templates of these folders, and of this one."""
    return jinja2.Environment(loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]), autoescape=True)


def _by_class(outcomes: pa.Table) -> list[tuple[str, int, int]]:
    """(class, its validation images, those predicted as it), the lowest recall first; of one label or several."""
    images, hits = Counter[str](), Counter[str]()
    for target, prediction in zip(outcomes["target"].to_pylist(), outcomes["prediction"].to_pylist(), strict=True):
        labels, predictions = ({*value} if isinstance(value, list) else {value} for value in (target, prediction))
        images.update(labels)
        hits.update(labels & predictions)
    return sorted(((name, n, hits[name]) for name, n in images.items()), key=lambda row: (row[2] / row[1], row[0]))


def _curves(rows: pa.Table, metrics: list[str]) -> list[tuple[Figure, str]]:
    """The figures, each with a text for those who cannot see it."""
    losses = f"{_course(rows, 'train', 'loss', 'training')}, {_course(rows, 'valid', 'valid_loss', 'validation')}"
    schedule = f"{_course(rows, 'train', 'lr', 'rate')}, {_course(rows, 'train', 'momentum', 'momentum')}"
    return [
        (plots.plot_loss(rows), f"Loss by epoch: {losses}"),
        (plots.plot_schedule(rows), f"Learning rate and momentum by epoch: {schedule}"),
        *(
            (plots.plot_metric(rows, name), f"Validation metric by epoch: {_course(rows, 'valid', name, name)}")
            for name in metrics
        ),
        (plots.plot_throughput(rows), f"Throughput by epoch: {_course(rows, 'train', 'images_per_s', 'images/s')}"),
        (
            plots.plot_data_wait(rows),
            f"Time spent waiting for data by epoch: {_course(rows, 'train', 'data_wait_fraction', 'share')}",
        ),
    ]


def _course(rows: pa.Table, kind: str, column: str, name: str) -> str:
    """The first, last, least and largest value of a series, in words."""
    records = rows.to_pylist() if column in rows.column_names else []
    values = [row[column] for row in records if row["kind"] == kind and row[column] is not None]
    if not values:
        return f"{name} was not recorded"
    return f"{name} from {values[0]:.3g} to {values[-1]:.3g} (between {min(values):.3g} and {max(values):.3g})"


def shown(
    name: str,
    outcomes: pa.Table,
    valid: ImageLoader,
    rows: np.ndarray[Any, Any],
    outputs_of: Callable[[Batch], Tensor],
) -> tuple[str, str]:
    """Validation images as a picture within the page, and a text for those who cannot see it."""
    shown_rows = outcomes.take(rows).to_pylist()
    record = record_of(valid.task)
    right = sum(record.right(row) for row in shown_rows) if record.right else 0
    counts = (
        f"{right} right, {len(shown_rows) - right} wrong"
        if record.right
        else "; ".join(map(record.title, shown_rows[:3]))
    )
    how = DRAWINGS[valid.task].legend or "each titled prediction / truth"
    caption = f"{name} validation images, {len(shown_rows)}, {how}: {counts}"
    return _embedded(pictures(outcomes, valid, rows, outputs_of)), caption


def _spread(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.unique(np.linspace(0, count - 1, min(count, SHOWN)).astype(np.int64))


def pictures(
    outcomes: pa.Table, valid: ImageLoader, indices: np.ndarray[Any, Any], outputs_of: Callable[[Batch], Tensor]
) -> Figure:
    """Validation images as the model saw them, titled prediction / truth, red where these differ.

    Points and masks are drawn over them, both predicted and true, see Drawing.legend.
    """
    by_id = {row["id"]: row for row in outcomes.take(indices).to_pylist()}
    work = valid.source.work(np.searchsorted(valid.subset.ids, list(by_id)))
    rows = [by_id[int(number)] for number in work.ids]  # a file may have gone since it was predicted
    with ReferenceEngine(valid.spec, device=torch.device("cpu"), dtype=torch.float32, threads=1) as engine:
        (batch,) = engine.run(iter([work]))
    record, drawing = record_of(valid.task), DRAWINGS[valid.task]
    colours = [("#1a7f37" if record.right(row) else "#c62828") if record.right else "black" for row in rows]
    figure = grid(list(denormalise(batch.inputs, valid.spec)), list(map(record.title, rows)), cols=8, colours=colours)
    if drawing.over:
        targets, classes = batch.targets.numpy(), len(valid.classes)
        predicted = _predicted(drawing, rows, batch, outputs_of)
        for axes, target, prediction in zip(figure.axes, targets, predicted or targets, strict=False):
            drawing.over(axes, prediction, classes)
            if predicted and drawing.true_over:
                drawing.true_over(axes, target, classes)
    return figure


def _predicted(
    drawing: Drawing, rows: list[dict[str, Any]], batch: Batch, outputs_of: Callable[[Batch], Tensor]
) -> list[Any]:
    """What was predicted for each image of a batch, as targets; empty where that is not known."""
    if drawing.predicted:
        return [drawing.predicted(row["prediction"]) for row in rows]
    return [drawing.decided(each) for each in outputs_of(batch).numpy()] if drawing.decided else []


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    write(figure, buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
