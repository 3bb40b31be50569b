"""Does a worker tell of its own GPU what NVML says, and nothing where NVML says nothing?"""

import inspect
from collections.abc import Iterator

import pytest
import torch

from tests.kit.nvml import Nvml, NVMLError, install
from thawline.cluster.observe import gpus

TWO: dict[str, dict[str, int | None]] = {
    "GPU-0a-1b": {"memory_bytes": 5 * 2**30, "gpu": 97, "jpeg": 40},
    "GPU-2c-3d": {"memory_bytes": 2**30, "gpu": 0, "jpeg": 0},
}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gpus._device.cache_clear()
    yield
    gpus._device.cache_clear()


def test_each_device_is_found_by_its_uuid_and_told_in_bytes_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(TWO)
    install(monkeypatch, nvml, uuids=("2c-3d", "0a-1b"))  # CUDA's order is not NVML's
    busy = {"gpu_memory_bytes": 5 * 2**30, "gpu_utilisation_ratio": 0.97, "jpeg_decoder_utilisation_ratio": 0.4}
    assert gpus.read(1) == busy
    assert gpus.read(0) == {"gpu_memory_bytes": 2**30, "gpu_utilisation_ratio": 0, "jpeg_decoder_utilisation_ratio": 0}
    nvml.devices["GPU-0a-1b"]["gpu"] = 3
    assert gpus.read(1) == busy | {"gpu_utilisation_ratio": 0.03}
    assert nvml.opened == 2, "once a device, not once a scrape"


def test_what_a_part_of_a_gpu_does_not_count_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Nvml({"MIG-0a-1b": {"memory_bytes": 7, "gpu": None, "jpeg": None}}))
    assert gpus.read(0) == {"gpu_memory_bytes": 7}
    install(monkeypatch, Nvml({"GPU-0a-1b": {"memory_bytes": None, "gpu": None, "jpeg": None}}))
    assert gpus.read(0) is None


def test_without_pynvml_a_driver_a_device_or_cuda_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ask_cuda = gpus._uuid
    install(monkeypatch, None)
    assert gpus.read(0) is None

    no_driver = Nvml(TWO)
    monkeypatch.setattr(no_driver, "nvmlInit", lambda: (_ for _ in ()).throw(NVMLError("Driver Not Loaded")))
    install(monkeypatch, no_driver)
    assert gpus.read(0) is None

    install(monkeypatch, Nvml(TWO), uuids=("9e-9f",))
    assert gpus.read(0) is None
    assert gpus.read(1) is None

    monkeypatch.setattr(gpus, "_uuid", ask_cuda)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert gpus.read(0) is None, "a scrape must not start CUDA"


def test_a_device_that_was_not_there_yet_is_found_later(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml({})
    install(monkeypatch, nvml)
    assert gpus.read(0) is None
    nvml.devices |= TWO
    assert (gpus.read(0) or {})["gpu_utilisation_ratio"] == 0.97


def test_the_stand_in_has_the_signatures_of_the_real_one() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    asked = [name for name in vars(Nvml) if name.startswith("nvml")]
    assert len(asked) == 5
    for name in asked:
        ours = [*inspect.signature(getattr(Nvml, name)).parameters][1:]
        theirs = inspect.signature(inspect.unwrap(getattr(real, name))).parameters
        assert [*theirs][: len(ours)] == ours
        assert all(theirs[more].default is not inspect.Parameter.empty for more in [*theirs][len(ours) :])
    assert issubclass(real.NVMLError, Exception)
    assert {"used"} <= {name for name, _ in real.c_nvmlMemory_t._fields_}
    assert {"gpu"} <= {name for name, _ in real.c_nvmlUtilization_t._fields_}
