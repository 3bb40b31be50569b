"""Does a run on a cluster survive whatever dies? Workers, nodes, controllers, drivers killed at random: N runs.

    python -m tests.chaos 20 [--seed S]

Each run is a small elastic job on real digits, on a cluster of a head and two worker nodes on this machine. While it
trains, something is killed with SIGKILL: a worker, a whole node (which comes back after two seconds), Ray Train's
controller, or the driver (then the job is submitted again, as its owner would). It must end with the unbroken run's
stream_hash, which is the hash of every id that was trained on, in order: so no sample was lost, and none came twice.

Printed at the end, as JSON: per kind of victim, how many seconds from the kill to the end of the first window that the
workers trained after it, median and greatest. The targets are for machines with more than two cores.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster import rows
from tests.clusters import RayCluster, ray_cluster
from tests.runs import digits_manifest, planned_hash, wait_for_step, write_job

KINDS = ("worker", "node", "controller", "driver")
EPOCHS, STEPS = 12, 120
_LIMIT_S = 240.0
_NAMES = {"worker": "ray::RayTrainWorker", "controller": "ray::TrainController", "driver": "cluster.driver"}


@dataclass
class Outcome:
    """One run. recovery_s: from the kill to the end of the first window after it; None: it had ended before."""

    run: str
    victim: str
    killed_after_step: int
    resumed_at_step: int
    recovery_s: float | None
    again_steps: int
    equal: bool
    problem: str = ""


def processes_of(cluster: RayCluster, kind: str) -> list[psutil.Process]:
    """The cluster's processes that are of this kind, oldest first."""
    found = []
    for node in cluster.nodes:
        if node.poll() is not None:
            continue
        for child in psutil.Process(node.pid).children(recursive=True):
            try:
                if _NAMES[kind] in " ".join(child.cmdline()) and child.name() != "sh":
                    found.append(child)
            except psutil.Error:
                continue
    return sorted(found, key=lambda process: process.create_time())


def train_rows(records: Iterator[dict[str, Any]], kind: str = "train") -> list[dict[str, Any]]:
    """Those rows, each once: a resumed run shows its old ones again."""
    return list({(row.get("step"), row.get("unix_s")): row for row in records if row["kind"] == kind}.values())


def records(cluster: RayCluster, name: str) -> list[dict[str, Any]]:
    """Every attempt's records, in order."""
    from cluster.jobs import Cluster

    os.environ.update({name: value for name, value in cluster.env.items() if name.startswith("RAY_AUTH")})
    server = Cluster(cluster.address)
    attempts = [attempt for attempt in server.attempts() if attempt.name == name]
    lines = [line for attempt in attempts for line in server.lines(attempt, follow=False)]
    return [row for line in lines if (row := rows.decode(line)) is not None]


def strike(cluster: RayCluster, kind: str, draw: random.Random) -> bool:
    """Kill one of a kind. False if there was none any more."""
    if kind == "node":
        number = draw.choice([n for n in range(1, len(cluster.nodes)) if cluster.nodes[n].poll() is None])
        cluster.kill_node(number)
        time.sleep(2)
        cluster.add_node(cpus=1)
        return True
    victims = processes_of(cluster, kind)
    if not victims:
        return False
    draw.choice(victims).kill()
    return True


def one_run(cluster: RayCluster, folder: Path, manifest: Path, number: int, draw: random.Random, kind: str) -> Outcome:
    """Submit, wait for a random step, kill, see it through."""
    name = f"chaos{number}"
    job, run, at = write_job(folder, manifest), folder / "runs" / name, ("--address", cluster.address)
    submit = (
        *("submit", str(job), "--name", name, *at, "--fit.epochs", str(EPOCHS), "--workers", "1", "2"),
        *("--cluster.resize_s", "5", "--cluster.hang_s", "30", "--failures", "10"),
    )
    following = cluster.start(*submit, "--follow")
    target = draw.randrange(4, STEPS // 2)
    wait_for_step(run, target, following)
    time.sleep(draw.random())
    killed = time.time()
    if not strike(cluster, kind, draw):
        return Outcome(name, kind, target, target, None, 0, False, "there was nothing to kill")
    deadline = time.monotonic() + _LIMIT_S
    while not (run / "result.json").exists() and time.monotonic() < deadline:
        if following.poll() is not None and not (run / "result.json").exists():  # its driver died: its owner acts
            following = cluster.start(*submit, "--follow")
        time.sleep(0.2)
    try:
        _, talk = following.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        following.kill()
        talk = "it did not end in time"
    if not (run / "result.json").exists():
        return Outcome(name, kind, target, 0, None, 0, False, talk[-2000:])
    made = json.loads((run / "result.json").read_text())
    told = records(cluster, name)
    trained = train_rows(iter(told))
    after = [row for row in trained if row["unix_s"] > killed]
    back = [row for row in told if row["kind"] == "resumed" and row["unix_s"] > killed]
    before = max((row["step"] for row in trained if row["unix_s"] <= killed), default=0)
    if not back:
        return Outcome(name, kind, before, before, None, 0, False, "nothing was resumed after the kill")
    recovered = min((row["unix_s"] for row in after if row["unix_s"] > back[0]["unix_s"]), default=None)
    equal = made["stream_hash"] == planned_hash(manifest, STEPS) and made["steps"] == STEPS
    return Outcome(
        name,
        kind,
        before,
        back[0]["step"],
        None if recovered is None else round(recovered - killed, 1),
        max(0, before - back[0]["step"]),
        equal,
    )


def main() -> int:
    """Run as the module's docstring says; 0 if every run was equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="thawline-chaos-") as scratch, ray_cluster(1, 1) as cluster:
        folder = Path(scratch)
        manifest = digits_manifest(folder)
        for number in range(given.runs):
            kind = given.only or KINDS[number % len(KINDS)]
            outcome = one_run(cluster, folder, manifest, number, draw, kind)
            outcomes.append(outcome)
            print(json.dumps(asdict(outcome)), flush=True)
    summary: dict[str, Any] = {"runs": len(outcomes), "equal": sum(outcome.equal for outcome in outcomes)}
    for kind in KINDS:
        seconds = [o.recovery_s for o in outcomes if o.victim == kind and o.recovery_s is not None]
        if seconds:
            summary[kind] = {"median_s": statistics.median(seconds), "max_s": max(seconds), "of": len(seconds)}
    print(json.dumps(summary))
    return 0 if summary["equal"] == summary["runs"] else 1


if __name__ == "__main__":
    sys.exit(main())
