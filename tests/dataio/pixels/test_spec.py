"""Does a spec refuse what contradicts itself, and do its presets and stages mean what they say?"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from thawline.dataio.errors import SpecError
from thawline.dataio.pixels.geometry import Geometry, centred, draw, project
from thawline.dataio.pixels.spec import PRESETS, ImageSpec

SPEC = ImageSpec(size_px=32, presize_px=48)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size_px": 4}, "size_px=4 is out of range: .*give size_px >= 8"),
        ({"presize_px": 31}, "presize_px=31 is smaller than size_px=32.*give presize_px >= 32"),
        ({"presize": "stretch"}, "presize='stretch' is not known: give one of crop, squish, pad"),
        ({"border": "wrap"}, "border='wrap' is not known"),
        ({"rotate_deg": -5.0}, "rotate_deg=-5.0 is out of range: .*give 0 <= rotate_deg <= 180"),
        ({"max_warp": 0.6}, "max_warp=0.6 is out of range.*folds over"),
        ({"max_zoom": float("nan")}, "max_zoom=nan is out of range"),
        ({"min_zoom": 0.05}, "min_zoom=0.05 is out of range.*give 0.1 <= min_zoom <= 10"),
        ({"min_zoom": 1.2}, r"min_zoom=1.2 is above max_zoom=1.1: .*give min_zoom <= 1.1"),
        ({"min_zoom": 0.5}, r"min_zoom=0.5 with max_warp=0.2 .*horizon.*give min_zoom >= 0.572, or less max_warp"),
        ({"max_saturation": 0.95}, "max_saturation=0.95 is out of range.*give 0 <= max_saturation <= 0.9"),
        ({"p_affine": 1.5}, "p_affine=1.5.*a probability"),
        ({"min_scale": 0.0}, "min_scale=0.0.*a share of the area"),
        ({"ratio": (2.0, 1.0)}, r"ratio=\(2.0, 1.0\) is not a range of aspects"),
        ({"ratio": (1.0, float("inf"))}, "is not a range of aspects"),
        ({"mean": (0.5, float("nan"), 0.5)}, "no pixel would be one"),
        ({"std": (0.2, 0.0, 0.2)}, "pixels would be divided by it"),
        ({"std": (0.2, float("nan"), 0.2)}, "pixels would be divided by it"),
        ({"stages": ((1.0, 32),)}, "do not begin at epoch 0"),
        ({"stages": ((0.0, 16), (2.0, 24), (2.0, 32))}, "rise from there: an epoch would have no size, or two"),
        ({"stages": ((0.0, 16), (float("nan"), 32))}, "rise from there"),
        ({"stages": ((0.0, 7), (2.0, 32))}, r"a side outside \[8, presize_px=48\]"),
        ({"stages": ((0.0, 49), (2.0, 32))}, r"a side outside \[8, presize_px=48\]"),
        ({"stages": ((0.0, 32), (2.0, 16))}, "end with side 16, but size_px=32 .*give size_px=16, or .* of side 32"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        replace(SPEC, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_warp": 0.5},
        {"min_zoom": 0.572},
        {"min_zoom": 0.1, "max_zoom": 10.0, "max_warp": 0.0},
        {"min_zoom": 1.1},
        {"stages": ((0, 8), (0.5, 48), (2, 32))},
    ],
)
def test_the_ends_of_the_ranges_pass(changes: dict[str, Any]) -> None:
    assert replace(SPEC, **changes) != SPEC


def drawn(spec: ImageSpec, n: int = 500) -> Geometry:
    """Training geometry of square sources, the size of the output."""
    sides = np.full(n, 32, np.int32)
    return draw(spec, seed=5, epochs=np.zeros(n, np.int64), ids=np.arange(n), widths=sides, heights=sides)


def folded_over(spec: ImageSpec) -> int:
    """How many samples of 20,000 show a corner that lies on the other side of the horizon than the first."""
    g = drawn(spec, 20_000)
    corners = np.array([[32, 0, 1], [32, 32, 1], [0, 32, 1]])
    return int(((g.homographies[:, 2] @ corners.T) <= 0).any(axis=1).sum())


def test_the_limit_on_zooming_out_is_where_the_horizon_comes_into_view(monkeypatch: pytest.MonkeyPatch) -> None:
    wide: dict[str, Any] = {"p_affine": 1.0, "rotate_deg": 180.0, "max_warp": 0.4}
    least = 0.889  # 4 / (1 / .4 + 2), rounded up
    with pytest.raises(SpecError, match=f"give min_zoom >= {least}"):
        replace(SPEC, **wide, min_zoom=0.888)
    assert folded_over(replace(SPEC, **wide, min_zoom=least, max_zoom=least)) == 0
    monkeypatch.setattr(ImageSpec, "_check_zoom", lambda self: None)
    assert folded_over(replace(SPEC, **wide, min_zoom=0.6, max_zoom=0.6)) > 0


# Stages ----------------------------------------------------------------------------------------------------


def test_each_epoch_has_the_side_of_the_last_stage_begun() -> None:
    staged = replace(SPEC, stages=((0, 16), (1.5, 24), (4, 32)))
    sides = {0: 16, 1: 16, 1.4999: 16, 1.5: 24, 3.999: 24, 4: 32, 100: 32}
    assert {epoch: staged.size_at(epoch) for epoch in sides} == sides
    assert {SPEC.size_at(epoch) for epoch in sides} == {32}


# Presets ---------------------------------------------------------------------------------------------------


def test_a_preset_is_the_defaults_with_its_fields_and_then_the_changes() -> None:
    assert ImageSpec.preset("default") == ImageSpec()
    expected = ImageSpec(dihedral=True, max_lighting=0.1, max_zoom=1.2, max_warp=0.0, size_px=64)
    assert ImageSpec.preset("satellite", size_px=64, max_zoom=1.2) == expected
    assert ImageSpec.preset("satellite").max_zoom == 1.05
    for name in PRESETS:
        assert PRESETS[name].items() <= vars(ImageSpec.preset(name)).items()


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"preset='satelite' .* did you mean 'satellite'\?"):
        ImageSpec.preset("satelite")
    with pytest.raises(SpecError, match="give one of default, satellite, plain, digits"):
        ImageSpec.preset("zzz")


def test_plain_trains_on_what_validation_sees() -> None:
    spec, sides = ImageSpec.preset("plain", size_px=32), np.full(500, 32, np.int32)
    found, expected = drawn(spec), centred(spec, widths=sides, heights=sides)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert not np.allclose(drawn(SPEC).homographies, expected.homographies, atol=0.1)


def test_digits_stay_upright_and_unmirrored() -> None:
    g = drawn(ImageSpec.preset("digits", size_px=32))
    corners = np.tile(np.array([[0.0, 0.0], [32, 0], [0, 32]]), (500, 1, 1))
    origin, right, down = np.moveaxis(project(g.homographies, corners), 1, 0)
    across, along = right - origin, down - origin
    assert (across[:, 0] * along[:, 1] > across[:, 1] * along[:, 0]).all()  # a mirror would turn the sign
    assert (np.abs(np.rad2deg(np.arctan2(across[:, 1], across[:, 0]))) < 20).all()  # rotation, and the warp's own
    assert (np.linalg.norm(across, axis=1) > 34).any()  # smaller than written
    assert (np.linalg.norm(across, axis=1) < 31).any()  # larger
