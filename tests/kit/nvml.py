"""How do tests see a GPU's counters without a GPU? A stand-in for `pynvml`, as far as cluster.observe.gpus asks it.

Functions have the names and parameters of nvidia-ml-py's, answers its fields and units: where that is installed,
test_gpus.py compares the two.
"""

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from thawline.cluster.observe import gpus


class NVMLError(Exception):
    """As pynvml has it."""


class Nvml(ModuleType):
    """`devices`: by UUID, each with memory_bytes and the shares gpu and jpeg in percent; one of None is not counted."""

    NVMLError = NVMLError

    def __init__(self, devices: Mapping[str, Mapping[str, int | None]]) -> None:
        super().__init__("pynvml")
        self.devices = {uuid: dict(counters) for uuid, counters in devices.items()}
        self.opened = 0

    def nvmlInit(self) -> None:  # noqa: N802
        """Counted: NVML is to be opened once."""
        self.opened += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        """Of a whole GPU "GPU-...", of a part of one "MIG-..."."""
        if uuid not in self.devices:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        """Bytes."""
        return SimpleNamespace(used=self._of(handle, "memory_bytes"))

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        """Percent."""
        return SimpleNamespace(gpu=self._of(handle, "gpu"))

    def nvmlDeviceGetJpgUtilization(self, handle: Any) -> list[int]:  # noqa: N802
        """Percent, and the microseconds that it was seen over."""
        return [self._of(handle, "jpeg"), 20_000]

    def _of(self, handle: str, name: str) -> int:
        value = self.devices[handle][name]
        if value is None:
            raise NVMLError("Not Supported")
        return value


def install(patch: pytest.MonkeyPatch, nvml: ModuleType | None, *, uuids: tuple[str, ...] = ("0a-1b",)) -> None:
    """Have cluster.observe.gpus find this NVML (None: none at all) and CUDA devices with these UUIDs."""
    patch.setitem(sys.modules, "pynvml", nvml)
    patch.setattr(gpus, "_uuid", lambda index: uuids[index or 0])  # to torch, None is the current one
    gpus._device.cache_clear()
