"""Does a run end as if nothing had been, whenever it is killed? SIGKILL, resume, compare: N times.

    python -m tests.campaigns.kills 100 [--seed S] [--workers-in-parallel 1]

A trial is a whole small job on real digits (DALI, a frozen and an unfrozen phase, MixUp, averaged weights; half of the
trials wait for every checkpoint, half write them beside the training). The kernel kills it at a random time within a
random occurrence of one of moments.KINDS, a quarter of the trials twice; then it is resumed to its end. It must
end with the unbroken run's stream_hash, counts, rows, predictions and weights, bit by bit. Marks in shared memory,
which outlive the process, say where it really was when it died: a kill that missed its moment fails the command too.

The model is a ResNet of half a million weights and no report is drawn: neither takes part in what is compared.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from tests.kit.forked import light_runs, preloaded
from tests.kit.moments import KINDS, PARTS, SITES, Kill, Marks, install, moment
from tests.kit.runs import digits_manifest, planned_hash, result, write_job
from thawline.cluster.job import job as jobs
from thawline.cluster.job.job import Job
from thawline.cluster.results import outcome
from thawline.cluster.run import run as life
from thawline.cluster.run.folder import run_dir
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.context import LocalContext

DEADLINE_S = 600


@dataclass(frozen=True)
class Hit:
    """A kill, and what was found after it. steps: taken since the run began; resumed: the newest whole checkpoint's."""

    kill: Kill
    inside: bool
    """The marks say that the process died within its moment."""
    steps: int
    resumed: int
    unfinished: dict[str, set[str]]
    """Folders without a manifest -> the files in them."""

    @property
    def ready(self) -> bool:
        """Whether an unfinished checkpoint lacks nothing but its manifest."""
        return any(names >= PARTS for names in self.unfinished.values())

    def __str__(self) -> str:
        left = "".join(f", left {name} with {' '.join(sorted(names))}" for name, names in self.unfinished.items())
        where = f"{self.kill.site} {self.kill.occurrence} after {self.kill.delay_s * 1e3:.2f} ms"
        missed = "" if self.inside else " MISSED"
        return f"{where}{missed}: {self.steps - self.resumed} steps lost, on from {self.resumed}{left}"


@dataclass(frozen=True)
class Trial:
    """A run that was killed and resumed. wrong: in what it differs from the unbroken one, in sentences."""

    number: int
    kind: str
    waits: bool
    hits: list[Hit]
    wrong: list[str]
    redrawn: int = 0

    def __str__(self) -> str:
        mode = "waiting" if self.waits else "beside"
        hits = " | then ".join(map(str, self.hits))
        end = "; ".join(self.wrong) or "equal"
        return f"{self.number:3} {self.kind:15} {mode:7} {hits} -> {end}"


# In the process that dies ---------------------------------------------------------------------------------


def child(job: Job, kill: Kill | None, marks_file: Path, log: Path) -> None:
    """A process of a trial: `run` as everybody calls it."""
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    light_runs()
    marks = Marks(marks_file)
    inside = partial(moment, marks, kill)
    install(inside, marks)
    setattr(outcome, "_picture", lambda *args: None)  # noqa: B010  # seconds of drawing, after the training
    with inside("run"):
        life.run(job, LocalContext(run_dir=run_dir(job)))


# In the process that watches ------------------------------------------------------------------------------


class Campaign:
    """Trials against one unbroken run, all below `folder`."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self._processes = preloaded()
        self.manifest = digits_manifest(folder, count=250)
        job = jobs.from_toml(write_job(folder, self.manifest))
        self._job = replace(
            job,
            log_every=3,
            fit=replace(job.fit, recipe="fine_tune", epochs=1, frozen_epochs=1, ema=0.9),
            augment=replace(job.augment, mixup=0.4),
            model=replace(job.model, name="tiny"),
        )
        self.unbroken = self._start(folder / "unbroken", None, waits=True, part=0)[1]
        self._sites = {site: self._marks(folder / "unbroken", 0).of(site) for site in SITES}
        made = result(self.unbroken)
        if made["stream_hash"] != planned_hash(self.manifest, made["steps"]) or not made["steps"]:
            raise AssertionError(f"the unbroken run did not take what was planned: {made}")

    def trial(self, number: int) -> Trial:
        """A function of (seed, number), but for what the clock decides."""
        draw = np.random.default_rng([self.seed, number])
        kind, waits = list(KINDS)[number % len(KINDS)], bool(draw.random() < 0.5)
        for redrawn in range(20):
            kills = [self._draw(draw, kind)]
            if draw.random() < 0.25:
                kills.append(self._draw(draw, str(draw.choice(list(KINDS)))))
            folder = self.folder / f"trial-{number}-{redrawn}"
            trial = replace(self._run(folder, kills, waits=waits), number=number, kind=kind, redrawn=redrawn)
            if trial.hits or trial.wrong:
                break
            shutil.rmtree(folder)  # beside the training not every window is a checkpoint: there was no such occurrence
        else:
            return Trial(number, kind, waits, [], [f"no run came to a {kind} where it was to die"])
        if not trial.wrong:
            shutil.rmtree(folder)
        return trial

    def _draw(self, draw: np.random.Generator, kind: str) -> Kill:
        site = str(draw.choice(KINDS[kind]))
        _, times, seconds = self._sites[site]
        return Kill(kind, site, int(draw.integers(1, times + 1)), float(draw.uniform(0, seconds / times)))

    def _run(self, folder: Path, kills: Sequence[Kill], *, waits: bool) -> Trial:
        hits = list[Hit]()
        trial = Trial(0, "", waits, hits, [])
        for part, kill in enumerate((*kills, None)):
            status, run = self._start(folder, kill, waits=waits, part=part)
            marks = self._marks(folder, part)
            if hits and marks.resumed not in (hits[-1].resumed, -1):
                return replace(trial, wrong=[f"it went on from {marks.resumed}, not from {hits[-1].resumed}: {folder}"])
            if status == 0:
                break
            if kill is None or status != -signal.SIGKILL:
                return replace(trial, wrong=[f"a process ended with {status}: see {folder / 'log'}"])
            hits.append(_autopsy(kill, marks, run))
        if not hits:
            return trial
        wrong = [*differences(self.unbroken, run), *filter(None, [leftovers(run)])]
        return replace(trial, wrong=[f"{text} ({run})" for text in wrong])

    def _start(self, folder: Path, kill: Kill | None, *, waits: bool, part: int) -> tuple[int, Path]:
        """Run a child to its end, whichever; (exit status, the run's folder)."""
        folder.mkdir(exist_ok=True)
        every_s = 0.0 if waits else 0.02
        job = replace(self._job, storage=str(folder), checkpoint=replace(self._job.checkpoint, every_s=every_s))
        process = self._processes.Process(target=child, args=(job, kill, folder / f"marks-{part}", folder / "log"))
        process.start()
        process.join(DEADLINE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return 124, Path(run_dir(job))
        return process.exitcode, Path(run_dir(job))

    def _marks(self, folder: Path, part: int) -> Marks:
        return Marks(folder / f"marks-{part}")


def _autopsy(kill: Kill, marks: Marks, run: Path) -> Hit:
    """What a dead process has left, by a look at the folder that knows nothing of how checkpoints are read."""
    folders = {f: {file.name for file in f.iterdir()} for f in (run / "checkpoints").glob("step_*")}
    entered, left, _ = marks.of(kill.site)
    whole = [int(folder.name[5:]) for folder, names in folders.items() if "manifest.json" in names]
    resumed = max(whole, default=0)
    return Hit(
        kill=kill,
        inside=(entered, left) == (kill.occurrence, kill.occurrence - 1),
        steps=marks.resumed + marks.of("update")[1] if marks.resumed >= 0 else resumed,
        resumed=resumed,
        unfinished={folder.name: names for folder, names in folders.items() if "manifest.json" not in names},
    )


def differences(unbroken: Path, other: Path) -> list[str]:
    """What two finished runs' folders do not have in common, of all that no clock decides."""
    found = list[str]()
    one, two = result(unbroken), result(other)
    names = ("status", "steps", "epochs", "samples_seen", "valid_samples", "quarantined", "metrics", "stream_hash")
    found += [f"{name} is {two[name]}, not {one[name]}" for name in names if one[name] != two[name]]
    rows, more = _rows(unbroken), _rows(other)
    if len(rows) != len(more):
        found.append(f"{len(more)} rows, not {len(rows)}")
    found += [f"another row: {b}, not {a}" for a, b in zip(rows, more, strict=False) if a != b]
    images = sum(row["images"] for row in more if row["kind"] == "train")
    if images != two["samples_seen"]:
        found.append(f"the rows count {images} images of {two['samples_seen']}")
    if not pq.read_table(unbroken / "valid.parquet").equals(pq.read_table(other / "valid.parquet")):
        found.append("other predictions")
    return found + _other_weights(unbroken, other)


def _rows(run: Path) -> list[dict[str, Any]]:
    """The windows and validations of a run, without the columns that a clock fills."""
    table = pq.read_table(run / "rows.parquet")
    timed = [name for name in table.column_names if name.endswith("_s") or name in ("data_wait_fraction", "straggler")]
    rows = [row for row in table.drop_columns(timed).to_pylist() if row["kind"] in ("train", "valid")]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _other_weights(unbroken: Path, other: Path) -> list[str]:
    saved = [checkpoint.newest(run / "checkpoints")[0] for run in (unbroken, other)]
    if None in saved or saved[0].step != saved[1].step:  # type: ignore[union-attr]
        return [f"the last checkpoint is {saved[1]}, not {saved[0]}"]
    found = list[str]()
    for part in ("model", "ema"):
        one, two = (each.load(part) for each in saved if each is not None)
        same = one.keys() == two.keys() and all(_bits(one[name]) == _bits(two[name]) for name in one)
        found += [] if same else [f"other weights in {part}.pt"]
    return found


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().numpy().tobytes()


def leftovers(run: Path) -> str:
    """Folders below a run's checkpoints that are none, in a sentence; each checkpoint sweeps up before itself."""
    names = {f: {file.name for file in f.iterdir()} for f in (run / "checkpoints").iterdir()}
    odd = {f.name: sorted(found) for f, found in names.items() if found != {*PARTS, "manifest.json"}}
    return f"left behind: {odd}" if odd else ""


def verdict(trials: Sequence[Trial]) -> list[str]:
    """Why the command fails; nothing when every run came out equal, and every kind of moment was really hit."""
    found = [f"trial {trial.number}: {text}" for trial in trials for text in trial.wrong]
    for kind in {trial.kind for trial in trials}:
        hits = [hit for trial in trials for hit in trial.hits if hit.kill.kind == kind]
        missed = sum(not hit.inside for hit in hits)
        if missed or not hits:
            found.append(f"{missed} of {len(hits)} kills missed their moment: {kind}")
        if kind == "before manifest" and not all(hit.ready for hit in hits):
            found.append("a kill before the manifest left no checkpoint that lacked it alone")
        if kind == "checkpoint" and sum(bool(hit.unfinished) for hit in hits) * 2 < len(hits):
            found.append("most kills while a checkpoint was written left none unfinished")
    return found


def summary(trials: Sequence[Trial]) -> str:
    """A table: a line a kind."""
    lines = [
        f"{'kind':15} {'trials':>6} {'equal':>6} {'kills':>6} {'inside':>6} {'no manifest':>11} {'steps lost':>16}"
    ]
    for kind in KINDS:
        own = [trial for trial in trials if trial.kind == kind]
        hits = [hit for trial in trials for hit in trial.hits if hit.kill.kind == kind]
        lost = [hit.steps - hit.resumed for hit in hits] or [0]
        counts = (len(own), sum(not t.wrong for t in own), len(hits), sum(h.inside for h in hits))
        left = sum(bool(hit.unfinished) for hit in hits)
        steps = f"{np.mean(lost):.1f}, at most {max(lost)}"
        lines.append(f"{kind:15} " + " ".join(f"{n:6}" for n in counts) + f" {left:11} {steps:>16}")
    told = {
        f"of {len(trials)} equal": sum(not trial.wrong for trial in trials),
        "waited for their checkpoints": sum(trial.waits for trial in trials),
        "killed twice": sum(len(trial.hits) > 1 for trial in trials),
        "drawn again, for an occurrence that never came": sum(trial.redrawn for trial in trials),
    }
    return "\n".join([*lines, *(f"{count} {text}" for text, count in told.items())])


def main() -> int:
    """The command. 0 when every trial is equal, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers-in-parallel", type=int, default=1)
    given = parser.parse_args()
    if given.trials < 1:
        parser.error("no trial would show nothing: give 1 or more")
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    campaign = Campaign(folder, seed=given.seed)
    done = list[Trial]()
    with ThreadPoolExecutor(given.workers_in_parallel) as pool:
        for trial in pool.map(campaign.trial, range(given.trials)):
            print(trial, flush=True)
            done.append(trial)
    print(summary(done))
    if wrong := verdict(done):
        print("\n".join(wrong), f"kept in {folder}", sep="\n", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
