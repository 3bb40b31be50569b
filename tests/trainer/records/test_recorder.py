"""Rows in, the same rows out of a table and a Parquet file; what a reader may see meanwhile."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.kit.toy import Watched, learner, loaders
from tests.trainer.analysis.test_plots import drawn
from thawline.trainer.records.recorder import Recorder, to_table, write_parquet
from thawline.trainer.records.rows import Recorded, Row, metric_columns

ROWS: list[Any] = [
    {"kind": "train", "phase": "frozen", "step": 2, "loss": 1.5, "lr": 1e-3, "momentum": 0.9, "images": 8},
    {"kind": "valid", "phase": "frozen", "step": 4, "valid_loss": 1.25, "error_rate": 1},
    {"kind": "valid", "phase": "one_cycle", "step": 8, "valid_loss": 1.0, "error_rate": 0.25},
]
FIRST = ["kind", "phase", "step", "epoch", "time_s", "unix_s", "loss", "lr", "momentum"]


class Spy:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def step(self, *, images: int, step_s: float, data_wait_s: float) -> None:
        raise AssertionError("steps are the learner's to announce, not the recorder's")

    def busy(self, *, busy_s: float) -> None:
        raise AssertionError("so are windows")

    def observe(self, row: Mapping[str, object]) -> None:
        self.rows.append(dict(row))


def test_the_table_holds_every_value_and_null_where_a_row_has_none() -> None:
    table = to_table(ROWS)
    assert table.column_names == [*FIRST, "images", "valid_loss", "error_rate"]
    assert table.to_pylist() == [{name: row.get(name) for name in table.column_names} for row in ROWS]
    types = {name: str(table.schema.field(name).type) for name in ("kind", "step", "loss", "images", "error_rate")}
    assert types == {"kind": "string", "step": "int64", "loss": "double", "images": "int64", "error_rate": "double"}


def test_the_columns_come_in_the_same_order_whatever_the_first_row_is() -> None:
    assert to_table(ROWS[::-1]).column_names[: len(FIRST)] == FIRST
    assert to_table([]).column_names == FIRST
    assert to_table([]).num_rows == 0


def test_rows_are_kept_in_order_and_found_by_kind() -> None:
    recorder = Recorder(rows=ROWS[:1])
    for row in ROWS[1:]:
        recorder.add(row)
    assert recorder.rows == ROWS
    assert recorder.of_kind("valid") == ROWS[1:]
    assert recorder.of_kind("quarantine") == []
    assert recorder.table().equals(to_table(ROWS))


def test_every_sink_sees_every_row_that_is_added_and_none_that_was_there() -> None:
    sinks = Spy(), Spy()
    recorder = Recorder(sinks=sinks, rows=ROWS[:1])
    for row in ROWS[1:]:
        recorder.add(row)
    assert [sink.rows for sink in sinks] == [ROWS[1:], ROWS[1:]]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []], ids=["all", "one", "none"])
def test_parquet_gives_the_same_table_back(tmp_path: Path, rows: list[Row]) -> None:
    file = tmp_path / "run" / "rows.parquet"
    write_parquet(to_table(rows), file)
    assert pq.read_table(file).equals(to_table(rows))
    assert [child.name for child in file.parent.iterdir()] == ["rows.parquet"]


def test_a_write_that_fails_leaves_the_old_file_and_no_part_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.parquet"
    write_parquet(to_table(ROWS), file)

    def half(table: pa.Table, where: Any) -> None:
        where.write(b"PAR1")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="No space"):
        write_parquet(to_table(ROWS[:1]), file)
    assert [child.name for child in tmp_path.iterdir()] == ["rows.parquet"]
    assert pq.read_table(file).equals(to_table(ROWS))


def test_a_reader_in_mid_write_still_sees_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, seen = tmp_path / "rows.parquet", pq.write_table, []
    write_parquet(to_table(ROWS[:1]), file)

    def look(table: pa.Table, where: Any) -> None:
        write(table, where)
        seen.append(pq.read_table(file).num_rows)

    monkeypatch.setattr(pq, "write_table", look)
    write_parquet(to_table(ROWS), file)
    assert (seen, pq.read_table(file).num_rows) == ([1], 3)


def test_metrics_are_what_only_validations_tell() -> None:
    train = {"kind": "train", "step": 1, "epoch": 0.5, "loss": 1.0, "grad_norm": 2.0, "straggler": 1, "mine": 0.5}
    valid: dict[str, Any] = {"kind": "valid", "phase": "a", "step": 2, "phase_step": 2, "phase_steps": 4, "epoch": 1.0}
    valid |= {"train_loss": 1.0, "valid_loss": 2.0, "valid_s": 3.0, "valid_samples": 7, "peak_bytes": 8}
    valid |= {"roc_auc": 0.9, "error_rate": 0.25, "note": "text", "nothing": None, "mine": 0.5}
    checkpoint: dict[str, Any] = {"kind": "checkpoint", "step": 2, "checkpoint_s": 0.5, "size": 12}
    assert metric_columns([train, valid, checkpoint]) == ["error_rate", "roc_auc"]
    assert metric_columns([valid]) == ["error_rate", "roc_auc", "mine"]
    assert metric_columns([train, checkpoint]) == []
    assert metric_columns(to_table([train, valid, checkpoint]).to_pylist()) == ["error_rate", "roc_auc"]


def test_a_recorder_draws_its_own_rows() -> None:
    rows: list[Any] = [{**row, "epoch": float(row["step"])} for row in ROWS]
    recorder = Recorder(rows=rows)
    assert drawn(recorder.plot_loss(), "validation") == ([4.0, 8.0], [1.25, 1.0])
    assert drawn(recorder.plot_lr(), "learning rate") == ([2.0], [1e-3])
    assert drawn(recorder.plot_metrics(), "error rate") == ([4.0, 8.0], [1.0, 0.25])


def test_every_recorded_row_has_the_columns_of_its_kind_and_a_validation_its_metrics_besides(tmp_path: Path) -> None:
    kinds = {get_args(get_type_hints(kind)["kind"])[0]: set(kind.__required_keys__) for kind in get_args(Recorded)}
    data = loaders()
    data[0].lost[100] = "a.jpg: missing"
    learn = learner(data=data, context=Watched(run_dir=tmp_path), checkpoint_every_s=0.0)
    learn.fit_one_cycle(2, 1e-3)
    rows = [dict(row) for row in learn.recorder.rows]
    assert {row["kind"] for row in rows} == {"train", "valid", "checkpoint", "quarantine"}
    for row in rows:
        metrics = {"error_rate", "accuracy"} if row["kind"] == "valid" else set()
        assert set(row) == kinds[str(row["kind"])] | metrics
