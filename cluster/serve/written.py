"""How is what a model says written? As JSON lines, CSV, Parquet, or lines for eyes; masks, see mask_pictures."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from thawline.cluster.errors import PredictError
from thawline.cluster.serve.predictor import Prediction
from thawline.cluster.words import as_json
from thawline.dataio.errors import SourceError
from thawline.dataio.store import files
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root

Row = Mapping[str, Any]
Write = Callable[[Row], None]

_GROUP = 4096  # rows of a Parquet file that are written together


def row_of(said: Prediction, *, mask: str | None = None) -> Row:
    """What is written of an image: path, prediction, and what else its task has. mask: the path of its picture."""
    row: dict[str, Any] = {"path": said.name, "prediction": said.prediction}
    if said.probability is not None:
        row["probability"] = said.probability
    if said.probabilities:
        row["probabilities"] = dict(said.probabilities)
    return row if mask is None else {**row, "mask": mask}


def in_words(said: Prediction, *, top_k: int) -> str:
    """What the model says, for a line on a terminal."""
    if top_k > 1 and said.probabilities:
        return ", ".join(f"{name} {share:.3f}" for name, share in said.probabilities.items())
    words = _words(said.prediction) or "(none)"
    return words if said.probability is None else f"{words} {said.probability:.3f}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# Files ----------------------------------------------------------------------------------------------------


def _json_lines(sink: io.RawIOBase) -> Iterator[Write]:
    yield lambda row: _put(sink, f"{as_json(row)}\n")


def _csv(sink: io.RawIOBase) -> Iterator[Write]:
    """What is no text or number stands as JSON in its cell."""
    columns = list[str]()

    def write(row: Row) -> None:
        line = io.StringIO()
        writer = csv.writer(line)
        if not columns:
            columns.extend(row)
            writer.writerow(columns)
        cells = [row.get(name) for name in columns]
        writer.writerow([json.dumps(c, ensure_ascii=False) if isinstance(c, dict | list) else c for c in cells])
        _put(sink, line.getvalue())

    yield write


def _put(sink: io.RawIOBase, text: str) -> None:
    sink.write(text.encode("utf-8", "surrogateescape"))  # a name of Linux may have bytes of no script


def _parquet(sink: io.RawIOBase) -> Iterator[Write]:
    rows, writers = list[Row](), list[pq.ParquetWriter]()

    def flush() -> None:
        if not writers:
            writers.append(pq.ParquetWriter(sink, _schema(rows)))
        writers[0].write_table(pa.Table.from_pylist(rows, writers[0].schema))
        rows.clear()

    def write(row: Row) -> None:
        path = row["path"].encode("utf-8", "backslashreplace").decode()  # Parquet has no bytes of no script
        rows.append({**row, "path": path, "probabilities": list(row.get("probabilities", {}).items())})
        if len(rows) == _GROUP:
            flush()

    yield write
    flush()
    writers[0].close()


def _schema(rows: list[Row]) -> pa.Schema:
    """By the first rows; all have the same fields."""
    first = rows[0] if rows else {"path": "", "prediction": None}
    kinds = {
        "path": pa.string(),
        "prediction": _kind(first["prediction"]),
        "probability": pa.float64(),
        "probabilities": pa.map_(pa.string(), pa.float64()),
        "mask": pa.string(),
    }
    return pa.schema([(name, kind) for name, kind in kinds.items() if first.get(name) not in (None, [])])


def _kind(prediction: Any) -> pa.DataType:
    if isinstance(prediction, Mapping):
        return pa.struct([(name, pa.list_(pa.float64())) for name in prediction])
    if isinstance(prediction, list):
        numbers = any(isinstance(each, float) for each in prediction)
        return pa.list_(pa.float64() if numbers else pa.string())
    return pa.float64() if isinstance(prediction, float) else pa.string()


_FORMATS: Mapping[str, Callable[[Any], Iterator[Write]]] = {".csv": _csv, ".jsonl": _json_lines, ".parquet": _parquet}


def check_out(out: str, *, overwrite: bool) -> None:
    """Raises PredictError where predictions cannot be written to a file: before the work, not after it."""
    if _ending(out) not in _FORMATS:
        raise PredictError(
            f"--out {out} does not end in {', '.join(_FORMATS)}, by which its format is known: nothing is "
            "predicted; give such a name"
        )
    try:
        root, name = Root.holding(out)
        if not overwrite and root.exists(name):
            raise PredictError(f"--out {out} exists: it is not written over; give another, or --overwrite")
        if not root.remote:
            with atomic_write(root, f"{name}.trial"):
                pass
            root.remove(f"{name}.trial")
    except (OSError, SourceError) as error:
        raise refused("--out", out, error) from error


@contextmanager
def written(out: str) -> Iterator[Write]:
    """What writes rows into a file, which appears when the block ends, or not at all. Raises PredictError."""
    try:
        root, name = Root.holding(out)
        with atomic_write(root, name) as sink, contextmanager(_FORMATS[_ending(out)])(sink) as write:
            yield write
    except OSError as error:
        raise refused("--out", out, error) from error


def _ending(out: str) -> str:
    return Path(out.partition("?")[0]).suffix.lower()


def refused(option: str, where: str, error: Exception) -> PredictError:
    """The error of a place that cannot be written to, by its option."""
    why = files.why_refused(error)
    return PredictError(f"{option} {where} cannot be written ({why}): predictions would be lost; give another")
