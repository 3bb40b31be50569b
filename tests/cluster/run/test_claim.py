"""Who may write into a run's folder? One at a time, in a folder and in a store; and nobody waits for the dead."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from thawline.cluster.errors import StorageError
from thawline.cluster.run import claim
from thawline.cluster.run.claim import claimed
from thawline.dataio.store.atomic import atomic_write, sweep
from thawline.dataio.store.root import Root

pytest_plugins = ["tests.kit.stores"]

BEAT_S = 0.1


@pytest.fixture(params=["folder", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claim, "_SETTLE_S", 0.2)
    if request.param == "folder":
        return str(tmp_path / "runs/a")
    uri: str = request.getfixturevalue("s3").format("runs/a")
    return uri


def take(folder: str, told: list[str], lost: Callable[[str], None] | None = None) -> None:
    with claimed(Root.of(folder), tell=told.append, beat_s=BEAT_S, lost=lost):
        assert claim.FILE in Root.of(folder).listing()


def hold(folder: str, link: Connection) -> None:
    """In another process: hold the folder until the end of the link."""
    with claimed(Root.of(folder), tell=print, beat_s=BEAT_S):
        link.send(os.getpid())
        link.poll(60)


def begin(folder: str) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(folder, theirs), daemon=True)
    process.start()
    assert ours.recv() == process.pid
    return process, ours


def test_a_second_start_is_refused_by_whom_since_when_and_a_third_follows_the_first(folder: str) -> None:
    told: list[str] = []
    with claimed(Root.of(folder), tell=told.append, beat_s=BEAT_S):
        who = rf"process {os.getpid()} on {socket.gethostname()} since \d\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(StorageError, match=rf"{who}.*another --name"):
            take(folder, told)
    assert [text for text in told if "waiting" not in text] == []
    take(folder, told)
    assert claim.FILE not in Root.of(folder).listing()
    assert "://" in folder or not Path(folder).exists(), "nothing was written, and nothing is left"


@pytest.mark.slow
def test_who_is_killed_holds_nothing(folder: str) -> None:
    process, _ = begin(folder)
    with pytest.raises(StorageError, match=f"process {process.pid} on"):
        take(folder, [])
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    told: list[str] = []
    began = time.monotonic()
    take(folder, told)
    waited_s = time.monotonic() - began
    assert f"process {process.pid} on" in told[-1]
    assert told[-1].endswith("which is gone: taken over")
    if "://" in folder:
        assert waited_s >= claim._MISSED * BEAT_S, "it might have lived"
    else:
        assert waited_s < claim._MISSED * BEAT_S, "a lock ends with its process"


def test_a_claim_of_another_machine_is_watched_whatever_the_lock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's file system whose locks the machines do not share."""
    folder = str(tmp_path / "a")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with claimed(Root.of(folder), tell=print, beat_s=BEAT_S):
        monkeypatch.setattr(claim, "_machine", lambda: "elsewhere")
        with pytest.raises(StorageError, match=r"is held by process"):
            take(folder, [])
    (tmp_path / "a").mkdir()
    dead = claim.Holder("elsewhere", 7, "2020-01-01 00:00:00+00:00", "another", "aa", BEAT_S, 3)
    (tmp_path / "a" / claim.FILE).write_text(json.dumps(asdict(dead)))
    told: list[str] = []
    take(folder, told)
    assert len(told) == 2
    assert told[1].endswith("process 7 on elsewhere since 2020-01-01 00:00:00+00:00, which is gone: taken over")


def test_where_nothing_can_be_locked_the_beat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(claim, "_SETTLE_S", 0.0)
    folder = str(tmp_path / "a")
    with claimed(Root.of(folder), tell=print, beat_s=BEAT_S), pytest.raises(StorageError, match=r"is held by process"):
        take(folder, [])


def test_who_stood_still_until_another_took_over_ends(folder: str) -> None:
    lost: list[str] = []
    with claimed(Root.of(folder), tell=print, beat_s=BEAT_S, lost=lost.append):
        other = claim.Holder("b", 8, "now", "another", "bb", BEAT_S, 1)
        filesystem, base = Root.of(folder).opened
        with filesystem.open_output_stream(f"{base}/{claim.FILE}") as out:
            out.write(json.dumps(asdict(other)).encode())
        until = time.monotonic() + 20
        while not lost and time.monotonic() < until:
            time.sleep(0.02)
    assert "was taken over by process 8 on b since now" in lost[0]
    assert claim.FILE in Root.of(folder).listing(), "the other's claim stands"


def test_a_full_storage_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        take(str(tmp_path / "a"), [])
    assert not (tmp_path / "a").exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """torch.compile's and a user's own pools fork; they may outlive the run."""
    folder, (seen, said) = str(tmp_path / "a"), os.pipe()
    process, _ = begin(folder)  # the lock of another process, as an oracle that locks do work here
    with pytest.raises(StorageError):
        take(folder, [])
    process.kill()
    process.join()
    with claimed(Root.of(folder), tell=print, beat_s=BEAT_S):
        child = os.fork()
        if child == 0:
            os.close(said)
            os.read(seen, 1)  # until the test is over
            os._exit(0)
    take(folder, [])
    os.close(said)
    os.waitpid(child, 0)


def test_two_writers_of_one_file_do_not_touch_one_another_and_the_dead_are_swept_up(tmp_path: Path) -> None:
    with atomic_write(Root.of(tmp_path), "a.txt") as one:
        one.write(b"one")
        with atomic_write(Root.of(tmp_path), "a.txt") as two:
            two.write(b"two")
        (tmp_path / ".a.txt.killed.tmp").write_text("left")
        sweep(Root.of(tmp_path))
        assert len(list(tmp_path.glob(".*.tmp"))) == 1, "the one that lives"
        assert (tmp_path / "a.txt").read_text() == "two"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "one"}
