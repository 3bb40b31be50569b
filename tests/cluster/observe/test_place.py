"""Do masks and keypoints go where the image goes? Closed forms, and out and back."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kit.images import EVERYTHING, PLAIN
from thawline.dataio.pixels.geometry import Geometry, centred, draw, project
from thawline.dataio.pixels.spec import ImageSpec

SIZE = 32
SPEC = ImageSpec(size_px=SIZE, presize_px=48, dihedral=True, min_zoom=0.8, **EVERYTHING)
CORNERS = np.array([[[0, 0], [40, 0], [40, 30], [0, 30]]], np.float64)
SQUARE = np.array([[[-1, -1], [1, -1], [1, 1], [-1, 1]]], np.float64)


def middle(width: int, height: int, **changes: Any) -> Geometry:
    return centred(replace(SPEC, **changes), widths=np.array([width], np.int32), heights=np.array([height], np.int32))


def mixed(spec: ImageSpec, n: int = 200) -> Geometry:
    """Training geometry of sources of many sizes, some of which are filtered first."""
    widths, heights = np.random.default_rng(0).integers(20, 300, (2, n)).astype(np.int32)
    return draw(spec, seed=1, epochs=np.zeros(n, np.int64), ids=np.arange(n), widths=widths, heights=heights)


def test_a_geometry_knows_the_sizes_of_its_sources() -> None:
    widths, heights = np.array([40, 500], np.int32), np.array([30, 700], np.int32)
    given: dict[str, Any] = {"widths": widths, "heights": heights}
    drawn = draw(SPEC, seed=1, epochs=np.zeros(2, np.int64), ids=np.arange(2), **given)
    for g in (drawn, centred(SPEC, **given)):
        assert g.source_px.dtype == np.int64
        np.testing.assert_array_equal(g.source_px, [[30, 40], [700, 500]])


def test_a_mask_of_another_size_is_seen_at_the_same_share_of_its_sides() -> None:
    g = mixed(SPEC)
    points = np.tile(np.random.default_rng(1).uniform(0, SIZE, (9, 2)), (len(g.scale), 1, 1))
    filtered = g.prefilter_px[:, 0] > 0
    assert 40 < filtered.sum() < 160  # both kinds are there
    sides = np.where(filtered[:, None], g.prefilter_px, g.source_px)
    share = project(g.homographies, points) / sides[:, None, ::-1]
    masks = np.random.default_rng(2).integers(5, 400, g.source_px.shape)
    for sizes in (masks, g.source_px):
        np.testing.assert_allclose(project(g.onto(sizes), points), share * sizes[:, None, ::-1], atol=1e-9)
    np.testing.assert_array_equal(g.onto(g.source_px)[~filtered], g.homographies[~filtered])


@pytest.mark.parametrize(
    ("presize", "expected"),
    [
        ("squish", SQUARE),
        ("crop", SQUARE * [4 / 3, 1]),  # a sixth of each side's end is cut: it lies beyond the square
        ("pad", SQUARE * [1, 3 / 4]),
    ],
)
@pytest.mark.parametrize("scale", [1, 9])
def test_the_corners_of_a_source_are_placed_as_it_is_presized(
    presize: str, expected: NDArray[np.float64], scale: int
) -> None:
    """At scale 9 the source is filtered down first, which must not show."""
    g = middle(40 * scale, 30 * scale, presize=presize)
    assert (g.prefilter_px[0, 0] > 0) == (scale > 1)
    np.testing.assert_allclose(g.place(CORNERS * scale, size_px=SIZE), expected, atol=1e-9)


def test_a_pixel_centre_is_half_a_pixel_from_the_edge_whatever_the_size() -> None:
    g = centred(SPEC, widths=np.array([16], np.int32), heights=np.array([16], np.int32), size_px=16)
    first_and_last = np.array([[[0.5, 0.5], [15.5, 15.5]]])
    np.testing.assert_allclose(g.place(first_and_last, size_px=16)[0], [[-15 / 16] * 2, [15 / 16] * 2], atol=1e-12)


def test_a_flip_mirrors_the_x_of_keypoints() -> None:
    spec = replace(SPEC, **{**PLAIN, "flip": True}, dihedral=False, min_zoom=1.0, min_scale=1.0, presize="squish")
    g = mixed(spec)
    points = np.random.default_rng(3).uniform(0, 1, (200, 4, 2))
    placed = g.place(points * g.source_px[:, None, ::-1], size_px=SIZE)
    mirrored = g.homographies[:, 0, 0] < 0
    assert 70 < mirrored.sum() < 130
    np.testing.assert_allclose(placed, (points * 2 - 1) * np.where(mirrored[:, None, None], [-1, 1], 1), atol=1e-9)


def test_what_the_model_sees_at_a_point_is_placed_at_that_point() -> None:
    g = mixed(SPEC)
    seen = np.random.default_rng(4).uniform(0, SIZE, (200, 6, 2))
    there = project(g.onto(g.source_px), seen)
    placed = g.place(there, size_px=SIZE)
    np.testing.assert_allclose(placed, seen / SIZE * 2 - 1, atol=1e-9)
    np.testing.assert_allclose(g.taken_back(placed, size_px=SIZE), there, atol=1e-9)


def test_missing_points_stay_missing_and_no_points_stay_none() -> None:
    g = middle(40, 30)
    points = np.array([[[np.nan, np.nan], [20, 15], [np.nan, 3.0]]])
    placed = g.place(points, size_px=SIZE)[0]
    np.testing.assert_array_equal(np.isnan(placed).all(axis=1), [True, False, True])
    np.testing.assert_allclose(placed[1], 0, atol=1e-12)
    assert g.place(np.zeros((1, 0, 2)), size_px=SIZE).shape == (1, 0, 2)


def test_beyond_the_horizon_of_the_perspective_nothing_is_seen() -> None:
    """Output (u, v) shows source (u, v) / (1 + v / 10): rows draw together towards y = 10 and never reach it."""
    tilted = np.array([[[1, 0, 0], [0, 1, 0], [0, 0.1, 1]]])
    g = replace(middle(30, 30), homographies=tilted)
    y = np.array([0.0, 5, 9, 9.99, 10, 11, 30])
    placed = g.place(np.stack([np.full(7, 2.0), y], -1)[None], size_px=SIZE)[0]
    v = y[:4] / (1 - y[:4] / 10)
    np.testing.assert_allclose(placed[:4], np.stack([2 * (1 + v / 10), v], -1) * 2 / SIZE - 1, rtol=1e-9)
    assert np.isnan(placed[4:]).all()
