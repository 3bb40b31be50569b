"""A real Ray cluster on this machine: a head without CPUs and worker nodes, each a raylet of its own, with a token.

Its nodes have no thawline. It is started as a user would, with `ray start --block`; every process is ended by its own
id.
"""

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.kit.forked import thawline_process
from thawline.cluster.machine.provenance import HOME

BIN = Path(sys.executable).parent
_UP_S = 60.0


def free_port() -> int:
    """A port without a listener, below those that the kernel assigns by itself (32768 and above)."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@dataclass
class RayCluster:
    """See `ray_cluster`. `address`: of the job server. `env`: what a client needs to use it."""

    folder: Path
    """A short path: Ray puts sockets below it."""
    token: Path
    gcs_port: int
    dashboard_port: int
    shared: bool = False
    """Its nodes share a folder, like two nodes on a host: each replaces what the other has unpacked there."""
    nodes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    """The head first."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def env(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "OMP_NUM_THREADS": "1",
        }

    @property
    def node_env(self) -> dict[str, str]:
        """The environment of its nodes: this machine's Python, with everything but thawline."""
        return self.env | {"PYTHONPATH": str(self.folder / "bare")}

    def start_head(self, *, cpus: int = 0) -> None:
        words = [
            *("--head", f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}"),
            *("--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}", f"--ray-client-server-port={free_port()}"),
        ]
        self._start(words, cpus)

    def add_node(self, *, cpus: int = 1, resources: Mapping[str, float] | None = None) -> int:
        """Start a worker node; return its index in `nodes`."""
        more = [f"--resources={json.dumps(dict(resources))}"] if resources else []
        own = [] if self.shared else [f"--temp-dir={self.folder / f'n{len(self.nodes)}'}"]
        self._start([f"--address=127.0.0.1:{self.gcs_port}", *own, *more], cpus)
        return len(self.nodes) - 1

    def wait_for(self, cpus: float) -> None:
        """Wait until the cluster has this many CPUs."""
        code = (
            "import ray, sys, time\n"
            f"ray.init(address='127.0.0.1:{self.gcs_port}', log_to_driver=False)\n"
            f"while ray.cluster_resources().get('CPU', 0) != {cpus}: time.sleep(.1)\n"
        )
        subprocess.run([sys.executable, "-c", code], env=self.env, check=True, timeout=_UP_S, capture_output=True)

    def kill_node(self, number: int) -> None:
        """Kill a node as a power failure would: the raylet and all that it started, at once."""
        node = self.nodes[number]
        with contextlib.suppress(psutil.NoSuchProcess):
            _kill(psutil.Process(node.pid))
        node.wait()

    def raylet(self, number: int) -> psutil.Process:
        """The raylet of a node."""
        children = psutil.Process(self.nodes[number].pid).children(recursive=True)
        return next(child for child in children if child.name() == "raylet")

    def run(self, *words: str, timeout_s: float = 120, **env: str) -> "subprocess.CompletedProcess[str]":
        """`thawline WORDS` as a user of this cluster."""
        with contextlib.chdir(self.folder):
            process = thawline_process([*words], self.env | env)
        out, talk = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(words, process.returncode or 0, out, talk)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Start `thawline WORDS`, without waiting for it."""
        return subprocess.Popen(
            [str(BIN / "thawline"), *words],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def together(self, *commands: tuple[str, ...]) -> list["subprocess.CompletedProcess[str]"]:
        """Run several commands at the same time."""
        processes = [self.start(*command) for command in commands]
        ends = [process.communicate(timeout=120) for process in processes]
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *end)
            for process, end in zip(processes, ends, strict=True)
        ]

    def close(self) -> None:
        for number in reversed(range(len(self.nodes))):
            self.kill_node(number)

    def _start(self, words: list[str], cpus: int) -> None:
        log = (self.folder / f"node{len(self.nodes)}.log").open("wb")
        command = [
            *(str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
            *(f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=100000000", *words),
            *(f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"),
        ]
        with log:
            self.nodes.append(subprocess.Popen(command, env=self.node_env, stdout=log, stderr=log, cwd=self.folder))
        # One after another: two that start at the same time on one machine may pick the same ports.
        file, deadline = Path(log.name), time.monotonic() + _UP_S
        while "Ray runtime started" not in file.read_text(errors="replace"):
            assert self.nodes[-1].poll() is None, file.read_text()
            assert time.monotonic() < deadline, f"a node did not come up: {file.read_text()}"
            time.sleep(0.1)


def _kill(process: psutil.Process) -> None:
    """Kill a process and all below it; it is stopped first, so that it starts no others in the meantime."""
    process.send_signal(signal.SIGSTOP)
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            _kill(child)
    process.kill()


@contextlib.contextmanager
def ray_cluster(*cpus: int, head_cpus: int = 0, shared: bool = False) -> Iterator[RayCluster]:
    """A head and a worker node with each number of CPUs. shared: see RayCluster."""
    folder = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))  # a socket's path has 107 bytes at most
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    bare = folder / "bare"
    bare.mkdir()
    # Python runs this once its path is made; ours is on it, since the tests' own environment has thawline.
    (bare / "sitecustomize.py").write_text(f"import sys\nsys.path = [p for p in sys.path if p != {str(HOME)!r}]\n")
    cluster = RayCluster(folder, token, free_port(), free_port(), shared)
    try:
        cluster.start_head(cpus=head_cpus)
        for number in cpus:
            cluster.add_node(cpus=number)
        cluster.wait_for(sum(cpus) + head_cpus)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)
