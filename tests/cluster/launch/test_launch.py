"""Starting and stopping: what this machine can hold, and what a signal means."""

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from thawline.cluster.errors import LaunchError
from thawline.cluster.job.job import Job
from thawline.cluster.launch import ray_connection
from thawline.cluster.launch.launch import ProcessContext
from thawline.cluster.machine.devices import check_cores, check_gpus, choose_device
from thawline.cluster.run.signals import exit_status, stop_on_signal

JOB = Job(manifest="m.parquet")


def test_the_device_is_the_best_there_is() -> None:
    assert choose_device(JOB) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device(replace(JOB, device="cpu")) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"no GPU here.*--device cpu"):
        choose_device(replace(JOB, device="cuda"))


def test_there_is_room_for_a_worker_a_core_and_no_more() -> None:
    cores = len(os.sched_getaffinity(0))
    check_cores(replace(JOB, workers=cores))
    check_gpus(replace(JOB, device="cpu", workers=cores))
    with pytest.raises(LaunchError, match=f"workers={cores + 1}.*{cores} CPU cores.*--workers {cores} or fewer"):
        check_cores(replace(JOB, workers=cores + 1))


def test_the_first_signal_asks_and_a_second_interrupt_insists() -> None:
    context = ProcessContext(Path("unused"), torch.device("cpu"))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signal(context.request_stop):
        assert not context.should_stop()
        signal.raise_signal(signal.SIGTERM)
        assert context.should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_counts_while_the_first_is_still_asking() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal(lambda: signal.raise_signal(signal.SIGINT)):
        signal.raise_signal(signal.SIGTERM)


def test_what_hangs_as_a_runs_own_ray_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["bash", "-c", "sleep 600 & echo $!; wait"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as raylet:
        assert raylet.stdout is not None
        hanging = psutil.Process(int(raylet.stdout.readline()))
        node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=raylet)]})
        monkeypatch.setattr("ray._private.worker._global_node", node)
        monkeypatch.setattr(ray_connection, "_END_S", 0.1)
        with ray_connection._none_left():
            raylet.kill()
            raylet.wait()
            assert hanging.is_running()
        assert psutil.wait_procs([hanging], timeout=10)[0] == [hanging]
    with ray_connection._none_left():  # it has died before: nothing to do, and no error
        pass


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with stop_on_signal(lambda: None):
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == []


HANGS = """
import signal, sys
from concurrent.futures import ThreadPoolExecutor
from thawline.cluster.run import signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored for what it runs beside itself
signals._UNWIND_S = 1.0
with signals.ending_when_interrupted(), ThreadPoolExecutor() as pool, signals.stop_on_signal(lambda: print("asked")):
    reading = pool.submit(lambda: (print("reads", flush=True), open(sys.argv[1])))
    reading.result()
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_what_a_thread_that_hangs_holds_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = [sys.executable, "-u", "-c", HANGS, str(tmp_path / "pipe")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_asks_as_sigterm_does_unless_somebody_wanted_it_ignored(ignored: bool) -> None:
    context = ProcessContext(Path("unused"), torch.device("cpu"))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with stop_on_signal(context.request_stop):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert context.should_stop() is not ignored


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_which_signal_asked_is_told_as_an_exit_status(number: signal.Signals, status: int) -> None:
    with stop_on_signal(lambda: None):
        assert exit_status() == 143, "nobody has sent a signal: `thawline stop`"
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
    assert exit_status() == status


def test_a_request_is_made_though_nobody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(fd: int, words: bytes) -> int:
        raise OSError(errno.EIO, "the terminal is gone")

    monkeypatch.setattr(os, "write", gone)
    context = ProcessContext(Path("unused"), torch.device("cpu"))
    with stop_on_signal(context.request_stop):
        signal.raise_signal(signal.SIGTERM)
    assert context.should_stop()


def test_ray_finds_a_folder_of_its_own_and_a_home_but_a_cluster_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("RAY_TMPDIR", "HOME"):
        monkeypatch.delenv(name, raising=False)
    with ray_connection.surroundings(tmp_path, local=True):
        assert os.environ["RAY_TMPDIR"] == str(tmp_path)
        assert "HOME" not in os.environ, "the user's name tells"
    monkeypatch.setattr(Path, "home", nowhere)
    with ray_connection.surroundings(tmp_path, local=False):
        assert "RAY_TMPDIR" not in os.environ, "its address is looked up below that"
        assert os.environ["HOME"] == str(tmp_path)
    assert "HOME" not in os.environ
    monkeypatch.setenv("RAY_TMPDIR", "/mine")
    with ray_connection.surroundings(tmp_path, local=True):
        assert os.environ["RAY_TMPDIR"] == "/mine"
    assert os.environ["RAY_TMPDIR"] == "/mine"


def test_a_ray_that_runs_already_and_one_of_another_python_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def mismatch(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\n")

    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: True)
        with (
            pytest.raises(LaunchError, match=r"Ray runs in this process already .*ray\.shutdown"),
            ray_connection.connected(JOB, "local", tmp_path),
        ):
            pass
    monkeypatch.setattr(ray, "init", mismatch)
    words = rf"{sys.executable} has another Ray or Python than the cluster \(Version mismatch: .* Python: 3.12.1\): "
    with pytest.raises(LaunchError, match=words), ray_connection.connected(JOB, "local", tmp_path):
        pass
