"""Are the validation images of a report drawn with what was predicted and with what is true? Pixels are looked at."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray

from tests.dataio.test_shapes import indexed
from thawline.cluster.results.report import pictures
from thawline.dataio.batch import Batch
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import ImageLoader, loaders
from thawline.trainer.metrics.predictions import Predictions

SIDE = 32
DPI = 400
"""So many that a line is some pixels wide."""


def colour(index: int) -> NDArray[np.float64]:
    """(3,) in [0, 1]."""
    return np.array(matplotlib.colormaps["tab10"](index)[:3])


class Drawn:
    """A figure as pixels, to be looked at by the coordinates of its images."""

    def __init__(self, figure: Any) -> None:
        figure.set_dpi(DPI)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        self.pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
        self.axes: list[Axes] = figure.axes

    def at(self, image: int, x: float, y: float) -> NDArray[np.float64]:
        """The colour there, (3,) in [0, 1]."""
        across, up = self.axes[image].transData.transform((x, y))
        return self.pixels[round(len(self.pixels) - 0.5 - up), round(across - 0.5)]


def shown(valid: ImageLoader, said: NDArray[np.float32]) -> tuple[Drawn, Batch, list[Batch]]:
    """The picture of all validation images of which the model says this; their batch; and what the model was asked."""
    (batch,) = list(valid.stream())
    asked, zeros = list[Batch](), np.zeros(len(batch.ids), np.float32)
    outcomes = Predictions(batch.ids.numpy(), batch.targets.numpy(), said, zeros, valid.task).table(valid.classes)

    def outputs_of(images: Batch) -> torch.Tensor:
        asked.append(images)
        return torch.from_numpy(said)

    return Drawn(pictures(outcomes, valid, np.arange(len(batch.ids)), outputs_of)), batch, asked


def validation(folder: Path, task: str) -> ImageLoader:
    _, valid = loaders(
        indexed(folder, task, count=16), ImageSpec(size_px=SIDE, presize_px=64), batch=4, engine="reference"
    )
    return valid


def test_masks_are_areas_where_predicted_and_lines_where_true(tmp_path: Path) -> None:
    valid = validation(tmp_path, "mask")
    classes, half = len(valid.classes), SIDE // 2
    said = np.zeros((valid.samples, classes, SIDE, SIDE), np.float32)
    said[:, 1, :, :half], said[:, 0, :, half:] = 1, 1  # the left half is of class 1, whatever is seen
    drawn, batch, asked = shown(valid, said)
    assert torch.equal(torch.as_tensor(asked[0].inputs), torch.as_tensor(batch.inputs))
    spec = valid.spec
    lines = areas = 0
    for number, (image, mask) in enumerate(zip(batch.inputs, batch.targets.numpy(), strict=True)):
        pixels = np.clip(image.permute(1, 2, 0).numpy() * np.array(spec.std) + np.array(spec.mean), 0, 1)
        for y in range(2, SIDE - 2):
            for x in range(2, SIDE - 2):
                near = mask[y - 2 : y + 3, x - 2 : x + 3]
                if (near == near[0, 0]).all():
                    expected = (pixels[y, x] + colour(1 if x < half else 0)) / 2
                    np.testing.assert_allclose(drawn.at(number, x, y), expected, atol=0.02)
                    areas += 1
                left, right = mask[y - 1 : y + 2, x], mask[y - 1 : y + 2, x + 1]
                if (left == left[0]).all() and not left[0] and (right == right[0]).all() and right[0]:
                    np.testing.assert_allclose(drawn.at(number, x + 0.5, y), colour(right[0]), atol=0.02)
                    lines += 1
    assert areas > 500
    assert lines > 10


def test_points_are_discs_where_predicted_and_crosses_where_true(tmp_path: Path) -> None:
    valid = validation(tmp_path, "points")
    k = len(valid.classes)
    said = np.linspace(-0.8, 0.8, valid.samples * k * 2, dtype=np.float32).reshape(valid.samples, k, 2)
    drawn, batch, asked = shown(valid, said)
    assert asked == [], "rows have all of a prediction"
    for number, (found, true) in enumerate(zip(said, batch.targets.numpy(), strict=True)):
        places = (np.stack([found, true]) + 1) / 2 * SIDE - 0.5
        for i in range(k):
            others = np.concatenate([places[:, :i], places[:, i + 1 :]], 1).reshape(-1, 2)
            for kind in range(2):
                x, y = places[kind, i]
                apart = [*others, places[1 - kind, i]]
                if (
                    min(np.abs(other - (x, y)).max() for other in apart) < 3
                    or not 1 < min(x, y) <= max(x, y) < SIDE - 2
                ):
                    continue
                np.testing.assert_allclose(drawn.at(number, x, y), colour(i), atol=0.03)
                off = drawn.at(number, x + 0.4, y)  # within a disc, beside the middle of a cross
                assert (np.abs(off - colour(i)).max() < 0.03) == (kind == 0)
