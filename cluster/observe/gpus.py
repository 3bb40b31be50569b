"""How busy is this worker's GPU? Its memory, its kernels and its JPEG decoders, as NVML counts them.

Read at a scrape, never in a step. NVML's Python (`pynvml`, of the package nvidia-ml-py) is optional: without it,
without a driver, or for what a GPU does not count, there are no numbers.

CUDA and NVML number the devices differently: CUDA_VISIBLE_DEVICES hides some from one of them only, and CUDA puts the
fastest first. So a device is found by its UUID.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch

# Counter -> how it is read, given pynvml and the device's handle. NVML counts in percent.
_COUNTERS: dict[str, Callable[[Any, Any], float]] = {
    "gpu_memory_bytes": lambda nvml, device: float(nvml.nvmlDeviceGetMemoryInfo(device).used),
    "gpu_utilisation_ratio": lambda nvml, device: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
    "jpeg_decoder_utilisation_ratio": lambda nvml, device: nvml.nvmlDeviceGetJpgUtilization(device)[0] / 100,
}


def read(device_index: int) -> dict[str, float] | None:
    """NVML's counters of the CUDA device with that index, by name, in bytes and shares of 1; None where there are none.

    Never raises, and never starts CUDA: there are none before this process has used the device.
    """
    try:
        nvml, device = _device(device_index)
    except Exception:  # no pynvml, no driver, no such device: metrics must not end a run for that
        return None
    values = {}
    for name, get in _COUNTERS.items():
        with suppress(Exception):  # MIG instances count no utilisation; older GPUs have no JPEG decoders
            values[name] = get(nvml, device)
    return values or None


@cache  # NVML stays open: opening it takes tens of milliseconds
def _device(device_index: int) -> tuple[Any, Any]:
    """pynvml and its handle of the device. Raises whatever is missing."""
    nvml: Any = import_module("pynvml")
    uuid = _uuid(device_index)
    nvml.nvmlInit()
    try:
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:  # a MIG instance
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _uuid(device_index: int) -> str:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise RuntimeError("CUDA has not been started in this process")
    return str(torch.cuda.get_device_properties(device_index).uuid)
