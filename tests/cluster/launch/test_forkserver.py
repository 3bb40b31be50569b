"""Forked workers: with the asker's environment and outputs, gone when it is; the server gone with its owner."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from thawline.cluster.launch import ray_train
from thawline.cluster.launch.forkserver import ForkServer, fork, socket_of

SERVER = """
import os, sys, threading, time
from pathlib import Path
from thawline.cluster.launch.forkserver import serve

def main(link, part):
    def listen():
        try:
            link.recv()
        except EOFError:
            os._exit(1)
    threading.Thread(target=listen, daemon=True).start()
    link.send((os.getpid(), os.environ.get("THAWLINE_TOLD"), os.environ.get("THAWLINE_OWN"), part, imported))
    print("said by the child", flush=True)
    if part.get("raise"):
        raise ValueError("the child has failed")
    time.sleep(part.get("sleep", 0))

imported = os.getpid()
serve(Path(sys.argv[1]), main)
"""


@contextmanager
def serving(folder: Path, code: str = SERVER) -> Iterator[tuple[Path, "subprocess.Popen[bytes]"]]:
    path = folder / "own" / "fork"
    path.parent.mkdir()
    environment = os.environ | {"THAWLINE_OWN": "the server's"}
    server = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, env=environment)
    try:
        yield path, server
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(timeout=20)


def ended(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_children_are_forked_with_what_the_asker_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path) as (path, server):
        monkeypatch.setenv("THAWLINE_TOLD", "x" * 300_000)  # longer than a socket's buffer
        pids = set()
        for number in (1, 2):
            with fork(path, {"number": number}, wait_s=20) as link:
                pid, told, own, part, imported = link.recv()
                assert (told, own, part, imported) == ("x" * 300_000, None, {"number": number}, server.pid)
                pids.add(pid)
                with pytest.raises(EOFError):  # it has ended, and so has the connection
                    link.recv()
        assert len(pids | {server.pid, os.getpid()}) == 4
        assert path.stat().st_mode & 0o777 == 0o600
    assert capfd.readouterr().out == "said by the child\n" * 2
    assert not path.parent.exists()


def test_a_child_ends_when_its_asker_has_gone(tmp_path: Path) -> None:
    with serving(tmp_path) as (path, _):
        link = fork(path, {"sleep": 600}, wait_s=20)
        pid = link.recv()[0]
        link.close()
        assert ended(pid, within_s=20)


def test_a_child_that_fails_harms_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path) as (path, _):
        for number in range(3):
            with fork(path, {"raise": True, "number": number}, wait_s=20) as link:
                assert link.recv()[3]["number"] == number
                with pytest.raises(EOFError):
                    link.recv()
    assert capfd.readouterr().err.count("ValueError: the child has failed") == 3


def test_words_that_break_off_fork_nothing(tmp_path: Path) -> None:
    import socket

    with serving(tmp_path) as (path, server):
        with fork(path, {}, wait_s=20) as link:  # it stands
            link.recv()
        broken = socket.socket(socket.AF_UNIX)
        broken.connect(str(path))
        broken.send(b'{"env": {')
        broken.close()
        with fork(path, {}, wait_s=20) as link:
            assert link.recv()[4] == server.pid


def test_where_no_server_stands_it_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"no process at .* after 0.3 s .*: this machine cannot start a worker"):
        fork(tmp_path / "fork", {}, wait_s=0.3)


@pytest.mark.slow
def test_what_is_imported_before_a_fork_has_touched_neither_dali_nor_cuda() -> None:
    """A process that CUDA has been started in cannot be forked, and a thread does not come along."""
    code = (
        "import sys, threading, thawline.cluster.launch.worker_part, torch\n"
        "print('nvidia.dali' in sys.modules, torch.cuda.is_initialized(), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "1"]


@pytest.mark.slow
def test_a_server_that_is_closed_leaves_nothing() -> None:
    name = f"test{os.getpid()}"
    server, path = ForkServer(name, "here"), socket_of(name, "here")
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, "it did not come up"
        time.sleep(0.05)
    server.close()
    assert not path.parent.exists()


def test_a_machine_has_one_server_for_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is silent for a moment, or about to be taken away, keeps its own: a second would take its socket."""
    started: list[str] = []
    closed: list[str] = []

    class Server:
        def __init__(self, name: str, node: str) -> None:
            self.node = node
            started.append(node)

        def close(self) -> None:
            closed.append(self.node)

    monkeypatch.setattr(ray_train, "ForkServer", Server)
    seen = iter((["a"], ["a", "b"], ["b"], ["a", "b"]))
    monkeypatch.setattr(ray_train, "answering", lambda: next(seen))
    with ray_train.Forks(local=True) as forks:
        for _ in range(3):
            forks.look()
        assert started == ["a", "b"]
    assert closed == ["a", "b"]
