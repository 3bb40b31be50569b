"""How many workers is there room for? What a cluster's machines have, which of them answer, and what a worker takes.

Ray must be connected.
"""

import socket
import time
from collections.abc import Mapping

from thawline.cluster.errors import LaunchError
from thawline.cluster.job.job import Job

_CONNECT_S = 2.0


def needs_of(job: Job, device: str) -> dict[str, float]:
    """What Ray sets aside for one worker."""
    needs = {"CPU": job.cluster.cpus_per_worker, **job.cluster.resources}
    return needs | ({"GPU": 1.0} if device == "cuda" else {})


def choose_device(job: Job, device: str) -> str:
    """The device to train on, once the cluster has grown large enough for it. Raises LaunchError when it does not."""
    deadline = time.monotonic() + job.cluster.wait_s
    while True:
        nodes = list(_nodes().values())
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        chosen = device if device != "auto" else "cuda" if gpus >= job.least_workers else "cpu"
        found = places(nodes, needs_of(job, chosen), accelerator_type=job.cluster.accelerator_type)
        if found >= job.least_workers:
            return chosen
        if time.monotonic() >= deadline:
            break
        time.sleep(1)
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs_of(job, chosen).items())
    kind = f" on machines with {job.cluster.accelerator_type}" if job.cluster.accelerator_type else ""
    raise LaunchError(
        f"workers={job.workers} of {wanted} each{kind}, but this cluster of {len(nodes)} machines has room for "
        f"{found}: the rest would never start; {_instead(found, job, chosen)}, let the cluster grow (cluster.wait_s), "
        "or look at `ray status`"
    )


def _instead(found: int, job: Job, device: str) -> str:
    """What a user could ask for."""
    if found:
        return f"give --workers {found} or fewer"
    less = ["cluster.cpus_per_worker", *(["cluster.resources"] if job.cluster.resources else [])]
    other = [" or another cluster.accelerator_type"] if job.cluster.accelerator_type else []
    other += [" or --device cpu"] if device == "cuda" else []
    return f"not one machine has that: give less as {' or '.join(less)}{''.join(other)}"


def _nodes() -> dict[str, dict[str, float]]:
    """The resources of each machine that answers and is not about to be taken away, by Ray's id of it.

    Ray notices a machine that has vanished after many seconds; whether its raylet still listens is known at once.
    """
    import ray

    leaving = ray._private.state.state.get_draining_nodes()
    return {
        node["NodeID"]: dict(node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] not in leaving
        and _answers(node["NodeManagerAddress"], node["NodeManagerPort"])
    }


def answering() -> list[str]:
    """Ray's ids of the machines that answer and are not about to be taken away."""
    return list(_nodes())


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def room(job: Job, device: str) -> int:
    """How many of the job's workers fit onto the cluster as it is now, if nobody else uses it."""
    return places(list(_nodes().values()), needs_of(job, device), accelerator_type=job.cluster.accelerator_type)


def places(nodes: list[dict[str, float]], needs: Mapping[str, float], *, accelerator_type: str = "") -> int:
    """How many workers that need so much each fit onto empty machines with such resources, by Ray's names."""
    mark = f"accelerator_type:{accelerator_type}"
    fitting = [node for node in nodes if not accelerator_type or mark in node]
    return sum(int(min(node.get(name, 0.0) // amount for name, amount in needs.items())) for node in fitting)


def can_grow(job: Job, device: str, workers: int) -> bool:
    """Whether there is room for more workers than these, and nobody else uses it."""
    import ray

    if workers >= job.most_workers:
        return False
    free = ray.available_resources()
    if any(free.get(name, 0.0) < amount for name, amount in needs_of(job, device).items()):
        return False
    return room(job, device) > workers
