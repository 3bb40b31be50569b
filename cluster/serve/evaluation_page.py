"""How good was a model, on one page? `evaluation.html`: metrics, classes, confusion, the hardest images."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from thawline.cluster.results import report
from thawline.cluster.serve.evaluation import Evaluation, most_confused
from thawline.dataio.batch import Batch
from thawline.dataio.stream.loader import ImageLoader
from thawline.dataio.table.tasks import TASKS
from thawline.models.bundle import Description

_MOST_CLASSES = 30
"""Of a matrix that still fits a page; of more, the pairs that are confused most often say it."""


def page(
    found: Evaluation,
    said: Mapping[str, Any],
    about: Description,
    loader: ImageLoader,
    *,
    outputs_of: Callable[[Batch], Tensor],
) -> str:
    """The page. said: what evaluation.json holds, finite. outputs_of: see write_report."""
    matrix = found.confusion if len(about.classes) <= _MOST_CLASSES else None
    hardest = np.argsort(-found.outcomes["loss"].to_numpy())[: report.SHOWN]
    return (
        report.pages(Path(__file__).parent)
        .get_template("evaluation.html.j2")
        .render(
            about=about,
            said=said,
            intervals=any(found.intervals.values()),
            word=TASKS[about.task].classes_word,
            matrix=[[(n, n / max(1, sum(row))) for n in row] for row in matrix] if matrix else None,
            confused=most_confused(found.confusion, about.classes) if found.confusion else [],
            worst=report.shown("Hardest", found.outcomes, loader, hardest, outputs_of),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
