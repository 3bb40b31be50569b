"""With what was a result computed? Versions, hardware and commit, for result.json and benchmarks."""

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import subprocess
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import thawline
from thawline.dataio.cores import usable_cores

HOME = Path(__file__).resolve().parents[2]
"""The folder of our packages: a checkout, or `thawline` where it is installed."""

PACKAGES = ("thawline", "dataio", "models", "trainer", "cluster", "benchmarks")
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


@cache
def versions() -> dict[str, str]:
    """thawline, python, torch, torchvision, dali, ray, pyarrow and cuda; "missing" where there is none."""
    numbers = {"thawline": thawline.__version__, "python": platform.python_version()}
    numbers |= {name: version(name) for name in ("torch", "torchvision", "ray", "pyarrow")}
    return numbers | {"dali": version(*DALI), "cuda": _cuda_version()}


@cache
def hardware() -> dict[str, Any]:
    """The hardware that this process may use: cpu (model), cores, memory_gib, gpus (each: name, memory_gib, bf16).

    Initialises CUDA: not for a process that forks later.
    """
    memory = round(memory_bytes() / 2**30, 1)
    return {"cpu": cpu_model(), "cores": usable_cores(), "memory_gib": memory, "gpus": gpus()}


@cache
def commit() -> str:
    """The git commit of the code that runs, "+dirty" if the packages differ from it; or "unknown"."""
    git = ["git", "-C", str(HOME)]
    try:
        toplevel, revision = _output([*git, "rev-parse", "--show-toplevel", "HEAD"]).splitlines()
        if Path(toplevel).resolve() != HOME:  # installed inside somebody else's repository
            return "unknown"
        changed = _output([*git, "status", "--porcelain", "--", *PACKAGES, ":!benchmarks/results"])
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"
    return revision + ("+dirty" if changed else "")


def version(*names: str) -> str:
    """The version of the first of these distributions that is installed; "missing" where none is."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "missing"


def _cuda_version() -> str:
    """The CUDA that torch was built for, from its version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return str(runpy.run_path(str(file)).get("cuda") or "none") if file and file.is_file() else "missing"


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees: name, memory_gib, bf16. Initialises CUDA."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where there is a driver too old or no device
        if not torch.cuda.is_available():
            return []
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "bf16": p.major >= 8} for p in properties]


def memory_bytes() -> int:
    """The machine's memory, or the container's limit where there is a lower one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total


def cpu_model() -> str:
    """The processor's name, or its architecture where Linux does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
