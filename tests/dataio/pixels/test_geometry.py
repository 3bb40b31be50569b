"""Does each output pixel come from where the spec says? Each augmentation against a closed form, alone and together.

The closed forms work on points, one step after another, and never multiply a matrix.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from tests.kit.geometries import ALONE, CORNERS, EPOCH, GRID, SEED, SIZE, SPEC, Floats, alone, drawn, unfiltered
from thawline.dataio.hashing import uniforms
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.geometry import MAX_SHRINK, SAMPLES, Geometry, centred, draw, project
from thawline.dataio.pixels.spec import Border, ImageSpec, Presize

# Which counter each draw has. Recorded runs and seeds rest on these places.
_NAMES = (
    *("crop_x", "crop_y", "flip", "p_rotate", "rotate", "p_zoom", "zoom", "zoom_x", "zoom_y", "p_warp", "warp_x"),
    *("warp_y", "p_brightness", "brightness", "p_contrast", "contrast", "scale", "ratio", "scale_x", "scale_y"),
    *("dihedral", "p_saturation", "saturation"),
)
PLACES = {name: place for place, name in enumerate(_NAMES)}
ALL = {"everything": SPEC, "everything, dihedral": replace(SPEC, dihedral=True, min_zoom=0.8)}


def heckbert(quad: Floats, p: Floats) -> Floats:
    """The projective map of the unit square's corners (0,0) (1,0) (1,1) (0,1) to a quadrilateral, at points (k, 2)."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = quad
    d1x, d1y, d2x, d2y, sx, sy = x1 - x2, y1 - y2, x3 - x2, y3 - y2, x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    g, h = (sx * d2y - d2x * sy) / (d1x * d2y - d2x * d1y), (d1x * sy - sx * d1y) / (d1x * d2y - d2x * d1y)
    u, v = p.T
    x = (x1 - x0 + g * x1) * u + (x3 - x0 + h * x3) * v + x0
    y = (y1 - y0 + g * y1) * u + (y3 - y0 + h * y3) * v + y0
    return np.stack([x, y], -1) / (g * u + h * v + 1)[:, None]


def where_from(spec: ImageSpec, points: Floats, sample: int, *, width: int, height: int) -> Floats:
    """The closed form: where in the source the training image of this sample shows these output points."""
    u = {name: float(uniforms(SEED, EPOCH, sample, place)) for name, place in PLACES.items()}
    x, y = (points / spec.size_px * 2 - 1).T
    if spec.dihedral:
        x, y = (-x if int(8 * u["dihedral"]) & 1 else x), (-y if int(8 * u["dihedral"]) & 2 else y)
        x, y = (y, x) if u["dihedral"] >= 0.5 else (x, y)
    elif spec.flip and u["flip"] < 0.5:
        x = -x
    if u["p_rotate"] < spec.p_affine:
        turned = (x + 1j * y) * np.exp(-1j * np.pi * spec.rotate_deg / 180 * (2 * u["rotate"] - 1))
        x, y = turned.real, turned.imag
    if u["p_zoom"] < spec.p_affine:
        # The side of a window whose left edge is free by 2 (1 - side), to the left if that is negative.
        side = 1 / (spec.min_zoom + (spec.max_zoom - spec.min_zoom) * u["zoom"])
        x, y = (-1 + 2 * (1 - side) * u[f"zoom_{axis}"] + side * (v + 1) for axis, v in (("x", x), ("y", y)))
    if u["p_warp"] < spec.p_affine:
        a, b = (spec.max_warp * (2 * u[name] - 1) for name in ("warp_x", "warp_y"))
        quad = np.array([[-1 - b, -1 - a], [1 + b, -1 + a], [1 - b, 1 - a], [-1 + b, 1 + a]])
        x, y = heckbert(quad, (np.stack([x, y], -1) + 1) / 2).T
    if spec.min_scale < 1:
        area = spec.min_scale + (1 - spec.min_scale) * u["scale"]
        aspect = spec.ratio[0] * (spec.ratio[1] / spec.ratio[0]) ** u["ratio"]
        w, h = min(1.0, (area * aspect) ** 0.5), min(1.0, (area / aspect) ** 0.5)
        x, y = -1 + 2 * (1 - w) * u["scale_x"] + w * (x + 1), -1 + 2 * (1 - h) * u["scale_y"] + h * (y + 1)
    side = min(width, height)
    left, top = (width - side) * u["crop_x"], (height - side) * u["crop_y"]
    return np.stack([left + side * (x + 1) / 2, top + side * (y + 1) / 2], -1)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (33, 33), (400, 90), (500, 700)])
@pytest.mark.parametrize("name", [*ALONE, *ALL])
def test_training_geometry_equals_the_closed_form(name: str, width: int, height: int) -> None:
    spec = ALL.get(name) or alone(name)
    found = unfiltered(drawn(spec, 60, width=width, height=height), width, height, GRID)
    expected = np.stack([where_from(spec, GRID, i, width=width, height=height) for i in range(60)])
    np.testing.assert_allclose(found, expected, atol=1e-9 * max(width, height))


def test_a_seed_still_draws_what_it_drew_when_it_was_recorded() -> None:
    """Recorded before dihedral and saturation were appended: what is added must not move what is there."""
    widths, heights = np.array([40, 500], np.int32), np.array([30, 700], np.int32)
    g = draw(SPEC, seed=SEED, epochs=np.array([EPOCH] * 2), ids=np.array([0, 7]), widths=widths, heights=heights)
    first = [
        [-6.166595860929438e-01, -2.1405414709027856e-01, 2.9049297185337444e01],
        [-2.0710379974604304e-02, 3.6620032294214572e-01, 7.395457779861242e-01],
        [-1.6833858042583144e-03, -1.1250540668223667e-02, 1.0],
    ]
    second = [
        [-1.6965664694609908, 6.7499582967486191e-02, 6.0963641220750361e01],
        [6.7890027522600857e-02, 1.7063800877274953, 6.8671299539796280],
        [0.0, 0.0, 1.0],
    ]
    lifted = np.diag([500 / 69, 700 / 97, 1]) @ second  # it was recorded behind a prefilter to 97 x 69
    np.testing.assert_allclose(g.onto(g.source_px), np.stack([first, lifted]), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(g.scale[:, 0], [1.104781484226633, 1.5294666756622544], rtol=1e-12)
    np.testing.assert_allclose(g.shift[:, 0], [0.06922416705139432, -0.2647333378311272], rtol=1e-12)


@pytest.mark.parametrize("side", [16, 48])
def test_at_another_size_a_sample_shows_the_same_part_of_its_source(side: int) -> None:
    sizes: dict[str, Any] = {"widths": np.full(50, 90, np.int32), "heights": np.full(50, 70, np.int32)}
    full = drawn(SPEC, 50, width=90, height=70)
    other = draw(SPEC, seed=SEED, epochs=np.full(50, EPOCH), ids=np.arange(50), **sizes, size_px=side)
    for one, same in ((other, full), (centred(SPEC, **sizes, size_px=side), centred(SPEC, **sizes))):
        found, expected = unfiltered(one, 90, 70, GRID * side / SIZE), unfiltered(same, 90, 70, GRID)
        np.testing.assert_allclose(found, expected, atol=1e-9)
    limit = shrink(replace(SPEC, size_px=side), other)
    assert (limit[other.prefilter_px[:, 0] > 0] < MAX_SHRINK * 1.02).all()
    assert (other.prefilter_px[:, 0] > 0).mean() == pytest.approx(1.0 if side < SIZE else 0.0, abs=0.2)


# Validation ------------------------------------------------------------------------------------------------


def one_size(width: int, height: int, **changes: Any) -> Geometry:
    spec = replace(SPEC, **changes)
    return centred(spec, widths=np.array([width], np.int32), heights=np.array([height], np.int32))


@pytest.mark.parametrize(
    ("presize", "corner", "opposite"),
    [("crop", (5, 0), (35, 30)), ("squish", (0, 0), (40, 30)), ("pad", (0, -5), (40, 35))],
)
@pytest.mark.parametrize("upright", [False, True])
def test_validation_sees_the_centre_crop_the_whole_or_the_padded_square(
    presize: str, corner: tuple[int, int], opposite: tuple[int, int], upright: bool
) -> None:
    (left, top), (right, bottom), size = corner, opposite, (40, 30)
    if upright:
        left, top, right, bottom, size = top, left, bottom, right, (30, 40)
    g = one_size(*size, presize=presize)
    expected = [[left, top], [right, top], [right, bottom], [left, bottom]]
    np.testing.assert_allclose(project(g.homographies, CORNERS[None])[0], expected, atol=1e-12)
    np.testing.assert_array_equal(g.scale, np.ones((1, 3)))
    np.testing.assert_array_equal(g.shift, np.zeros((1, 3)))


@pytest.mark.parametrize("presize", ["squish", "pad"])
def test_squish_and_pad_always_see_the_whole_image_in_training(presize: str) -> None:
    found = unfiltered(drawn(alone("nothing", presize=presize), 20), 40, 30, CORNERS)
    np.testing.assert_allclose(
        found, np.tile(project(one_size(40, 30, presize=presize).homographies, CORNERS[None]), (20, 1, 1))
    )


# Colour ----------------------------------------------------------------------------------------------------


def test_folded_colour_map_equals_lighting_then_normalisation() -> None:
    g = drawn(SPEC, 50)
    mean, std = g.folded(SPEC)
    assert mean.dtype == std.dtype == np.float32
    assert mean.shape == std.shape == (50, 3)
    x = np.arange(256.0)[:, None, None]
    expected = ((g.scale * x / 255 + g.shift) - np.array(SPEC.mean)) / np.array(SPEC.std)
    np.testing.assert_allclose((x - mean) / std, expected, atol=2e-6)


def test_lighting_shifts_brightness_and_turns_contrast_about_mid_grey() -> None:
    g = drawn(SPEC, 2000)
    u = {name: uniforms(SEED, EPOCH, np.arange(2000), place) for name, place in PLACES.items()}
    contrast = np.where(u["p_contrast"] < 0.6, 0.6 ** (1 - 2 * u["contrast"]), 1.0)
    brighter = np.where(u["p_brightness"] < 0.6, 0.4 * (u["brightness"] - 0.5), 0.0)
    for x in (0.0, 0.5, 0.8):
        expected = 0.5 + contrast * (x - 0.5) + brighter
        np.testing.assert_allclose(g.scale * x + g.shift, np.repeat(expected[:, None], 3, 1), atol=1e-12)
    assert 0.6 <= contrast.min() < 0.62
    assert 1.63 < contrast.max() <= 1 / 0.6
    for changed in (contrast != 1, brighter != 0):
        assert stats.binomtest(int(changed.sum()), 2000, 0.6).pvalue > 0.01


def test_saturation_is_even_both_ways_and_has_its_probability() -> None:
    found = drawn(replace(SPEC, max_saturation=0.4), 2000).saturation
    u = {name: uniforms(SEED, EPOCH, np.arange(2000), place) for name, place in PLACES.items()}
    expected = np.where(u["p_saturation"] < 0.6, 0.6 ** (1 - 2 * u["saturation"]), 1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    changed = found[found != 1]
    assert stats.kstest((np.log(changed) / np.log(0.6) + 1) / 2, "uniform").pvalue > 0.01
    assert stats.binomtest(len(changed), 2000, 0.6).pvalue > 0.01


def test_no_lighting_leaves_colours_alone() -> None:
    for g in (drawn(replace(SPEC, max_lighting=0.0), 100), one_size(40, 30, max_saturation=0.4)):
        np.testing.assert_array_equal(g.scale, 1)
        np.testing.assert_array_equal(g.shift, 0)
        np.testing.assert_array_equal(g.saturation, 1)


# Prefilter -------------------------------------------------------------------------------------------------


def shrink(spec: ImageSpec, g: Geometry) -> Floats:
    """Source pixels an output pixel at the centre, in the direction of most, by finite differences: (n,)."""
    middle, step = spec.size_px / 2, 1e-4
    points = np.array(
        [[middle - step, middle], [middle + step, middle], [middle, middle - step], [middle, middle + step]]
    )
    p = project(g.homographies, np.tile(points, (len(g.scale), 1, 1)))
    jacobian = np.stack([p[:, 1] - p[:, 0], p[:, 3] - p[:, 2]], -1) / (2 * step)
    return np.linalg.svd(jacobian, compute_uv=False)[:, 0].astype(np.float64)


@pytest.mark.parametrize("side", [20, 32, 48, 54, 55, 64, 300])
def test_validation_is_filtered_above_the_limit_only(side: int) -> None:
    g = one_size(side, side + 9)
    assert (g.prefilter_px[0, 0] > 0) == (side / SIZE > MAX_SHRINK)
    if side / SIZE > MAX_SHRINK:  # filtered down until the warp may do the rest
        np.testing.assert_allclose(g.prefilter_px[0], np.array([side + 9, side]) * MAX_SHRINK * SIZE / side, atol=0.5)
    else:
        np.testing.assert_array_equal(g.prefilter_px, 0)


def test_filter_and_homography_together_see_what_the_homography_alone_would(monkeypatch: pytest.MonkeyPatch) -> None:
    filtered = drawn(SPEC, 300, width=105, height=135)
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "MAX_SHRINK", np.inf)
        bare = drawn(SPEC, 300, width=105, height=135)
    needed = filtered.prefilter_px[:, 0] > 0
    np.testing.assert_array_equal(bare.prefilter_px, 0)
    np.testing.assert_array_equal(needed, shrink(SPEC, bare) > MAX_SHRINK)
    assert 30 < needed.sum() < 270  # both kinds are there
    found, expected = (unfiltered(g, 105, 135, GRID) for g in (filtered, bare))
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_array_equal(filtered.homographies[~needed], bare.homographies[~needed])
    # Whole pixels of a small image are coarse: right to within half a pixel in 40.
    np.testing.assert_allclose(shrink(SPEC, filtered)[needed], MAX_SHRINK, rtol=0.02)
    assert (filtered.prefilter_px[needed] <= [135, 105]).all()


def test_samples_stand_evenly_about_the_centre_and_spread_only_where_a_map_shrinks() -> None:
    np.testing.assert_allclose(SAMPLES.sum(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.hypot(*SAMPLES.T), 0.38)
    assert len({*SAMPLES[:, 0].round(6)}) == len({*SAMPLES[:, 1].round(6)}) == 3  # no two in a row or column
    spec = replace(SPEC, presize="squish")
    sizes = (SIZE * np.array([0.5, 1, 1.0625, 1.125, 1.1875, 2, 12])).astype(np.int32)
    g = centred(spec, widths=sizes, heights=sizes)
    np.testing.assert_allclose(g.sampling, np.clip((sizes / SIZE - 1) / 0.2, 0, 1), atol=1e-9)
    assert ((g.sampling[2:5] > 0) & (g.sampling[2:5] < 1)).all()
    point = np.array([[[13.0, 7.0]]])
    for k, offset in enumerate(SAMPLES):
        expected = project(g.homographies, np.tile(point, (7, 1, 1)) + (g.sampling[:, None] * offset)[:, None])
        np.testing.assert_allclose(project(g.sampled(k), np.tile(point, (7, 1, 1))), expected, atol=1e-9)


def test_homographies_map_as_the_division_says_and_end_in_one() -> None:
    g = drawn(SPEC, 5)
    np.testing.assert_array_equal(g.homographies[:, 2, 2], 1)
    for m, seen in zip(g.homographies, project(g.homographies, np.tile(GRID, (5, 1, 1))), strict=True):
        for (x, y), found in zip(GRID, seen, strict=True):
            below = m[2, 0] * x + m[2, 1] * y + m[2, 2]
            expected = [(m[0, 0] * x + m[0, 1] * y + m[0, 2]) / below, (m[1, 0] * x + m[1, 1] * y + m[1, 2]) / below]
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("border", ["reflect", "constant"])
@pytest.mark.parametrize("presize", ["crop", "squish", "pad"])
def test_all_that_a_warp_reads_lies_in_the_window(presize: Presize, border: Border) -> None:
    """Every sample of every output pixel, folded back at the borders, with its neighbour for the interpolation."""
    spec = replace(SPEC, presize=presize, border=border, rotate_deg=60)
    g = drawn(spec, 200, width=75, height=60)
    starts, shapes = g.windows(SIZE)
    size = g.source_px[:, None, ::-1]
    assert (starts >= 0).all()
    assert (starts + shapes <= g.source_px).all()
    assert ((starts == 0) & (shapes == g.source_px))[g.prefilter_px[:, 0] > 0].all()
    assert 0.3 < (shapes.prod(axis=1) / g.source_px.prod(axis=1)).mean() < 0.999  # it is worth something
    centres = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), -1).reshape(1, -1, 2)
    whole = g.prefilter_px[:, 0] > 0
    for k in range(len(SAMPLES)):
        there = project(g.sampled(k), np.tile(centres, (200, 1, 1)))
        folded = size - np.abs(np.mod(there, 2 * size) - size)  # a triangle wave
        seen = folded if border == "reflect" else np.clip(there, 0, size)
        low, high = starts[:, None, ::-1], (starts + shapes)[:, None, ::-1]
        inside = ((seen - 1 >= low) | (low == 0)) & ((seen + 1 <= high) | (high == size))
        assert inside[~whole].all()
