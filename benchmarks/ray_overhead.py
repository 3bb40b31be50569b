"""What does Ray cost? The same job with Ray Train workers and under torchrun, in turns.

Each turn is a whole run in processes of its own, as a user starts it. Counted are the windows that its recorder wrote,
without the first of each run, which search and fill caches; starting and ending, where Ray takes seconds more, is in
`wall_s`. The two see the same samples in the same order and end with the same stream_hash, or the benchmark fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.harness import BenchmarkError, DeviceName, check_positive, open_device, report, say, spread
from cluster.index import make_manifest
from dataio.samples import write_digits

QUESTION = "what does Ray cost?"
LAUNCHERS = ("ray", "torchrun")
_SKIPPED = 2
_JOB = """
name = "{name}"
manifest = "{folder}/digits.parquet"
storage = "{folder}/runs"
workers = {workers}
device = "{device}"
log_every = 2
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
    """One run. images_per_s: of its windows but the first ones. wall_s: of the whole command."""

    images_per_s: float
    wall_s: float
    stream_hash: str


def main(
    *,
    device: DeviceName = "cpu",
    workers: int = 2,
    pairs: int = 5,
    epochs: int = 2,
    batch: int = 64,
    size_px: int = 64,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure images/s of both, and the ratio of each pair of runs.

    Args:
        device: Where to train.
        workers: Processes of either.
        pairs: Runs of each, one after the other, the order changing.
        epochs: Of 1,438 digits, in a run.
        batch: Images a step, over all workers.
        size_px: Side of the images.
        out: Also write the JSON here.
    """
    open_device(device)
    check_positive(workers=workers, pairs=pairs, epochs=epochs, batch=batch, size_px=size_px)
    runs: dict[str, list[Run]] = {name: [] for name in LAUNCHERS}
    settings = {"device": device, "workers": workers, "epochs": epochs, "batch": batch, "size_px": size_px}
    with tempfile.TemporaryDirectory(prefix="thawline-bench-") as made:
        folder = Path(made)
        write_digits(folder / "digits")
        make_manifest(folder / "digits", label=r"regex:(.+)_\d+\.jpg$", valid="0.2", seed=42).save(
            folder / "digits.parquet"
        )
        for pair in range(pairs):
            for name in LAUNCHERS if pair % 2 == 0 else LAUNCHERS[::-1]:
                say(f"pair {pair + 1} of {pairs}: {name}")
                job = folder / f"{name}{pair}.toml"
                job.write_text(_JOB.format(name=job.stem, folder=folder, presize_px=size_px * 5 // 4, **settings))
                runs[name].append(one_run(command(name, job, workers=workers), folder / "runs" / job.stem))
    return report("ray_overhead", QUESTION, settings | {"pairs": pairs}, compared(runs), out=out)


def command(launcher: str, job: Path, *, workers: int) -> list[str]:
    """What a user types."""
    thawline = ["-m", "cluster.cli", "train", str(job)]
    if launcher == "ray":
        return [sys.executable, *thawline]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return [sys.executable, *torchrun, *thawline]


def one_run(words: Sequence[str], folder: Path) -> Run:
    """Run it to its end. Raises BenchmarkError when it fails."""
    # torchrun would give its workers one thread of OpenMP each, and Ray as many as each has cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    wall_s = time.perf_counter() - began
    if done.returncode:
        raise BenchmarkError(f"{' '.join(words[1:])} failed: nothing can be compared; it said: {done.stderr[-2000:]}")
    result = json.loads((folder / "result.json").read_text())
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    return Run(images_per_s(rows), wall_s, result["stream_hash"])


def images_per_s(rows: Sequence[dict[str, Any]]) -> float:
    """Of a recorder's rows: all windows but the first, images by their seconds."""
    windows = [row for row in rows if row["kind"] == "train"][_SKIPPED:]
    if not windows:
        raise BenchmarkError(f"a run of at most {_SKIPPED} windows leaves nothing to measure: give more epochs")
    return float(sum(row["images"] for row in windows) / sum(row["window_s"] for row in windows))


def compared(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """A row a launcher, and one with the ratio of each pair; stderr is the standard error of their mean."""
    if len({run.stream_hash for each in runs.values() for run in each}) > 1:
        raise BenchmarkError("the runs saw different samples: their speeds cannot be compared; this is a fault of ours")
    rows: dict[str, dict[str, Any]] = {
        name: {
            "images_per_s": spread([run.images_per_s for run in each]),
            "wall_s": spread([run.wall_s for run in each]),
        }
        for name, each in runs.items()
    }
    ours, theirs = (np.array([run.images_per_s for run in runs[name]]) for name in LAUNCHERS)
    ratios = ours / theirs
    stderr = float(ratios.std(ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else float("nan")
    rows["ray / torchrun"] = {"ratio": spread(ratios), "mean": float(ratios.mean()), "stderr": stderr}
    return rows
