"""Does a run on a cluster survive whatever dies? Workers, nodes, controllers, drivers killed at random: N runs.

    python -m tests.campaigns.chaos 20 [--seed S] [--only worker|node|controller|driver]
    python -m tests.campaigns.chaos 1 --only elastic      2 workers, 1 when a node is killed, 2 when it is back
    python -m tests.campaigns.chaos 1 --only drain        a node that is taken away with notice

Each run is a small elastic job on real digits, on a cluster of a head and two worker nodes on this machine. While it
trains, something is killed with SIGKILL: a worker, a whole node (which comes back after two seconds), Ray Train's
controller, or the driver (then the job is submitted again, as its owner would). It must end with the unbroken run's
stream_hash, which is the hash of every id that was trained on, in order: so no sample was lost, and none came twice.

Printed at the end, as JSON: per kind of victim, how many seconds from the kill until the workers' training function
ran again, and until the end of the first window after it; median and greatest.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.kit.clusters import BIN, RayCluster, ray_cluster
from tests.kit.runs import digits_manifest, planned_hash, wait_for_step, write_job
from thawline.cluster.jobs import log_records

KINDS = ("worker", "node", "controller", "driver")
SCENES = ("elastic", "drain")
LENGTH = {"elastic": 30, "drain": 40}
"""Epochs of ten steps; six where nothing else is said."""
_LIMIT_S = 300.0
_NOTICE_S = 20
_NAMES = {"worker": "ray::TrainWorker", "controller": "ray::Controller", "driver": "thawline.cluster.driver"}
Row = dict[str, Any]


@dataclass
class Outcome:
    """One run. running_s, window_s: from the kill until workers run again, and to the end of their first window."""

    run: str
    victim: str
    killed_at_step: int
    resumed_at_step: int | None
    running_s: float | None
    window_s: float | None
    equal: bool
    problem: str = ""
    worlds: tuple[int, ...] = ()
    """How many workers there were, one after another."""


@dataclass
class Stage:
    """A run on its way: where it is, how it was submitted, and by which process it is followed."""

    cluster: RayCluster
    name: str
    run: Path
    submit: tuple[str, ...]
    following: "subprocess.Popen[str]"

    def see_through(self) -> str:
        """Wait for its end, submitting it again when its driver has died; what was said if there is none."""
        deadline, done = time.monotonic() + _LIMIT_S, self.run / "result.json"
        while not done.exists() and time.monotonic() < deadline:
            if self.following.poll() is not None and not done.exists():
                self.following.communicate()
                self.following = self.cluster.start(*self.submit)
            time.sleep(0.2)
        try:
            _, talk = self.following.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.following.kill()
            _, talk = self.following.communicate()
        return "" if done.exists() else f"it did not end: {talk[-2000:]}"

    def records(self) -> list[Row]:
        """What all its attempts told, in order."""
        from thawline.cluster.jobs.client import Cluster

        os.environ.update({name: value for name, value in self.cluster.env.items() if name.startswith("RAY_AUTH")})
        server = Cluster(self.cluster.address)
        attempts = [attempt for attempt in server.attempts() if attempt.name == self.name]
        lines = [line for attempt in attempts for line in server.lines(attempt, follow=False)]
        return [row for line in lines if (row := log_records.decode(line)) is not None]


def processes_of(cluster: RayCluster, kind: str) -> list[psutil.Process]:
    """The cluster's processes that are of this kind."""
    found = []
    for node in cluster.nodes:
        if node.poll() is not None:
            continue
        for child in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _NAMES[kind] in " ".join(child.cmdline()) and child.name() != "sh":
                    found.append(child)
    return found


def living(cluster: RayCluster) -> list[int]:
    """Worker nodes that are up, by number."""
    return [number for number in range(1, len(cluster.nodes)) if cluster.nodes[number].poll() is None]


def strike(stage: Stage, kind: str, draw: random.Random) -> None:
    """Kill one of a kind. Raises IndexError if there is none."""
    if kind == "node":
        stage.cluster.kill_node(draw.choice(living(stage.cluster)))
        time.sleep(2)
        stage.cluster.add_node(cpus=1)
        return
    draw.choice(processes_of(stage.cluster, kind)).kill()


def shrink_and_grow(stage: Stage) -> None:
    """Kill a node, and bring one back when the run has gone on with a single worker for a while."""
    stage.cluster.kill_node(living(stage.cluster)[-1])
    killed, deadline = time.time(), time.monotonic() + _LIMIT_S
    while not _alone(stage.records(), killed):
        assert time.monotonic() < deadline, "it did not go on with one worker"
        time.sleep(1)
    stage.cluster.add_node(cpus=1)


def _alone(told: Sequence[Row], since: float) -> bool:
    back = [row for row in told if row["kind"] == "resumed" and row["unix_s"] > since]
    return bool(back) and any(row["kind"] == "train" and row["unix_s"] > back[0]["unix_s"] + 3 for row in told)


def take_away(stage: Stage) -> float:
    """Drain the node of a worker with notice, and end it at its deadline, as a cloud does; that deadline."""
    victim = living(stage.cluster)[-1]
    code = (
        "import ray, sys\n"
        f"ray.init(address='127.0.0.1:{stage.cluster.gcs_port}', log_to_driver=False)\n"
        "print([node['NodeID'] for node in ray.nodes() if node['Alive'] and node['Resources'].get('taken')][-1])\n"
    )
    words = [sys.executable, "-c", code]
    node = subprocess.run(words, env=stage.cluster.env, check=True, capture_output=True, text=True).stdout.split()[-1]
    drain = [
        *(str(BIN / "ray"), "drain-node", f"--address=127.0.0.1:{stage.cluster.gcs_port}", f"--node-id={node}"),
        *("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken"),
        f"--deadline-remaining-seconds={_NOTICE_S}",
    ]
    deadline = time.time() + _NOTICE_S
    subprocess.run(drain, env=stage.cluster.env, check=True, capture_output=True)
    time.sleep(max(0.0, deadline - time.time()))
    stage.cluster.kill_node(victim)
    return deadline


def outcome(stage: Stage, manifest: Path, kind: str, killed: float, problem: str, steps: int) -> Outcome:
    """What the run's own rows tell of it."""
    told = [] if problem else stage.records()
    trained = {row["unix_s"]: row for row in told if row["kind"] == "train"}.values()  # a resumed run shows old ones
    before = max((row["step"] for row in trained if row["unix_s"] <= killed), default=0)
    back = [row for row in told if row["kind"] == "resumed" and row["unix_s"] > killed]
    if problem or not back:
        return Outcome(
            stage.name, kind, before, None, None, None, False, problem or "nothing was resumed after the kill"
        )
    groups = [row for row in told if row["kind"] == "group"]
    running = min(row["unix_s"] for row in groups if row["unix_s"] > killed)
    first = min((row["unix_s"] for row in trained if row["unix_s"] > back[0]["unix_s"]), default=None)
    made = json.loads((stage.run / "result.json").read_text())
    return Outcome(
        *(stage.name, kind, before, back[0]["step"], round(running - killed, 1)),
        None if first is None else round(first - killed, 1),
        equal=(made["stream_hash"], made["steps"]) == (planned_hash(manifest, steps), steps),
        worlds=tuple(row["workers"] for row in groups),
    )


def one_run(
    cluster: RayCluster, folder: Path, manifest: Path, *, number: int, kind: str, draw: random.Random
) -> Outcome:
    """Submit, wait for a random step, kill, see it through."""
    name, epochs = f"{kind}{number}", LENGTH.get(kind, 6)
    job, run = write_job(folder, manifest), folder / "runs" / name
    submit = (
        *("submit", str(job), "--name", name, "--address", cluster.address, "--follow", "--workers", "1", "2"),
        *("--fit.epochs", str(epochs), "--cluster.resize_s", "5", "--cluster.hang_s", "30", "--failures", "10"),
        *(("--checkpoint.every_s", "600") if kind == "drain" else ()),
    )
    stage = Stage(cluster, name, run, submit, cluster.start(*submit))
    if kind == "drain":  # it writes no checkpoint before it is warned
        while not any(row["kind"] == "train" and row["step"] >= 10 for row in stage.records()):
            time.sleep(1)
    else:
        wait_for_step(run, draw.randrange(4, 40), stage.following)
        time.sleep(draw.random())
    killed, problem = time.time(), ""
    acts: dict[str, Callable[[], Any]] = {
        "elastic": lambda: shrink_and_grow(stage),
        "drain": lambda: take_away(stage),
    }
    try:
        lasting = acts.get(kind, lambda: strike(stage, kind, draw))()
        killed = lasting or killed
    except (IndexError, AssertionError) as error:
        problem = f"{type(error).__name__}: {error}"
    problem = stage.see_through() or problem
    return outcome(stage, manifest, kind, killed, problem, 10 * epochs)


def main() -> int:
    """Run as the module's docstring says; 0 if every run was equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=(*KINDS, *SCENES))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cluster ends with it
    draw, outcomes = random.Random(given.seed), []
    with tempfile.TemporaryDirectory(prefix="thawline-chaos-") as scratch, ray_cluster(1) as cluster:
        cluster.add_node(cpus=1, resources={"taken": 1.0})
        cluster.wait_for(2)
        folder = Path(scratch)
        manifest = digits_manifest(folder)
        for number in range(given.runs):
            kind = given.only or KINDS[number % len(KINDS)]
            outcomes.append(one_run(cluster, folder, manifest, number=number, kind=kind, draw=draw))
            print(json.dumps(asdict(outcomes[-1])), flush=True)
    summary: dict[str, Any] = {"runs": len(outcomes), "equal": sum(each.equal for each in outcomes)}
    for kind in {each.victim for each in outcomes}:
        for until in ("running_s", "window_s"):
            told = [getattr(each, until) for each in outcomes if each.victim == kind]
            if seconds := [each for each in told if each is not None]:
                found = {"median": statistics.median(seconds), "max": max(seconds), "of": len(seconds)}
                summary.setdefault(kind, {})[until] = found
    print(json.dumps(summary))
    return 0 if summary["equal"] == summary["runs"] else 1


if __name__ == "__main__":
    sys.exit(main())
