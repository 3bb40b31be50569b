"""Does a run survive its end, or a disk's refusal, at every single write? Each is found by its count, and tried.

    python -m tests.campaigns.crash_points [--every N] [--side-by-side 1]

The run is a whole small one, as `thawline train` does it: claim, settings, two phases of the tiny body with a
checkpoint after every window, results, bundle, report. Whatever it opens for writing, writes, syncs, renames, makes or
removes below its storage is a point, and counted; a look at the files afterwards shows that none was missed. For each
point two runs are cut short there: one by an error of the disk (ENOSPC, or EIO where no room is needed), after half of
the bytes where it is a write; one by SIGKILL. The same command is then given again. In the end there must be the
unbroken run's weights, rows, predictions, stream_hash and result, bit by bit; what a checkpoint had committed before
the point must still have been there; and a command that failed must have said so in a sentence.

The report's figures are not drawn (seconds, of memory alone); its file is written. The claim's beat, which comes by the
clock, is no point.
"""

import argparse
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.campaigns.kills import differences
from tests.kit.forked import light_runs, preloaded
from tests.kit.images import flat_manifest
from tests.kit.runs import result
from thawline.dataio.store import atomic

DEADLINE_S = 300
MODES: tuple["Mode", ...] = ("error", "kill")
Mode = Literal["error", "kill"]
_ERRORS = {"open": errno.ENOSPC, "make": errno.ENOSPC, "write": errno.ENOSPC}
_JOB = """
manifest = "{manifest}"
storage = "{storage}"
name = "run"
seed = 7
log_every = 2
device = "cpu"
[data]
size_px = 32
presize_px = 40
global_batch = 8
engine = "reference"
threads = 1
[model]
name = "tiny"
weights = "none"
[fit]
recipe = "fine_tune"
epochs = 1
frozen_epochs = 1
lr = 3e-3
ema = 0.9
[checkpoint]
every_s = 0.0
keep = 2
best = "valid_loss"
[metrics]
port = 0
"""


@dataclass(frozen=True)
class Point:
    """What a run does to its storage. file: from the storage on, of a temporary name without what is drawn of it."""

    kind: str
    file: str

    def __str__(self) -> str:
        return f"{self.kind} {self.file}"


@dataclass(frozen=True)
class Fault:
    """Where a run is cut short (the first point is 0), and how."""

    k: int
    mode: Mode


@dataclass(frozen=True)
class Trial:
    """A run that was cut short and taken up again. wrong: what came out of it that must not, in sentences."""

    fault: Fault
    point: Point
    status: int
    """Of the command that was cut short: -9 where it was killed, 0 where an error did not keep it from its end."""
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        ended = {0: "went on", 1: "told", -signal.SIGKILL: "killed"}.get(self.status, f"ended with {self.status}")
        return f"{self.fault.k:4} {self.fault.mode:5} {ended:7} {self.point!s:60} -> {'; '.join(self.wrong) or 'equal'}"


# In the process that is cut short -------------------------------------------------------------------------


class Points:
    """Counts what happens below `folder`, writes each point into `record`, and cuts the process short at one."""

    def __init__(self, folder: Path, record: Path, fault: Fault | None) -> None:
        self._folder, self._fault = f"{folder}/", fault
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._count, self._lock = 0, threading.RLock()

    def install(self) -> None:
        """Look at everything this process does from now on; that cannot be undone."""
        sys.addaudithook(self._audit)
        real_sync, real_write, points = os.fsync, os.pwrite, self

        def fsync(fd: int) -> None:
            points.at("sync", _name(fd))
            real_sync(fd)

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            points.at("write", _name(fd), torn=lambda: real_write(fd, data[: len(data) // 2], offset))
            return real_write(fd, data, offset)

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                data = memoryview(data).cast("B")
                points.at("write", str(self.name), torn=lambda: super(File, self).write(data[: len(data) // 2]))
                return super().write(data)

        for owner, name, call in (
            (os, "fsync", fsync),
            (os, "pwrite", pwrite),
            (atomic, "_create", lambda file: File(file, "xb")),
        ):
            assert hasattr(owner, name)
            setattr(owner, name, call)

    def _audit(self, event: str, about: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(about[0], str | bytes | os.PathLike):
            if about[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.at("open", os.fspath(about[0]))
        elif event == "os.rename":
            self.at("rename", about[1])
        elif event in ("os.remove", "os.rmdir"):
            above = about[1]
            name = os.fsdecode(about[0])
            self.at("remove", name if above in (-1, None) else f"{_name(above)}/{name}")
        elif event == "os.mkdir":
            self.at("make", about[0])

    def at(self, kind: str, file: Any, *, torn: Any = None) -> None:
        """A point is reached: the process ends here, an OSError is raised, or nothing happens."""
        name = os.fsdecode(file)
        if not name.startswith(self._folder) or threading.current_thread().name == "thawline-claim":
            return
        name = re.sub(r"\.[0-9a-f]{12}\.tmp$", ".tmp", name.removeprefix(self._folder))
        with self._lock:
            k, self._count = self._count, self._count + 1
            os.write(self._record, f"{kind} {name}\n".encode())
        if self._fault is None or k != self._fault.k:
            return
        if torn is not None:
            torn()
        if self._fault.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = _ERRORS.get(kind, errno.EIO)
        raise OSError(number, os.strerror(number), name)


def _name(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def child(folder: Path, job: Path, fault: Fault | None, record: Path) -> None:
    """`thawline train JOB`, cut short at the fault. folder: the storage."""
    from thawline.cluster.cli.main import main
    from thawline.cluster.results import report

    with (folder.parent / "log").open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    setattr(report, "_curves", lambda *_: [])  # noqa: B010  # which mypy would refuse as an assignment
    setattr(report, "_shown", lambda *_: None)  # noqa: B010
    light_runs()
    sys.argv = ["thawline", "train", str(job)]
    Points(folder, record, fault).install()
    main()


# In the process that watches ------------------------------------------------------------------------------


class Campaign:
    """Trials against one unbroken run, all below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes = preloaded()
        self._manifest = folder / "flat.parquet"
        flat_manifest(folder / "flat", train=32, valid=6).save(self._manifest)
        status = self._start(folder / "unbroken", None)
        self.unbroken = folder / "unbroken" / "runs" / "run"
        if status != 0:
            raise AssertionError(f"the unbroken run ended with {status}: see {folder / 'unbroken' / 'log'}")
        self.points = _points(folder / "unbroken" / "record")
        self.check_complete()

    def check_complete(self) -> None:
        """Raises AssertionError unless a write was seen of every file that there is, and of all that was opened."""
        seen = {point.file for point in self.points if point.kind == "write"}
        temporary = {re.sub(r"([^/]+)$", r".\1.tmp", name): name for name in _files(self.folder / "unbroken" / "runs")}
        missed = sorted(name for of, name in temporary.items() if not {of, name} & seen)
        opened = {point.file for point in self.points if point.kind == "open"} - seen
        if missed or opened:
            raise AssertionError(f"written without a point: {missed}; opened, and no write was seen: {sorted(opened)}")

    def trial(self, fault: Fault) -> Trial:
        """Cut a run short, give its command again until it has ended, and compare."""
        folder = self.folder / f"{fault.k}-{fault.mode}"
        status = self._start(folder, fault)
        wrong = [*self._strayed(folder, fault), *self._lost(folder, fault), *_untold(folder, status, fault)]
        if self._start(folder, None) != 0:
            wrong.append("the same command failed when it was given again")
        elif not wrong:
            run = folder / "runs" / "run"
            wrong = [*differences(self.unbroken, run), *_unfinished(run), *self._left(folder, fault)]
        if not wrong:
            shutil.rmtree(folder)
        return Trial(fault, self.points[fault.k], status, tuple(wrong))

    def _start(self, folder: Path, fault: Fault | None) -> int:
        folder.mkdir(exist_ok=True)
        job, storage = folder / "job.toml", folder / "runs"
        job.write_text(_JOB.format(manifest=self._manifest, storage=storage))
        record = folder / ("record" if fault is None else "record of the broken")
        process = self._processes.Process(target=child, args=(storage, job, fault, record))
        process.start()
        process.join(DEADLINE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return 124
        return process.exitcode

    def _strayed(self, folder: Path, fault: Fault) -> list[str]:
        """Whether the run came to its fault by other points than the unbroken one."""
        came, planned = _points(folder / "record of the broken")[: fault.k + 1], self.points[: fault.k + 1]
        return [] if came == planned else [f"it came to {came[-1] if came else 'nothing'}, not to {planned[-1]}"]

    def _lost(self, folder: Path, fault: Fault) -> list[str]:
        """Whether a checkpoint is gone that had been committed before the fault, and was not older than those kept."""
        commits = [
            int(found[1])
            for point in self.points[: fault.k]
            if (found := re.fullmatch(r"rename run/checkpoints/step_(\d+)/manifest\.json", str(point)))
        ]
        there = (folder / "runs" / "run" / "checkpoints").glob("step_*/manifest.json")
        newest = max((int(file.parent.name[5:]) for file in there), default=0)
        if commits and newest < max(commits):
            return [f"checkpoint {max(commits)} was committed, and the newest is {newest}"]
        if any(str(point) == "rename run/result.json" for point in self.points[: fault.k]):
            try:
                result(folder / "runs" / "run")
            except (OSError, json.JSONDecodeError) as error:
                return [f"result.json was committed, and now: {error}"]
        return []

    def _left(self, folder: Path, fault: Fault) -> list[str]:
        """Files that the unbroken run's storage does not have, or that are missing.

        Which checkpoints are kept depends on which could be written. A run that has its result is not touched again:
        it may lack its report, and keep a stale claim.
        """
        here, there = _files(folder / "runs"), _files(self.folder / "unbroken" / "runs")
        odd = sorted(name for name in here ^ there if not name.startswith("run/checkpoints/"))
        if "rename run/result.json" in map(str, self.points[: fault.k]):
            odd = [name for name in odd if not name.endswith((".tmp", "/report.html", "/claim.json"))]
        return [f"other files than the unbroken run's: {odd}"] if odd else []


def _files(storage: Path) -> set[str]:
    return {file.relative_to(storage).as_posix() for file in storage.rglob("*") if file.is_file()}


def _points(record: Path) -> list[Point]:
    return [Point(*line.split(" ", 1)) for line in record.read_text().splitlines()]


def _unfinished(run: Path) -> list[str]:
    """Checkpoints in which something else lies than their manifest says."""
    odd = {}
    for folder in (run / "checkpoints").iterdir():
        manifest, names = folder / "manifest.json", {file.name for file in folder.iterdir()}
        listed = json.loads(manifest.read_text())["parts"].values() if manifest.is_file() else ()
        if names != {"manifest.json", *(part["file"] for part in listed)}:
            odd[folder.name] = sorted(names)
    return [f"left behind: {odd}"] if odd else []


def _untold(folder: Path, status: int, fault: Fault) -> list[str]:
    """Whether the command that was cut short ended in another way than it may."""
    log = (folder / "log").read_text()
    if fault.mode == "kill":
        return [] if status == -signal.SIGKILL else [f"it ended with {status}, and was to be killed"]
    if "Traceback" in log:
        return [f"a traceback in place of a sentence: {log.strip().splitlines()[-1]}"]
    reasons = [os.strerror(number) for number in (errno.ENOSPC, errno.EIO)]
    if status not in (0, 1) or (status == 1 and not any(reason in log for reason in reasons)):
        return [f"it ended with {status} and told nothing of the disk"]
    return []


def chosen(points: Sequence[Point], *, every: int) -> list[Fault]:
    """Every N-th point by both faults, and the first of each kind on each kind of file whatever N is."""
    found, seen = list[Fault](), set[tuple[str, str]]()
    for k, point in enumerate(points):
        sort = (point.kind, re.sub(r"\d+", "#", point.file))
        if k % every == 0 or sort not in seen:
            found += [Fault(k, mode) for mode in MODES]
        seen.add(sort)
    return found


def summary(trials: Sequence[Trial]) -> str:
    """A table: a line a kind of point."""
    lines = [f"{'kind':8} {'points':>6} {'trials':>6} {'equal':>6} {'killed':>6} {'told':>6} {'went on':>7}"]
    for kind in sorted({trial.point.kind for trial in trials}):
        own = [trial for trial in trials if trial.point.kind == kind]
        ended = Counter(trial.status for trial in own)
        counts = (len({t.fault.k for t in own}), len(own), sum(not t.wrong for t in own), ended[-signal.SIGKILL])
        lines.append(f"{kind:8} " + " ".join(f"{n:6}" for n in (*counts, ended[1])) + f" {ended[0]:7}")
    return "\n".join([*lines, f"{sum(not trial.wrong for trial in trials)} of {len(trials)} equal"])


def main() -> int:
    """The command. 0 when every run came out equal, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.crash_points", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--side-by-side", type=int, default=1)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crash-points-"))
    campaign = Campaign(folder)
    faults = chosen(campaign.points, every=max(1, given.every))
    print(f"{len(campaign.points)} points, {len(faults)} trials", flush=True)
    done = list[Trial]()
    with ThreadPoolExecutor(given.side_by_side) as pool:
        for trial in pool.map(campaign.trial, faults):
            print(trial, flush=True)
            done.append(trial)
    print(summary(done))
    if any(trial.wrong for trial in done):
        print(f"kept in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
