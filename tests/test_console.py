"""What a person sees of a run: the epoch table, plain lines where there is no terminal, a bar where there is."""

import io
from typing import Any

from rich.console import Console as RichConsole

from cluster.console import Console, diagnosis_lines, epoch_table, metric_names
from trainer.diagnosis import Finding


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


def test_rows_that_come_again_after_a_failure_are_shown_once() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.show(ROWS[:3])
    console.show(ROWS)
    assert stream.getvalue().splitlines() == epoch_table(ROWS).splitlines()


def test_on_a_terminal_a_bar_tells_the_speed() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console._rich = RichConsole(file=stream, force_terminal=True, width=140, highlight=False)
    console.show(ROWS[:2])
    console.close()
    text = stream.getvalue()
    assert "10/20" in text
    assert "1,234 images/s" in text or "1,235 images/s" in text
    assert "waiting for data 25%" in text
