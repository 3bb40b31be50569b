"""Is each task learned as well as it must be? `-m tests.campaigns.shapes [TASK...]`: sample, index, train, on the CPU.

Each trains `tiny` from random weights by `thawline train`, in under three minutes on two free cores, and is held to its
target.
"""

import json
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What a task must come to, trained on so many pictures as `thawline sample shapes` says."""

    metric: str
    limit: float
    """The most, or of what is the better the higher, the least."""
    higher: bool = False
    pictures: int = 6000


TARGETS = {
    "single_label": Target("error_rate", 0.02),
    "multi_label": Target("f_beta", 0.95, higher=True),
    "number": Target("mae", 0.98),  # 2 % of 2.8 to 51.8 % of the picture
    "points": Target("point_error", 0.02, pictures=10_000),
    "mask": Target("jaccard", 0.9, higher=True, pictures=1500),
}


def _thawline(words: str, *, where: Path) -> str:
    """What a command says on stderr."""
    command = [str(Path(sys.executable).with_name("thawline")), *shlex.split(words)]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"thawline {words}: exit status {done.returncode}\n{done.stderr}")
    return done.stderr


def learn(task: str, folder: Path) -> tuple[float, float, float]:
    """(what the metric came to, seconds that `thawline train` took, CPU seconds of it) of one task."""
    target = TARGETS[task]
    said = _thawline(f"sample shapes {task} --task {task} --count {target.pictures}", where=folder)
    (index, train) = re.findall(r"(?:next|then): thawline (.*)", said)
    _thawline(index, where=folder)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    _thawline(f"{train} --name {task} --metrics.port 0 --device cpu", where=folder)
    wall_s, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = json.loads((folder / "runs" / task / "result.json").read_text())
    return result["metrics"][target.metric], wall_s, cpu_s


def main(tasks: list[str]) -> int:
    """Print a line a task; 1 if any missed its target."""
    missed = 0
    for task in tasks or TARGETS:
        target = TARGETS[task]
        with tempfile.TemporaryDirectory() as folder:
            value, wall_s, cpu_s = learn(task, Path(folder))
        met = value >= target.limit if target.higher else value <= target.limit
        missed += not met
        print(
            f"{task:<13} {target.metric} {value:.4f} ({'at least' if target.higher else 'at most'} {target.limit:g}): "
            f"{'met' if met else 'MISSED'}; {wall_s:.0f} s, {cpu_s:.0f} CPU-s",
            flush=True,
        )
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
