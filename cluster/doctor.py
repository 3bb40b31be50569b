"""Can this machine train, and with what? Packages, devices, engines and storage are tried, not only named."""

import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import thawline
from thawline.cluster.machine.provenance import DALI, HOME, commit, cpu_model, gpus, memory_bytes, version
from thawline.dataio.cores import usable_cores


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; `remedy` says what to do where `ok` is False."""

    name: str
    value: str
    ok: bool
    remedy: str = ""


def collect(*, storage: str = "runs") -> list[Check]:
    """What `thawline doctor` prints, in its order; takes seconds, for it imports torch and runs DALI."""
    return [
        *_packages(),
        Check("packages", f"all from {HOME}", True),
        Check("cpu", f"{cpu_model()}, {usable_cores()} cores usable", True),
        Check("memory", f"{memory_bytes() / 2**30:.1f} GiB", True),
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
        found = version(name)
        checks.append(_check(name, found, found != "missing", f"pip install {name}"))
    extras = [Check(name, version(name), True) for name in ("timm", "peft", "segmentation-models-pytorch")]
    return [*checks, Check("DALI", version(*DALI), True), *extras]


def _devices() -> list[Check]:
    try:
        found = gpus()
    except Exception as error:  # a broken driver fails in many ways; the report goes on
        remedy = "compare the driver with the CUDA that torch was built for"
        return [Check("cuda", f"{type(error).__name__}: {error}", False, remedy)]
    if not found:
        return [Check("cuda", "none: training runs on the CPU", True)]
    return [
        Check(f"cuda:{i}", f"{gpu['name']}, {gpu['memory_gib']} GiB, bf16={gpu['bf16']}", True)
        for i, gpu in enumerate(found)
    ]


def _engines() -> list[Check]:
    try:
        from thawline.dataio.pixels import dali

        reason = dali.probe()
    except Exception as error:  # a missing or broken DALI must not end the report
        reason = f"{type(error).__name__}: {error}"
    ok = reason is None or sys.platform != "linux"  # there is no DALI for other systems
    remedy = f"pip install {DALI[0]}; until then the reference engine decodes, more slowly"
    return [
        _check("engine dali", "works" if reason is None else f"not available: {reason}", ok, remedy),
        Check("engine reference", "works", True),
    ]


def _apex() -> Check:
    try:
        from thawline.trainer.optimisers.optim import find_apex

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
