"""Do both engines show Pillow's pixels, of every kind of picture that Pillow and DALI read, and without a word?"""

import re
from pathlib import Path

import pytest

from tests.campaigns.likeness import compare
from tests.kit.gallery import gallery

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")

BITS = "cannot be decoded: its values have 32 bits or a sign, and nothing says which is white; save it with 8 or 16"
REFUSED = {
    "32_swapped.bmp": "cannot be decoded: Unsupported BMP bitfields layout",
    **dict.fromkeys(
        ("grayscale.pam", "rgb.pam", "rgb_alpha.pam"), "cannot be decoded: a broken PAM, or a rare kind .*"
    ),
    **dict.fromkeys(("float.pfm", "float.tif", "signed.tif"), BITS),
    **dict.fromkeys(
        ("two8_photo0.tif", "rgba8_0_planar1.tif"), "cannot be decoded: a broken TIFF, or a rare kind of it"
    ),
    "rgba8_1_planar1.tif": "cannot be decoded: unknown raw mode for given image mode",
}
"""What Pillow 13 does not read, or not without guessing."""


@pytest.mark.slow
def test_both_engines_show_pillow_s_pixels_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = compare(1, tmp_path)
    assert len(found) >= 200
    assert found.keys() == gallery(1).keys()
    refused = {name: row.status for name, row in found.items() if row.status != "ok"}
    assert refused.keys() == REFUSED.keys()
    assert {name for name, why in REFUSED.items() if not re.fullmatch(why, refused[name])} == set()
    wrong = {name: row.levels for name, row in found.items() if max(row.levels.values(), default=0) > row.allowed}
    assert wrong == {}
    assert {name for name, row in found.items() if row.status == "ok" and len(row.levels) != 2} == set()
    assert capfd.readouterr().err == ""
    by_dali = {name for name, row in found.items() if row.codec == "dali"}
    assert len(by_dali) >= 130, "most kinds need no detour"
    assert by_dali > {f"turned{o}.{end}" for o in range(1, 9) for end in ("jpg", "png", "tif")}
