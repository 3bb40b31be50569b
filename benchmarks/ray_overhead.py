"""What does Ray cost? The same job with Ray Train workers and under torchrun, taking turns on the same machine.

A pair is two whole runs, each in processes of its own, as a user starts it. When both have trained for an epoch they
take turns of seconds, one frozen (SIGSTOP) while the other trains: a machine's speed may change by a third within
minutes, and so it changes for both. Counted are the windows of steps that their recorders wrote, those that lie within
a turn. The two see the same samples in the same order and end with the same stream_hash, or the benchmark fails.
`started_s` is from the command to the first step, where Ray takes seconds more.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from thawline.benchmarks.harness import BenchmarkError, DeviceName, check_positive, open_device, report, say, spread
from thawline.cluster.cli.index import make_manifest
from thawline.dataio.samples import write_digits

QUESTION = "what does Ray cost?"
LAUNCHERS = ("ray", "torchrun")
_SETTLE_S = 0.5  # a process that was frozen finds its caches cold, and its timers late
Turn = tuple[float, float]  # unix seconds
_JOB = """
name = "{name}"
manifest = "{folder}/digits.parquet"
storage = "{folder}/runs"
workers = {workers}
device = "{device}"
log_every = 1
[data]
size_px = {size_px}
presize_px = {presize_px}
global_batch = {batch}
[augment]
preset = "digits"
[model]
name = "resnet18"
weights = "none"
[fit]
recipe = "one_cycle"
epochs = {epochs}
[metrics]
port = 0
"""


@dataclass(frozen=True)
class Run:
    """One run. images_per_s: of its windows within its turns. started_s: from the command to its first step."""

    images_per_s: float
    started_s: float
    stream_hash: str


def main(
    *,
    device: DeviceName = "cpu",
    workers: int = 2,
    pairs: int = 5,
    epochs: int = 3,
    batch: int = 64,
    size_px: int = 64,
    turn_s: float = 3.0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure images/s of both, and the ratio of each pair of runs.

    Args:
        device: Where to train.
        workers: Processes of either.
        pairs: Runs of each, two at a time; who begins changes.
        epochs: Of 1,438 digits, in a run; the first is not counted.
        batch: Images a step, over all workers.
        size_px: Side of the images.
        turn_s: How long one trains while the other is frozen.
        out: Also write the JSON here.
    """
    open_device(device)
    check_positive(workers=workers, pairs=pairs, epochs=epochs, batch=batch, size_px=size_px, turn_s=turn_s)
    runs: dict[str, list[Run]] = {name: [] for name in LAUNCHERS}
    settings = {"device": device, "workers": workers, "epochs": epochs, "batch": batch, "size_px": size_px}
    with tempfile.TemporaryDirectory(prefix="thawline-bench-") as made:
        folder = Path(made)
        write_digits(folder / "digits")
        make_manifest(folder / "digits", label=r"regex:(.+)_\d+\.jpg$", valid="0.2", seed=42).save(
            folder / "digits.parquet"
        )
        for pair in range(pairs):
            say(f"pair {pair + 1} of {pairs}")
            jobs = {name: folder / f"{name}{pair}.toml" for name in LAUNCHERS[:: 1 if pair % 2 == 0 else -1]}
            for job in jobs.values():
                job.write_text(_JOB.format(name=job.stem, folder=folder, presize_px=size_px * 5 // 4, **settings))
            for name, run in one_pair(jobs, folder / "runs", workers=workers, turn_s=turn_s).items():
                runs[name].append(run)
    return report("ray_overhead", QUESTION, settings | {"pairs": pairs, "turn_s": turn_s}, compared(runs), out=out)


def command(launcher: str, job: Path, *, workers: int) -> list[str]:
    """What a user types."""
    thawline = ["-m", "thawline.cluster.cli", "train", str(job)]
    if launcher == "ray":
        return [sys.executable, *thawline]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return [sys.executable, *torchrun, *thawline]


def one_pair(jobs: Mapping[str, Path], runs: Path, *, workers: int, turn_s: float) -> dict[str, Run]:
    """Run the job of each launcher to its end, in turns. Raises BenchmarkError when one fails."""
    turns: dict[str, list[Turn]] = {name: [] for name in jobs}
    with contextlib.ExitStack() as ending:
        started = {}
        for name, job in jobs.items():
            one = ending.enter_context(_running(command(name, job, workers=workers), job.with_suffix(".log")))
            one.wait_for("train_loss")  # the head of the table that the first epoch's end prints
            one.freeze()
            started[name] = one
        while all(one.process.poll() is None for one in started.values()):
            for name, one in started.items():
                turns[name].append(one.take_turn(turn_s))
        for one in started.values():
            one.finish()
    return {name: _read(runs / job.stem, turns[name], began=started[name].began) for name, job in jobs.items()}


@dataclass
class _Started:
    """A command that runs, with all of its processes, and what it says."""

    process: "subprocess.Popen[bytes]"
    log: Path
    began: float

    def wait_for(self, text: str) -> None:
        while text not in self.log.read_text():
            if self.process.poll() is not None:
                raise BenchmarkError(self._failed("ended before it trained"))
            time.sleep(0.1)

    def take_turn(self, seconds: float) -> Turn:
        self.thaw()
        began = time.time()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)
        ended = time.time()
        self.freeze()
        return began, ended

    def finish(self) -> None:
        self.thaw()
        if self.process.wait():
            raise BenchmarkError(self._failed("failed"))

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(number)

    def _failed(self, how: str) -> str:
        words = " ".join(map(str, self.process.args[1:]))  # type: ignore[index]  # a list, below
        return f"{words} {how}: nothing can be compared; it said: {self.log.read_text()[-2000:]}"


@contextlib.contextmanager
def _running(words: Sequence[str], log: Path) -> Iterator[_Started]:
    """A command, and its end at the latest when the block ends."""
    # torchrun would give its workers one thread of OpenMP each, and Ray as many as each has cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as said:
        began = time.time()
        # A session of its own: what is stopped is sent SIGHUP when the shell that began all this ends.
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=said, env=environment, start_new_session=True
        )
    started = _Started(process, log, began)
    try:
        yield started
    finally:
        if process.poll() is None:
            started.thaw()
            process.send_signal(signal.SIGINT)
            process.wait()


def _read(folder: Path, turns: Sequence[Turn], *, began: float) -> Run:
    result = json.loads((folder / "result.json").read_text())
    rows = [row for row in pq.read_table(folder / "rows.parquet").to_pylist() if row["kind"] == "train"]
    return Run(images_per_s(rows, turns), rows[0]["unix_s"] - rows[0]["window_s"] - began, result["stream_hash"])


def images_per_s(rows: Sequence[dict[str, Any]], turns: Sequence[Turn]) -> float:
    """Of a recorder's rows of training: the windows that lie within a turn, images by their seconds."""
    counted = [
        row
        for row in rows
        if any(
            began + _SETTLE_S <= row["unix_s"] - row["window_s"] and row["unix_s"] <= ended for began, ended in turns
        )
    ]
    if not counted:
        raise BenchmarkError(
            "no window lies within a turn: nothing is measured; give more --epochs or a longer --turn-s"
        )
    return float(sum(row["images"] for row in counted) / sum(row["window_s"] for row in counted))


def compared(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """A row a launcher, and one with the ratio of each pair; stderr is the standard error of their mean."""
    if len({run.stream_hash for each in runs.values() for run in each}) > 1:
        raise BenchmarkError("the runs saw different samples: their speeds cannot be compared; this is a fault of ours")
    rows: dict[str, dict[str, Any]] = {
        name: {
            "images_per_s": spread([run.images_per_s for run in each]),
            "started_s": spread([run.started_s for run in each]),
        }
        for name, each in runs.items()
    }
    ours, theirs = (np.array([run.images_per_s for run in runs[name]]) for name in LAUNCHERS)
    ratios = ours / theirs
    stderr = float(ratios.std(ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else float("nan")
    rows["ray / torchrun"] = {"ratio": spread(ratios), "mean": float(ratios.mean()), "stderr": stderr}
    return rows
