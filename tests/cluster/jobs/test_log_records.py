"""Rows in a log: each comes back as it was, and nothing else is taken for one."""

import pytest

from thawline.cluster.jobs.log_records import decode, encode


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "note", "text": "two\nlines, \x1e and ü"},
        {"kind": "train", "step": 3, "loss": 0.1 + 0.2, "skipped": None},
        {"kind": "end", "metrics": {"error_rate": 0.5}},
    ],
)
def test_a_row_comes_back_from_one_line(row: dict[str, object]) -> None:
    line = encode(row)
    assert "\n" not in line
    assert decode(line) == row


@pytest.mark.parametrize(
    "line", ["", "loss 0.5", '{"kind": "note"}', '\x1e{"kind": "no', "\x1e[1]", "\x1e", ' \x1e{"a": 1}']
)
def test_other_lines_are_none(line: str) -> None:
    assert decode(line) is None
