"""How busy is this worker's GPU? Its memory, its kernels and its JPEG decoders, as NVML counts them.

Asked when somebody scrapes, never in a step. NVML's Python (`pynvml`, of the package nvidia-ml-py) is optional: without
it, without a driver, or for what a GPU does not count, there is simply no answer.

CUDA and NVML number the devices differently: CUDA_VISIBLE_DEVICES hides some from one of them only, and CUDA puts the
fastest first. So a device is found by its UUID.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch

# What may be asked, each of pynvml and a device's handle. The GPU itself counts in percent.
_ASKED: dict[str, Callable[[Any, Any], float]] = {
    "gpu_memory_bytes": lambda nvml, device: float(nvml.nvmlDeviceGetMemoryInfo(device).used),
    "gpu_utilisation_ratio": lambda nvml, device: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
    "jpeg_decoder_utilisation_ratio": lambda nvml, device: nvml.nvmlDeviceGetJpgUtilization(device)[0] / 100,
}


def read(device_index: int) -> dict[str, float] | None:
    """What NVML says of CUDA's device of that index, by name, in bytes and shares of 1; None where nothing can be told.

    Never raises, never starts CUDA: before this process has used the device, there is no answer.
    """
    try:
        nvml, device = _device(device_index)
    except Exception:  # no pynvml, no driver, no such device: metrics must not end a run for that
        return None
    found = {}
    for name, ask in _ASKED.items():
        with suppress(Exception):  # a part of a GPU (MIG) counts no use; older GPUs have no JPEG decoders
            found[name] = ask(nvml, device)
    return found or None


@cache  # NVML stays open: opening it takes tens of milliseconds, and nobody else here closes it
def _device(device_index: int) -> tuple[Any, Any]:
    """pynvml and its handle of the device. Raises whatever is missing."""
    nvml: Any = import_module("pynvml")
    uuid = _uuid(device_index)
    nvml.nvmlInit()
    try:
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:  # a part of a GPU
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _uuid(device_index: int) -> str:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError("CUDA has not been started in this process")
    return str(torch.cuda.get_device_properties(device_index).uuid)
