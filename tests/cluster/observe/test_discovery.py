"""Does discovery point at the workers: the file that Prometheus reads, and the driver that it asks?"""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from thawline.cluster.job.job import Job
from thawline.cluster.observe.discovery import Directory, clear_targets, entries_of, targets_file, write_targets
from thawline.cluster.observe.exporter import Exporter
from thawline.cluster.run import run
from thawline.trainer.context import LocalContext
from thawline.trainer.learner import Learner


def fetch(url: str) -> tuple[str, Any]:
    """Content type and the decoded answer; sooner than a directory lets go of who says nothing."""
    with urllib.request.urlopen(url, timeout=3) as answer:
        return answer.headers["Content-Type"], json.load(answer)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def test_the_discovery_file_names_every_rank_and_clashes_with_no_label_of_a_series(tmp_path: Path) -> None:
    file = targets_file(tmp_path / "runs", "pets")
    write_targets(file, "pets", ["old:1", "old:2", "old:3"])
    (file.parent / f".{file.name}.killed.tmp").touch()  # as a writer leaves it that was killed
    write_targets(file, "pets", ["a:9400", "b:9401"])
    entries = json.loads(file.read_text())
    assert [entry["targets"] for entry in entries] == [["a:9400"], ["b:9401"]]
    assert all(label.startswith("__meta_") for entry in entries for label in entry["labels"])
    clear_targets(file)
    assert json.loads(file.read_text()) == []
    assert list(file.parent.iterdir()) == [file]


def test_the_shipped_configuration_finds_the_file_beside_the_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "deploy" / "prometheus.yml").read_text()
    (pattern,) = re.findall(r'- files: \["(.*)"\]', text)
    assert re.fullmatch(r"[^*]*(\*[^/]*)?\.json", pattern)  # Prometheus takes * in the last part only
    write_targets(targets_file(tmp_path / "runs", "pets"), "pets", ["a:9400"])
    (tmp_path / "deploy").mkdir()
    assert len([*(tmp_path / "deploy").glob(pattern)]) == 1


def test_the_directory_tells_what_was_set_last() -> None:
    with Directory("127.0.0.1", 0) as directory:
        assert directory.url == f"http://127.0.0.1:{port_of(directory.url)}/targets"
        assert fetch(directory.url) == ("application/json", [])
        directory.set(entries_of("pets", ["old:1", "old:2", "old:3"]))
        directory.set(entries_of("pets", ["a:9400", "b:9401"]))
        _, entries = fetch(directory.url)
        assert [entry["targets"] for entry in entries] == [["a:9400"], ["b:9401"]]
        assert entries[1]["labels"] == {"__meta_thawline_run": "pets", "__meta_thawline_rank": "1"}
        directory.set([])
        assert fetch(directory.url)[1] == []


def test_two_directories_take_two_ports_and_do_not_mix() -> None:
    with Directory("127.0.0.1", 0) as first, Directory("127.0.0.1", port_of(first.url)) as second:
        first.set(entries_of("a", ["a:1"]))
        second.set(entries_of("b", ["b:1"]))
        assert [fetch(each.url)[1][0]["targets"] for each in (first, second)] == [["a:1"], ["b:1"]]


def test_a_directory_answers_nothing_else_and_lets_nobody_hold_it_up() -> None:
    with Directory("127.0.0.1", 0) as directory:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(directory.url.replace("/targets", "/etc/passwd"))
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(directory.url, data=b"[]", timeout=5)
        with socket.create_connection(("127.0.0.1", port_of(directory.url))):  # says nothing
            assert fetch(directory.url)[1] == []


def test_closing_a_directory_frees_its_port_and_ends_its_thread() -> None:
    directory = Directory("127.0.0.1", 0)
    fetch(directory.url)
    directory.close()
    directory.close()
    with pytest.raises(urllib.error.URLError):
        fetch(directory.url)
    assert not [thread for thread in threading.enumerate() if thread.name == "thawline-targets"]
    with Directory("127.0.0.1", port_of(directory.url)) as again:
        assert again.url == directory.url


def test_a_directory_on_every_address_names_one_that_answers_and_a_port_beyond_the_last_falls_back() -> None:
    with Directory("0.0.0.0", 65536) as directory:
        assert "0.0.0.0" not in directory.url
        assert fetch(directory.url)[1] == []


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OSError, match=r"assign|Name"):
        Directory("192.0.2.1", 0)


def test_targets_that_cannot_be_written_are_noted_and_end_no_run(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("no folder")
    job, notes = Job(name="pets", storage=str(tmp_path / "runs")), list[str]()
    with Exporter(run="pets", rank=0, host="127.0.0.1", port=0) as exporter, ExitStack() as stack:
        learner = SimpleNamespace(recorder=SimpleNamespace(sinks=[exporter]), note=notes.append)
        run._announce(job, LocalContext(run_dir=tmp_path), cast(Learner, learner), stack)
    assert len(notes) == 1
    assert "pets.targets.json cannot be written" in notes[0]
