"""How do tests make whole runs? A small set of real digits, a job on it, and the command line as a subprocess."""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tests.kit.clusters import free_port
from tests.kit.forked import Forked, thawline_process
from tests.kit.toy import Watched
from thawline.cluster.cli.index import make_manifest
from thawline.cluster.job.job import Job
from thawline.cluster.run.run import run as run_job
from thawline.dataio.samples import write_digits
from thawline.dataio.stream.plan import Training
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.step.window import extend_hash

# 300 digits at 32 px: a step of ResNet-18 takes about a tenth of a second on one core, one of "tiny" a tenth of that.
JOB = """
manifest = "{manifest}"
storage = "{storage}"
name = "run"
seed = 7
log_every = 2
[data]
size_px = 32
presize_px = 40
global_batch = 24
[augment]
flip = false
[model]
name = "{model}"
weights = "none"
[fit]
recipe = "one_cycle"
epochs = 2
lr = 3e-3
[checkpoint]
every_s = 0.5
[metrics]
port = 0
"""


@cache
def _digits() -> list[tuple[str, bytes]]:
    """All digits as files: names and contents, in the order of their numbers."""
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder) / "all", size_px=48)
        files = sorted((Path(folder) / "all").iterdir(), key=lambda file: file.stem.split("_")[1])
        return [(file.name, file.read_bytes()) for file in files]


def write_some_digits(folder: Path, count: int) -> None:
    """The first digits, a file each, into a folder that is made."""
    folder.mkdir(parents=True)
    for name, encoded in _digits()[:count]:
        (folder / name).write_bytes(encoded)


def digits_manifest(folder: Path, *, count: int = 300) -> Path:
    """A manifest over `count` digits, a fifth of them for validation (its fraction rounds down)."""
    kept = folder / "digits"
    write_some_digits(kept, count)
    out = folder / "digits.parquet"
    make_manifest(kept, label=r"regex:(.+)_\d+\.jpg$", valid="0.2", seed=42).save(out)
    return out


def write_job(folder: Path, manifest: Path, *, model: str = "tiny") -> Path:
    """JOB as a file in `folder`, with its runs under folder/runs."""
    file = folder / "job.toml"
    file.write_text(JOB.format(manifest=manifest, storage=folder / "runs", model=model))
    return file


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: one thread a process, since others run beside it."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": "/tmp/thawline-test-ray", **more}


def thawline(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`thawline ARGUMENTS` to its end."""
    process = thawline_process([*map(str, arguments)], environment(**more))
    out, talk = process.communicate(timeout=240)
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, talk)


def fork(*arguments: str | Path, step_s: float = 0, **more: str) -> Forked:
    """`thawline ARGUMENTS`, going on, without the imports that a process of its own would begin with.

    step_s: a pause after each training step, so that a run of the tiny body can be stopped in its middle.
    """
    return thawline_process([*map(str, arguments)], environment(**more), step_s=step_s)


def start(*arguments: str | Path, out: int = subprocess.DEVNULL, **more: str) -> subprocess.Popen[str]:
    """`thawline ARGUMENTS` as a user starts it, going on. out: where its stdout goes."""
    command = [str(Path(sys.executable).with_name("thawline")), *map(str, arguments)]
    return subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment(**more))


def _place(rank: int, workers: int) -> dict[str, str]:
    return {"LOCAL_WORLD_SIZE": str(workers), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def fork_ranks(workers: int, *arguments: str | Path, step_s: float = 0) -> list[Forked]:
    """`thawline ARGUMENTS` once a rank, each told its place as torchrun tells it; step_s as in `fork`."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(workers)}
    return [fork(*arguments, step_s=step_s, **meeting, **_place(rank, workers)) for rank in range(workers)]


def ranks(workers: int, *arguments: str | Path) -> None:
    """`thawline ARGUMENTS` once a rank, to the end of all, which must be a good one."""
    processes = fork_ranks(workers, *arguments)
    talk = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * workers, "\n".join(talk)


def torchrun(workers: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`thawline ARGUMENTS` under torchrun with that many processes, on a port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return subprocess.run(
        [*command, "-m", "thawline.cluster.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        check=False,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str] | Forked, *, timeout_s: float = 180) -> None:
    """Wait until a checkpoint of that step or a later one is committed."""
    until = time.monotonic() + timeout_s
    while not any(int(f.parent.name[5:]) >= step for f in (run / "checkpoints").glob("step_*/manifest.json")):
        if process.poll() is not None or time.monotonic() > until:
            stderr = process.communicate()[1] if process.poll() is not None else ""
            raise AssertionError(f"no checkpoint of step {step}; exit status {process.poll()}: {stderr}")
        time.sleep(0.02)


def go(job: Job, *, stop_at_ask: int = 0) -> dict[str, Any]:
    """The result of a job that runs in this process. stop_at_ask: see Watched."""
    return run_job(job, Watched(run_dir=Path(job.storage) / job.name, stop_at_ask=stop_at_ask))


def numbers(run: Path) -> list[tuple[Any, ...]]:
    """What a run recorded of its windows and epochs, but for times."""
    rows = pq.read_table(run / "rows.parquet").to_pylist()
    kept = ("kind", "phase", "step", "epoch", "loss", "lr", "momentum", "valid_loss", "error_rate", "train_loss")
    return [tuple(row.get(name) for name in kept) for row in rows if row["kind"] in ("train", "valid")]


def result(run: Path) -> dict[str, Any]:
    """result.json."""
    loaded: dict[str, Any] = json.loads((run / "result.json").read_text())
    return loaded


def counted_error_rate(run: Path) -> tuple[int, float]:
    """(images, error rate) by a plain count over the saved predictions."""
    table = pq.read_table(run / "valid.parquet")
    ids = table["id"].to_numpy()
    assert len(np.unique(ids)) == len(ids), "a validation image was predicted twice"
    wrong = np.array(table["target"].to_pylist()) != np.array(table["prediction"].to_pylist())
    return len(ids), float(wrong.sum() / len(wrong))


def planned_hash(manifest: Path, steps: int) -> str:
    """The stream hash of JOB's first `steps` steps, from the plan alone."""
    subset = Manifest.load(manifest).subset("train")
    plan = Training(n=len(subset.ids), global_batch=24, seed=7)
    digest = ""
    for step in range(steps):
        digest = extend_hash(digest, subset.ids[plan.at(plan.positions(step))[1]])
    return digest
