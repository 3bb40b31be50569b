"""Are augmentations drawn as they are described: how often, how far, and by seed, epoch and id alone?"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from tests.kit.geometries import CORNERS, GRID, SEED, SIZE, SPEC, Floats, alone, drawn, unfiltered
from thawline.dataio.pixels.geometry import draw, project
from thawline.dataio.pixels.spec import ImageSpec

# What is drawn ---------------------------------------------------------------------------------------------


def unit(spec: ImageSpec, points: Floats, n: int = 4000) -> Floats:
    """Where output points lie in the unit square of a square source, (n, k, 2) in [-1, 1] where inside."""
    return unfiltered(drawn(spec, n, width=SIZE, height=SIZE), SIZE, SIZE, points) / SIZE * 2 - 1


def test_crop_place_is_uniform_over_what_is_free() -> None:
    left = unfiltered(drawn(alone("nothing"), 2000), 40, 30, CORNERS)[:, 0]
    assert stats.kstest(left[:, 0] / 10, "uniform").pvalue > 0.01
    np.testing.assert_allclose(left[:, 1], 0, atol=1e-12)


def test_flip_mirrors_half_of_the_samples_and_leaves_the_rest() -> None:
    plain, found = unit(alone("nothing"), GRID), unit(alone("flip"), GRID)
    same = np.isclose(found, plain).all(axis=(1, 2))
    mirrored = np.asarray(np.isclose(found, plain * [-1, 1]).all(axis=(1, 2)))
    assert (same ^ mirrored).all()
    assert stats.binomtest(int(mirrored.sum()), len(mirrored), 0.5).pvalue > 0.01


def test_each_symmetry_of_the_square_takes_an_eighth_of_the_samples_and_pixels_to_pixels() -> None:
    cells = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
    turned = [np.rot90(mirrored, turns) for mirrored in (cells, cells.T) for turns in range(4)]
    x, y = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    g = drawn(alone("symmetries"), 2000, width=SIZE, height=SIZE)
    found = project(g.homographies, np.tile(np.stack([x, y], -1).reshape(-1, 2), (2000, 1, 1)))
    np.testing.assert_allclose(found % 1, 0.5, atol=1e-9)
    column, row = np.moveaxis(np.floor(found).astype(np.int64), -1, 0)
    seen = (row * SIZE + column).reshape(-1, SIZE, SIZE)
    counts = [int((seen == one).all(axis=(1, 2)).sum()) for one in turned]
    assert sum(counts) == 2000
    assert stats.chisquare(counts).pvalue > 0.01
    np.testing.assert_array_equal(
        g.homographies, drawn(alone("symmetries", flip=False), 2000, width=SIZE, height=SIZE).homographies
    )


def test_rotation_turns_about_the_centre_by_a_uniform_angle() -> None:
    found = unit(alone("rotation"), np.array([[SIZE / 2, SIZE / 2], [SIZE, SIZE / 2]]))
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-12)
    np.testing.assert_allclose(np.hypot(*found[:, 1].T), 1, atol=1e-12)
    degrees = np.rad2deg(np.arctan2(found[:, 1, 1], found[:, 1, 0]))
    assert stats.kstest((degrees + 30) / 60, "uniform").pvalue > 0.01


def test_zoom_sees_a_square_window_that_stays_inside() -> None:
    found = unit(alone("zoom"), CORNERS)
    assert np.abs(found).max() <= 1 + 1e-12
    width, height = found[:, 2, 0] - found[:, 0, 0], found[:, 2, 1] - found[:, 0, 1]
    np.testing.assert_allclose(width, height, atol=1e-12)
    assert stats.kstest((2 / width - 1) / 0.5, "uniform").pvalue > 0.01  # the zoom, 1 to 1.5
    assert stats.kstest((found[:, 0, 0] + 1) / (2 - width), "uniform").pvalue > 0.01


def test_zooming_out_keeps_the_whole_image_in_the_window() -> None:
    found = unit(alone("zoom in and out"), CORNERS)
    (left, top), (right, bottom) = found[:, 0].T, found[:, 2].T
    np.testing.assert_allclose(right - left, bottom - top, atol=1e-12)
    assert stats.kstest((2 / (right - left) - 0.7) / 0.5, "uniform").pvalue > 0.01  # the zoom, .7 to 1.2
    out = right - left > 2
    assert 0.5 < out.mean() < 0.7
    assert (np.abs(found[out]) >= 1 - 1e-12).all()
    assert stats.kstest(((-1 - left) / (right - left - 2))[out], "uniform").pvalue > 0.01


def test_perspective_tilts_the_corners_as_fastai_does() -> None:
    found = unit(alone("perspective"), CORNERS)
    b, a = (-1 - found[:, 0]).T
    expected = [[-1 - b, -1 - a], [1 + b, -1 + a], [1 - b, 1 - a], [-1 + b, 1 + a]]
    np.testing.assert_allclose(found, np.array(expected).transpose(2, 0, 1), atol=1e-9)
    for tilt in (a, b):
        assert stats.kstest((tilt / 0.3 + 1) / 2, "uniform").pvalue > 0.01


def test_random_resized_crop_has_area_and_aspect_within_range() -> None:
    found = unit(alone("random resized crop"), CORNERS)
    assert np.abs(found).max() <= 1 + 1e-12
    width, height = (found[:, 2] - found[:, 0]).T / 2
    area, aspect = width * height, width / height
    assert area.min() > 0.3 * 0.75  # where a side is cut off at 1, the area is below the one drawn
    assert ((aspect > 3 / 4 - 1e-9) & (aspect < 4 / 3 + 1e-9)).all()
    uncut = (width < 1) & (height < 1)
    assert area[uncut].min() >= 0.3
    small = area[uncut & (area < 0.75)]  # no side can be cut at these areas, whatever the aspect
    assert stats.kstest((small - 0.3) / 0.45, "uniform").pvalue > 0.01


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_each_affine_augmentation_happens_with_its_probability(p: float) -> None:
    plain = unit(alone("nothing"), GRID)
    for name in ("rotation", "zoom", "perspective"):
        changed = int((~np.isclose(unit(alone(name, p_affine=p), GRID), plain).all(axis=(1, 2))).sum())
        assert stats.binomtest(changed, len(plain), p).pvalue > 0.01, name


def test_geometry_depends_on_seed_epoch_and_id_alone() -> None:
    """Shuffling or splitting a batch shuffles or splits the rows, to the bit."""
    draws = np.random.default_rng(0)
    n = 64
    ids, epochs = draws.integers(0, 10**6, n), draws.integers(0, 50, n)
    widths, heights = draws.integers(20, 400, (2, n)).astype(np.int32)

    def rows(which: NDArray[np.int64], seed: int = SEED) -> list[NDArray[Any]]:
        spec = replace(SPEC, max_saturation=0.4)
        g = draw(spec, seed=seed, epochs=epochs[which], ids=ids[which], widths=widths[which], heights=heights[which])
        return [g.homographies, g.prefilter_px, g.scale, g.shift, g.source_px, g.saturation]

    whole, mixed = rows(np.arange(n)), draws.permutation(n)
    for one, other in zip(rows(mixed), whole, strict=True):
        np.testing.assert_array_equal(one, other[mixed])
    for one, other in zip(rows(np.arange(7, 8)), whole, strict=True):
        np.testing.assert_array_equal(one, other[7:8])
    assert not np.isclose(rows(np.arange(n), seed=43)[0], whole[0]).all(axis=(1, 2)).any()
    assert not np.isclose(drawn(SPEC, epoch=0).homographies, drawn(SPEC, epoch=1).homographies).all(axis=(1, 2)).any()
