"""Is the quality of pixels measured as it is defined, and does each benchmark of it tell all that it promises?"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from thawline.benchmarks import __main__ as command_line
from thawline.benchmarks import (
    harness,
    peers,
    prefilter,
    presize,
    presize_quality,
)
from thawline.benchmarks.photos import real_photos, write_photos
from thawline.dataio.pixels import geometry, pictures
from thawline.dataio.pixels.spec import ImageSpec


def test_the_ideal_of_an_integer_shrink_is_the_box_average() -> None:
    # With as many samples as source pixels an output pixel, each falls on a centre: bilinear is exact there.
    shrink, size = 8, 12
    source = np.random.default_rng(0).integers(0, 256, (shrink * size, shrink * size, 3), np.uint8)
    found = presize.ideal(source, np.diag([shrink, shrink, 1.0]), size_px=size, border="reflect", sub=shrink)
    box = source.reshape(size, shrink, size, shrink, 3).astype(np.float64).mean(axis=(1, 3))
    np.testing.assert_allclose(found, box, atol=1e-9)


def test_the_ideal_of_a_shifted_copy_is_the_shifted_ideal() -> None:
    source = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    shift = np.array([[2.0, 0.0, 4.0], [0.0, 2.0, 8.0], [0.0, 0.0, 1.0]])  # x by two output pixels, y by four
    plain = presize.ideal(source, np.diag([2.0, 2.0, 1.0]), size_px=16, border="reflect")
    moved = presize.ideal(source, shift, size_px=12, border="reflect")
    np.testing.assert_allclose(moved[:, :], plain[4:16, 2:14], atol=1e-9)


@pytest.mark.parametrize(("width", "height"), [(300, 240), (640, 520)])
def test_taking_the_prefilter_out_gives_the_map_to_the_decoded_source(width: int, height: int) -> None:
    ids, zeros = np.arange(20), np.zeros(20, np.int64)
    sizes: dict[str, Any] = {"widths": np.full(20, width, np.int32), "heights": np.full(20, height, np.int32)}
    filtered = geometry.draw(ImageSpec(size_px=160), seed=3, epochs=zeros, ids=ids, **sizes)
    corners = np.tile([[0.0, 0.0], [160.0, 0.0], [160.0, 160.0], [0.0, 160.0]], (20, 1, 1))
    there = geometry.project(filtered.homographies, corners)
    scale = np.where(filtered.prefilter_px > 0, filtered.prefilter_px / np.array([height, width]), 1.0)[:, None, ::-1]
    found = geometry.project(peers.from_source(filtered), corners)
    np.testing.assert_allclose(found * scale, there, rtol=1e-9, atol=1e-9)
    assert (filtered.prefilter_px > 0).all() == (height > 500)


def test_psnr_is_the_definition() -> None:
    black = np.zeros((4, 4, 3))
    assert presize.psnr(black + 255.0, black) == 0.0
    assert presize.psnr(black + 25.5, black) == pytest.approx(20.0)


def test_shrinks_are_the_larger_stretch_of_the_map() -> None:
    turn = np.array([[0.6, -0.8, 3.0], [0.8, 0.6, 5.0], [0.0, 0.0, 1.0]])
    homographies = np.stack([turn @ np.diag([1.5, 3.0, 1.0]), np.diag([2.0, 1.0, 1.0]) @ turn])
    np.testing.assert_allclose(prefilter.shrinks(homographies, size_px=64), [3.0, 2.0], rtol=1e-6)


def test_photos_are_seeded_jpegs_of_the_right_size_in_px_and_bytes() -> None:
    photos = write_photos(3, width=500, height=375, seed=7)
    for photo in photos:
        assert photo.dtype == np.uint8
        with Image.open(io.BytesIO(photo.tobytes())) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
        assert pictures.decode(photo).std() > 20
        assert 60_000 < len(photo) < 110_000
    again = write_photos(2, width=500, height=375, seed=7)
    assert [photo.tobytes() for photo in again] == [photo.tobytes() for photo in photos[:2]]
    other = write_photos(1, width=500, height=375, seed=8)
    assert len({photo.tobytes() for photo in photos + other}) == 4
    assert len(write_photos(1, width=500, height=375, seed=7, quality=50)[0]) < len(photos[0])


@pytest.mark.slow
def test_presize_ends_in_one_json_object_with_speed_and_quality_of_both_engines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "presize.json"
    words = ["presize", "--images", "3", "--batch", "2", "--quality-images", "2", "--out", str(out)]
    assert command_line.main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(out.read_text())
    assert {"name", "question", "date_utc", "settings", "results", "hardware", "versions", "commit"} <= set(found)
    results = found["results"]
    compared = results.pop("dali against fastai")
    judged = ["dali", "reference", "fastai, 16", "fastai, 64", "torchvision"]
    assert list(results)[:5] == judged
    assert list(results)[5:] in ([], ["fastai itself, 16", "fastai itself, 64"])
    speed, quality = ["images_per_s", "ms_per_image", "cpu_ms_per_image"], ["psnr_db", "psnr_synthetic_db"]
    for name, way in results.items():
        assert list(way) == (speed + quality if name in judged else speed)
        assert all(0 < value["min"] <= value["median"] <= value["max"] for value in way.values())
        assert all(25 < way[key]["min"] < 60 for key in quality if key in way)
    cost = {name: way["cpu_ms_per_image"]["median"] for name, way in results.items()}
    for name in cost:
        if name.startswith("fastai"):
            assert compared[f"cpu_times, {name}"] == pytest.approx(cost[name] / cost["dali"])
    for key in quality:
        median = results["dali"][key]["median"] - results["fastai, 16"][key]["median"]
        # of two images the median is the mean
        assert compared[key.replace("psnr", "gain")]["median"] == pytest.approx(median)
        assert compared[key.replace("psnr", "mean_gain")] == pytest.approx(median)
    assert 0.9 < found["settings"]["compared_share"] <= 1


def test_the_gain_is_taken_image_by_image_and_the_cost_against_each_fastai() -> None:
    cost = {"dali": 2.0, "torchvision": 28.0, "fastai, 16": 30.0, "fastai, 64": 24.0, "fastai itself, 64": 40.0}
    results = {name: {"cpu_ms_per_image": harness.spread([ms])} for name, ms in cost.items()}
    ours, theirs = np.array([40.0, 50.0, 60.0]), np.array([45.0, 49.0, 47.0])
    scores = {"dali": {"psnr_db": ours}, "fastai, 16": {"psnr_db": theirs}, "fastai itself, 64": {"psnr_db": ours[:0]}}
    assert presize._compared(results, scores) == {
        "cpu_times, fastai, 16": 15.0,
        "cpu_times, fastai, 64": 12.0,
        "cpu_times, fastai itself, 64": 20.0,
        "gain_db": harness.spread([-5.0, 1.0, 13.0]),
        "mean_gain_db": 3.0,
    }


def test_real_photos_are_unscaled_cuts_of_two_photographs() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn carries the photographs")
    sources = datasets.load_sample_images().images
    cuts = real_photos(3, width=90, height=60, seed=5)
    for i, cut in enumerate(cuts):
        found = pictures.decode(cut).astype(np.int16)
        assert found.shape == (60, 90, 3)
        windows = np.lib.stride_tricks.sliding_window_view(sources[i % 2][..., 1], (60, 90))
        probes = [(5, 7), (30, 44), (58, 88), (11, 80), (50, 3)]
        away = sum(np.abs(windows[..., y, x].astype(np.int16) - found[y, x, 1]) for y, x in probes)
        top, left = np.unravel_index(int(away.argmin()), away.shape)
        assert np.abs(found - sources[i % 2][top : top + 60, left : left + 90].astype(np.int16)).mean() < 5
    assert [c.tobytes() for c in cuts] == [c.tobytes() for c in real_photos(3, width=90, height=60, seed=5)]
    with pytest.raises(harness.BenchmarkError, match=r"700 x 60 is larger than the photographs of 640 x 427"):
        real_photos(1, width=700, height=60, seed=5)


def test_presize_quality_names_every_way_in_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presize_quality, "SIZES_PX", ((96, 64),))
    monkeypatch.setattr(presize_quality, "ROTATIONS_DEG", (0.0, 30.0))
    monkeypatch.setattr(presize_quality, "ZOOMS", (1.4,))
    found = presize_quality.main(images=1)["results"]
    assert list(found) == ["96 to 64, 0 deg, x 1.4", "96 to 64, 30 deg, x 1.4", "mean"]
    ways = ["reference", "dali", "fastai", "torchvision", "ideal_16x16", "ideal_lanczos"]
    for row in found.values():
        assert list(row) == ["shrink", *(f"{way}_{unit}" for way in ways for unit in ("psnr_db", "ssim"))]
        assert row["shrink"] == pytest.approx(1.5 / 1.4, abs=1e-6)
    cells = [found[name] for name in list(found)[:2]]
    for way in ways:
        assert all(20 < cell[f"{way}_psnr_db"]["median"] < 120 for cell in cells)
        assert all(0.7 < cell[f"{way}_ssim"]["median"] <= 1 + 1e-6 for cell in cells)
        middle = np.mean([cell[f"{way}_psnr_db"]["median"] for cell in cells])
        assert found["mean"][f"{way}_psnr_db"] == pytest.approx(middle)
    assert all(cell["ideal_16x16_psnr_db"]["median"] > 60 for cell in cells)


def test_prefilter_tells_quality_and_cost_of_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefilter, "SOURCES_PX", ((300, 240), (430, 430)))
    monkeypatch.setattr(prefilter, "SIZES_PX", (64,))
    monkeypatch.setattr(prefilter, "BATCH", 2)
    ways = {name: prefilter.WAYS[name] for name in ("one, no prefilter", "one, leaves 1.7", "three at 0.38")}
    monkeypatch.setattr(prefilter, "WAYS", ways)
    found = prefilter.main(images=1)["results"]
    cost = found.pop("CPU-ms, 500 x 375 to 224")
    assert list(cost) == ["shrink", *ways]
    assert list(found) == ["300 x 240 to 64, real", "430 x 430 to 64, synthetic"]
    assert all(list(row) == ["shrink", *ways, "fastai"] for row in found.values())
    assert all(value["min"] > 0 for row in (cost, *found.values()) for value in row.values())
    # At a shrink above three, whatever keeps from aliasing is better than nothing.
    real = {name: value["median"] for name, value in found["300 x 240 to 64, real"].items()}
    assert min(real["three at 0.38"], real["one, leaves 1.7"]) > real["one, no prefilter"]


@pytest.mark.parametrize("side", [180, 300, 500])
def test_the_way_in_use_is_geometrys_own(side: int) -> None:
    spec = ImageSpec(size_px=160, presize_px=200)
    drawn = prefilter.draw(spec, 30, width=side + 40, height=side)
    way = prefilter.WAYS["three at 0.38"]
    applied = way.applied(drawn, size_px=160)
    np.testing.assert_array_equal(applied.prefilter_px, drawn.prefilter_px)
    np.testing.assert_allclose(applied.sampling, drawn.sampling, atol=1e-5)
    maps = way.maps(applied)
    assert len(maps) == len(geometry.SAMPLES)
    corners = np.tile([[0.0, 0.0], [160.0, 0.0], [160.0, 160.0], [0.0, 160.0]], (30, 1, 1))
    for k, found in enumerate(maps):
        expected = geometry.project(drawn.sampled(k), corners)
        np.testing.assert_allclose(geometry.project(found, corners), expected, atol=1e-4)
    assert (drawn.prefilter_px > 0).all() == (side == 500)
