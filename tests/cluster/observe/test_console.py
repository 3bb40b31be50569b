"""What a person sees of a run: the epoch table, plain lines where there is no terminal, a bar where there is."""

import io
import json
import math
from typing import Any

from rich.console import Console as RichConsole

from thawline.cluster.jobs import log_records
from thawline.cluster.observe.console import Console, diagnosis_lines, epoch_table, metric_names, recall_line
from thawline.cluster.words import printable
from thawline.trainer.analysis.diagnosis import Finding


def train_row(step: int, **more: Any) -> dict[str, Any]:
    row = {
        "kind": "train",
        "phase": "one_cycle",
        "step": step,
        "phase_step": step,
        "phase_steps": 20,
        "epoch": step / 10,
    }
    return {**row, "time_s": step * 6.0, "loss": 2.5 / step, "images_per_s": 1234.5, "data_wait_fraction": 0.25, **more}


def test_the_recall_of_classes_stands_below_their_epoch() -> None:
    found = [{"name": "cat", "recall": 0.9}, {"name": "owl", "recall": None}, {"name": "[dog]", "recall": 0.25}]
    row = {**valid_row(10), "recalls": found}
    assert recall_line(valid_row(10)) == ""
    assert recall_line(row) == f"{'':10}  recall: [dog] 0.250, cat 0.900"
    assert epoch_table([row]).splitlines()[-1] == recall_line(row)
    many = [{"name": f"c{i}", "recall": i / 20} for i in range(20)]
    assert recall_line({**row, "recalls": many}).startswith(f"{'':10}  recall, lowest of 20: c0 0.000, c1 0.050, ")


def valid_row(step: int) -> dict[str, Any]:
    row = {
        "kind": "valid",
        "phase": "one_cycle",
        "step": step,
        "phase_step": step,
        "phase_steps": 20,
        "epoch": step / 10,
    }
    values = {"train_loss": 1.25, "valid_s": 1.0, "valid_loss": 0.5, "accuracy": 0.9, "error_rate": 0.1}
    return {**row, "time_s": step * 6.7, "unix_s": 0.0, **values}


ROWS = [train_row(5), train_row(10), valid_row(10), train_row(15), train_row(20), valid_row(20)]


def cells(line: str) -> list[str]:
    return line.split()


def test_the_table_is_fastais() -> None:
    head, first, second = epoch_table(ROWS).splitlines()
    assert cells(head) == ["epoch", "train_loss", "valid_loss", "error_rate", "accuracy", "time"]
    assert cells(first) == ["1", "1.250000", "0.500000", "0.100000", "0.900000", "01:07"]
    assert cells(second)[0] == "2"
    assert cells(second)[-1] == "01:07", "the time of an epoch, not since the start"


def test_a_run_without_an_epoch_has_no_table() -> None:
    assert epoch_table(ROWS[:2]) == "no epoch has ended yet"


def test_metrics_with_no_value_are_left_out() -> None:
    assert metric_names({**valid_row(10), "loss": None, "lr": None}) == ["error_rate", "accuracy"]


def test_a_diagnosis_is_a_line_for_each_finding() -> None:
    assert diagnosis_lines([]) == []
    findings = [Finding("it was late", "12 of 10", "leave earlier"), Finding("it rained", "1 > 0", "take a coat")]
    expected = ["diagnosis: it was late: 12 of 10; leave earlier", "diagnosis: it rained: 1 > 0; take a coat"]
    assert diagnosis_lines(findings) == expected


def test_elsewhere_than_on_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.show([{"kind": "note", "text": "[fit] is no markup here"}, *ROWS])
    console.close()
    text = stream.getvalue()
    assert "\x1b" not in text
    assert text.splitlines() == ["[fit] is no markup here", *epoch_table(ROWS).splitlines()]


def test_what_is_no_number_travels_as_null_and_is_shown_as_nan() -> None:
    row = {**valid_row(10), "valid_loss": math.nan, "error_rate": math.inf}
    line = log_records.encode(row)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(line[1:], parse_constant=refuse)
    assert (told["valid_loss"], told["error_rate"], told["accuracy"]) == (None, None, 0.9)
    stream = io.StringIO()
    decoded = log_records.decode(line)
    assert decoded is not None
    Console(stream).show([decoded])
    assert cells(stream.getvalue().splitlines()[1]) == ["1", "1.250000", "nan", "nan", "0.900000", "01:07"]


def test_nothing_that_a_terminal_obeys_reaches_it_nor_an_addresss_password() -> None:
    cases = {
        "cat\x1b[2J\x1b]0;owned\x07": r"cat\x1b[2J\x1b]0;owned\x07",
        "a\u202egnp.exe \x9b1m \x7f": r"a\u202egnp.exe \x9b1m \x7f",
        "lines\nand\ttabs, Ø, 猫, 🐈": "lines\nand\ttabs, Ø, 猫, 🐈",
        "no s3://key:pa55@bucket/x, http://u:p@h:80/ or": "no s3://key:***@bucket/x, http://u:***@h:80/ or",
        "s3://b/x?secret_key=pa55&region=eu": "s3://b/x?secret_key=***&region=eu",
        "https://host:8265/a@b and s3://bucket/x:y@z": "https://host:8265/a@b and s3://bucket/x:y@z",
        "file\udcff": r"file\udcff",
    }
    assert {text: printable(text) for text in cases} == cases
    stream = io.StringIO()
    Console(stream).show([{"kind": "note", "text": "cat\x1b[2J"}])
    assert stream.getvalue() == "cat\\x1b[2J\n"


def test_rows_that_come_again_after_a_failure_are_shown_once() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.show(ROWS[:3])
    console.show(ROWS)
    assert stream.getvalue().splitlines() == epoch_table(ROWS).splitlines()


def test_on_a_terminal_a_bar_tells_the_speed_and_the_phase_as_it_is_called() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console._rich = RichConsole(file=stream, force_terminal=True, width=140, highlight=False)
    console.show([ROWS[0], train_row(10, phase="[head][/body]")])
    console.close()
    text = stream.getvalue()
    assert "[head][/body]" in text
    assert "10/20" in text
    assert "1,234 images/s" in text or "1,235 images/s" in text
    assert "waiting for data 25%" in text
