"""How do tests read a GPU's counters without a GPU? With a fake `pynvml` that has what cluster.observe.gpus calls.

Names, parameters, fields and units are those of nvidia-ml-py: test_gpus.py compares the two where it is installed.
"""

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from thawline.cluster.observe import gpus


class NVMLError(Exception):
    """pynvml's error."""


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
        """The handle of a whole GPU "GPU-..." or of a MIG instance "MIG-..."."""
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
        """Percent, and the microseconds of the measurement."""
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
