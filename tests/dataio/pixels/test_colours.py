"""Do samples become the model's pixels by the formula? Against plain numpy, on the CPU's way and on the GPU's."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from thawline.dataio.pixels import colours as module
from thawline.dataio.pixels.colours import finish
from thawline.dataio.pixels.geometry import Geometry, draw
from thawline.dataio.pixels.spec import ImageSpec

SPEC = ImageSpec(
    size_px=16, presize_px=20, max_lighting=0.4, max_saturation=0.6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1)
)
N = 5


def geometry_of(spec: ImageSpec) -> Geometry:
    ids, size = np.arange(N), np.full(N, 30, np.int32)
    return draw(spec, seed=3, epochs=np.zeros(N, np.int64), ids=ids, widths=size, heights=size)


def by_hand(samples: NDArray[Any], geometry: Geometry, spec: ImageSpec) -> NDArray[np.float64]:
    pixels = samples.astype(np.float64).mean(axis=0)
    if spec.max_saturation:
        grey = (pixels * [0.299, 0.587, 0.114]).sum(axis=-1, keepdims=True)
        pixels = np.clip(grey + geometry.saturation[:, None, None, None] * (pixels - grey), 0, 255)
    lit = geometry.scale[:, None, None] * pixels / 255 + geometry.shift[:, None, None]
    return (lit - np.array(spec.mean)) / np.array(spec.std)


@pytest.mark.parametrize("saturation", [0.0, 0.6])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_pixels_are_the_mean_lit_and_normalised(count: int, saturation: float, kind: torch.dtype) -> None:
    spec = replace(SPEC, max_saturation=saturation)
    values = np.random.default_rng(0).integers(0, 256, (count, N, 16, 16, 3))
    samples = [torch.from_numpy(v).to(kind) for v in values]
    before = [sample.clone() for sample in samples]
    found = finish(samples, geometry_of(spec), spec, dtype=torch.float32)
    np.testing.assert_allclose(found.numpy(), by_hand(values, geometry_of(spec), spec), atol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(samples, before, strict=True)), "DALI's memory was written to"
    half = finish(samples, geometry_of(spec), spec, dtype=torch.float16)
    assert torch.equal(half, found.half())


def test_the_gpus_way_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole batch at once, on a device that is told to be no CPU: the arithmetic that a GPU would do."""
    values = np.random.default_rng(1).integers(0, 256, (3, N, 16, 16, 3), dtype=np.uint8)
    samples = [torch.from_numpy(v) for v in values]
    expected = finish(samples, geometry_of(SPEC), SPEC, dtype=torch.float32)

    class Elsewhere:
        """A sample that says it lies on another device."""

        device = torch.device("meta")

        def to(self, *args: Any, **options: Any) -> torch.Tensor:
            return samples[0].to(*args, **options)

    monkeypatch.setattr(module, "_sent", lambda v, device: torch.as_tensor(v, dtype=torch.float32)[:, None, None])
    given: Any = [Elsewhere(), *samples[1:]]
    torch.testing.assert_close(finish(given, geometry_of(SPEC), SPEC, dtype=torch.float32), expected)
