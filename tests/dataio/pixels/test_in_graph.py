"""Are the pixels of the graph those of the reference engine, whatever the image's size, its fit and its border?"""

import pytest
import torch

from tests.kit.images import CPU, encode, make_work, photo, upright_sizes
from thawline.dataio import ImageSpec
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.in_graph import Centred
from thawline.dataio.pixels.reference import ReferenceEngine
from thawline.dataio.pixels.spec import Border, Presize

SIZES = [(31, 57), (61, 62), (97, 640), (500, 375), (1, 1), (3, 300), (300, 3), (1, 40), (25, 24)]
"""Enlarged, as they are, shrunk a little, and filtered first; strips that are mirrored many times."""


@pytest.mark.parametrize("presize", ["crop", "squish", "pad"])
@pytest.mark.parametrize("border", ["reflect", "replicate", "constant"])
def test_it_shows_what_the_reference_engine_shows(presize: Presize, border: Border) -> None:
    spec = ImageSpec(size_px=25, presize=presize, border=border, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    images = [photo(width, height, seed=i) for i, (width, height) in enumerate(SIZES)]
    files = [encode(image, "PNG") for image in images]
    widths, heights = upright_sizes(files)
    work = make_work(files, geometry.centred(spec, widths=widths, heights=heights), size_px=spec.size_px)
    with ReferenceEngine(spec, device=CPU, dtype=torch.float32, threads=1) as engine:
        (batch,) = engine.run(iter([work]))
    graph = Centred(spec)
    for image, expected, size in zip(images, batch.inputs, SIZES, strict=True):
        off = (graph(torch.from_numpy(image))[0] - expected).abs() * torch.tensor(spec.std)[:, None, None] * 255
        assert off.max() < 0.2, f"{size}: {off.max():.3f} of 255"
