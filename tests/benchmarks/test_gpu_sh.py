"""Does benchmarks/gpu.sh keep to its budget, and measure nothing twice? Over a stand-in for Python."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.kit.deploy_checks import shell
from thawline.cluster.machine import provenance

SCRIPT = provenance.HOME / "benchmarks" / "gpu.sh"
PYTHON = """#!/usr/bin/env bash
# A check of imports, a heredoc or a benchmark: the first says nothing, the others write JSON where they are told.
if [[ $1 == - && $2 == torch ]]; then exit 0; fi
if [[ $1 == - ]]; then echo '{"made": "heredoc"}' >"$2"; exit 0; fi
echo "$*" >>"$CALLS"
[[ $* == *"$FAILS"* ]] && exit 3
while (($#)); do [[ $1 == --out ]] && echo '{"made": "benchmark"}' >"$2"; shift; done
exit 0
"""


def measured(folder: Path, *arguments: str, fails: str = "nothing at all") -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the lines of gpu.jsonl, and what was said, of a run over the stand-in."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "CALLS": str(folder / "calls"), "FAILS": fails}
    command = [str(SCRIPT), "--out", str(folder / "out"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    results = folder / "out" / "gpu.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    return done.returncode, [json.loads(line) for line in lines], done.stderr


def test_every_part_is_measured_once_and_one_that_failed_again(tmp_path: Path) -> None:
    status, rows, said = measured(tmp_path, "--commit", "abc", fails="--frozen")
    assert status == 1
    assert len({row["part"] for row in rows}) == len(rows) == 18
    for row in rows:
        assert row["commit"] == "abc"
        assert (row["status"], row["result"] is None) == ((3, True) if row["part"] == "frozen" else (0, False))
    before = (tmp_path / "calls").read_text().count("\n")
    status, again, said = measured(tmp_path)
    assert status == 0
    assert [row["part"] for row in again[18:]] == ["frozen"]
    assert (tmp_path / "calls").read_text().count("\n") == before + 1
    assert "step-resnet50: measured already" in said


def test_what_the_budget_has_no_room_for_is_left_and_told(tmp_path: Path) -> None:
    status, rows, said = measured(tmp_path, "--budget", "30", "machine", "tests", "frozen")
    assert (status, [row["part"] for row in rows]) == (0, ["machine", "frozen"])
    assert "tests: left for another call: it needs about 60 s, and " in said


def test_the_script_passes_shellcheck_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert shell(SCRIPT.read_text()) == []
    status, rows, said = measured(tmp_path, "--device", "tpu")
    assert (status, rows) == (2, [])
    assert "--device is cuda or cpu" in said


@pytest.mark.slow
def test_its_own_python_runs_on_the_real_one(tmp_path: Path) -> None:
    """Nobody else reads it: no import of it is checked."""
    command = [str(SCRIPT), "--device", "cpu", "--out", str(tmp_path), "machine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (tmp_path / "gpu.log").read_text()
    found = json.loads((tmp_path / "gpu.jsonl").read_text())["result"]
    assert found["hardware"] == provenance.hardware()
    assert found["versions"] == provenance.versions()
