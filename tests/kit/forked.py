"""How does a test start a process quickly? By forking one that has already imported torch, DALI and thawline.

Imports take most of the time of a small run. A few tests start processes as a user does; all others fork.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PRELOADED = [
    *("thawline.cluster.cli.main", "thawline.cluster.cli.train", "thawline.cluster.launch.launch"),
    *("thawline.cluster.run.run", "thawline.cluster.results.report", "thawline.trainer.metrics.meter"),
    *("nvidia.dali.fn", "nvidia.dali.pipeline", "tests.kit.ranks"),
]


def preloaded() -> "multiprocessing.context.ForkServerContext":
    """The context whose processes are forked, before any thread starts, from one that has done these imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _child(call: Callable[..., None], arguments: tuple[Any, ...], env: Mapping[str, str], cwd: Path, out: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for name, number in (("stdout", 1), ("stderr", 2)):
        with (out / name).open("ab") as file:
            os.dup2(file.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    call(*arguments)


PICTURES = 8
"""In place of the 24 images that a report shows twice: to draw them takes longer than a small run."""


def light_runs() -> None:
    """Limit runs of this process to one core, since others run beside it, and their reports to a few pictures."""
    from thawline.cluster.results import report
    from thawline.cluster.run import run

    setattr(run, "default_threads", lambda _: 1)  # noqa: B010  # mypy would refuse an assignment
    setattr(report, "SHOWN", PICTURES)  # noqa: B010


def _pause_after_steps(step_s: float) -> None:
    """From now on every step of a run in this process ends with a pause: time to kill it at a step of one's choice."""
    from thawline.trainer.phase_run import PhaseRun

    step = PhaseRun._step

    def paused(self: PhaseRun) -> None:
        step(self)
        time.sleep(step_s)

    setattr(PhaseRun, "_step", paused)  # noqa: B010  # as above


def _command(words: list[str], step_s: float) -> None:
    from thawline.cluster.cli import jobs
    from thawline.cluster.cli.__main__ import start

    setattr(jobs, "_BEGIN_S", 100.0)  # noqa: B010  # `submit` waits longer for a job on a machine that is busy with tests
    light_runs()
    if step_s:
        _pause_after_steps(step_s)
    sys.argv = ["thawline", *words]
    start()


class Forked:
    """A process that calls a function in its parent's folder; has what tests need of a `subprocess.Popen`."""

    def __init__(self, call: Callable[..., None], *arguments: Any, env: Mapping[str, str]) -> None:
        self._out = Path(tempfile.mkdtemp(prefix="forked-"))
        for name in ("stdout", "stderr"):
            (self._out / name).touch()
        self._process = preloaded().Process(target=_child, args=(call, arguments, dict(env), Path.cwd(), self._out))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit status; None while it goes on, and minus the signal's number if one ended it."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """As `poll`."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        """What it has written to stderr so far."""
        return (self._out / "stderr").read_text()

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for its end: (stdout, stderr). Raises TimeoutError."""
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"process {self.pid} took more than {timeout} s and said:\n{self.said()}")
        return (self._out / "stdout").read_text(), self.said()


def thawline_process(words: list[str], env: Mapping[str, str], *, step_s: float = 0) -> Forked:
    """`thawline WORDS`, going on. step_s: a pause after each training step."""
    return Forked(_command, words, step_s, env=env)
