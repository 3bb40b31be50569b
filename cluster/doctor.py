"""Can this machine train, and with what? Versions, devices, engines.

`versions`, `hardware` and `commit` go into every result.json; `collect` is what `thawline doctor` prints, and the only
one that tries things out.
"""

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import thawline
from thawline.dataio.cores import usable_cores

HOME = Path(__file__).resolve().parents[1]
"""The folder that our packages lie in: a checkout, or `thawline` where it is installed."""

PACKAGES = ("thawline", "dataio", "models", "trainer", "cluster", "benchmarks")
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `remedy` says what to do where `ok` is False."""

    name: str
    value: str
    ok: bool
    remedy: str = ""


@cache
def versions() -> dict[str, str]:
    """thawline, python, torch, torchvision, dali, ray, pyarrow and cuda; "missing" where there is none."""
    found = {"thawline": thawline.__version__, "python": platform.python_version()}
    found |= {name: _version(name) for name in ("torch", "torchvision", "ray", "pyarrow")}
    return found | {"dali": _version(*_DALI), "cuda": _cuda_version()}


@cache
def hardware() -> dict[str, Any]:
    """What this process may use: cpu (model), cores, memory_gib, gpus (of each: name, memory_gib, bf16).

    Asks torch for the GPUs, which initialises CUDA: not for a process that forks later.
    """
    memory = round(_memory_bytes() / 2**30, 1)
    return {"cpu": _cpu_model(), "cores": usable_cores(), "memory_gib": memory, "gpus": _gpus()}


@cache
def commit() -> str:
    """The git commit of the code that runs, "+dirty" if the packages differ from it; or "unknown"."""
    git = ["git", "-C", str(HOME)]
    try:
        where, revision = _output([*git, "rev-parse", "--show-toplevel", "HEAD"]).splitlines()
        if Path(where).resolve() != HOME:  # installed inside somebody else's repository
            return "unknown"
        changed = _output([*git, "status", "--porcelain", "--", *PACKAGES, ":!benchmarks/results"])
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"
    return revision + ("+dirty" if changed else "")


def collect(*, storage: str = "runs") -> list[Check]:
    """What `thawline doctor` prints, in its order; takes seconds, for it imports torch and runs DALI."""
    return [
        *_packages(),
        Check("packages", f"all from {HOME}", True),
        Check("cpu", f"{_cpu_model()}, {usable_cores()} cores usable", True),
        Check("memory", f"{_memory_bytes() / 2**30:.1f} GiB", True),
        *_devices(),
        *_engines(),
        _apex(),
        _backends(),
        _storage(storage),
    ]


def _check(name: str, value: str, ok: bool, remedy: str) -> Check:
    return Check(name, value, ok, "" if ok else remedy)


def _packages() -> list[Check]:
    modern = sys.version_info >= (3, 11)
    checks = [
        _check("python", platform.python_version(), modern, "install Python 3.11 or later"),
        Check("thawline", f"{thawline.__version__}, commit {commit()}", True),
    ]
    for name in ("torch", "torchvision", "torchmetrics", "ray", "pyarrow", "prometheus_client"):
        found = _version(name)
        checks.append(_check(name, found, found != "missing", f"pip install {name}"))
    return [*checks, Check("DALI", _version(*_DALI), True)]


def _devices() -> list[Check]:
    try:
        gpus = _gpus()
    except Exception as error:  # a broken driver fails in many ways; the report goes on
        remedy = "compare the driver with the CUDA that torch was built for"
        return [Check("cuda", f"{type(error).__name__}: {error}", False, remedy)]
    if not gpus:
        return [Check("cuda", "none: training runs on the CPU", True)]
    return [
        Check(f"cuda:{i}", f"{gpu['name']}, {gpu['memory_gib']} GiB, bf16={gpu['bf16']}", True)
        for i, gpu in enumerate(gpus)
    ]


def _engines() -> list[Check]:
    try:
        from thawline.dataio.pixels import dali

        reason = dali.probe()
    except Exception as error:  # a missing or broken DALI must not end the report
        reason = f"{type(error).__name__}: {error}"
    ok = reason is None or sys.platform != "linux"  # there is no DALI for other systems
    remedy = f"pip install {_DALI[0]}; until then the reference engine decodes, more slowly"
    return [
        _check("engine dali", "works" if reason is None else f"not available: {reason}", ok, remedy),
        Check("engine reference", "works", True),
    ]


def _apex() -> Check:
    try:
        from thawline.trainer.optim import find_apex

        state, sentence = find_apex()
    except Exception as error:  # such as a torch that does not import
        state, sentence = "broken", f"{type(error).__name__}: {error}"
    remedy = "pip uninstall apex; NVIDIA's comes from github.com/NVIDIA/apex or in its PyTorch containers"
    return _check("apex", sentence, state in ("nvidia", "missing"), remedy)


def _backends() -> Check:
    remedy = "install torch's ordinary build, not a reduced one"
    try:
        import torch.distributed as dist

        gloo = dist.is_available() and dist.is_gloo_available()
        nccl = dist.is_available() and dist.is_nccl_available()
    except Exception as error:
        return Check("collectives", f"{type(error).__name__}: {error}", False, remedy)
    names = [name for name, there in (("gloo", gloo), ("nccl", nccl)) if there]
    return _check("collectives", ", ".join(names) or "none: one worker only", gloo, remedy)


def _storage(storage: str) -> Check:
    remedy = "give --storage another folder, or the right to write there"
    try:
        if "://" in storage:
            from pyarrow import fs

            filesystem, path = fs.FileSystem.from_uri(storage)
            bucket = path.partition("/")[0]
            if bucket and filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
                raise FileNotFoundError(f"there is no {bucket} there")
            filesystem.get_file_info(path)
            return Check("storage", f"{storage} answers (nothing was written)", True)
        folder = Path(storage).expanduser().absolute()
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return Check("storage", f"{folder} is writable", True)
    except (OSError, ValueError, ImportError) as error:
        return Check("storage", f"{storage} cannot be used: {error}", False, remedy)


def _version(*names: str) -> str:
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


def _gpus() -> list[dict[str, Any]]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where there is a driver too old or no device
        if not torch.cuda.is_available():
            return []
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "bf16": p.major >= 8} for p in properties]


def _memory_bytes() -> int:
    """The machine's memory, or the container's limit where there is a lower one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
