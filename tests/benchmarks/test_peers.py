"""Do the peers show the same view as our one homography, the way fastai and torchvision themselves would?"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from tests.kit.images import Pixels, encode, photo
from thawline.benchmarks import peers, prefilter, presize, presize_quality
from thawline.benchmarks.peers import Views
from thawline.benchmarks.presize import ideal, psnr
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.geometry import Floats
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.pixels.spec import ImageSpec

WIDTH, HEIGHT = 200, 150
SPEC = ImageSpec(size_px=64, presize_px=120, min_scale=0.6, rotate_deg=20.0)
WHO: dict[str, Any] = {"seed": 3, "epochs": np.zeros(8, np.int64), "ids": np.arange(8)}


def views(spec: ImageSpec = SPEC) -> Views:
    return peers.draw(spec, width=WIDTH, height=HEIGHT, **WHO)


def coordinates(width: int, height: int) -> Pixels:
    """A picture of where one is: red says x, green says y, blue is 128; a PNG keeps it exactly."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.rint(np.stack([x, y, np.full_like(x, 128)], axis=-1)).astype(np.uint8)


def centres(totals: Floats, size_px: int) -> Floats:
    """Where the centres of the output's pixels come from: (n, size_px, size_px, 2)."""
    grid = np.stack(np.meshgrid(*(np.arange(size_px) + 0.5,) * 2), axis=-1).reshape(1, -1, 2)
    return geometry.project(totals, np.repeat(grid, len(totals), axis=0)).reshape(-1, size_px, size_px, 2)


def rendered(way: str, spec: ImageSpec, drawn: Views, file: Pixels) -> Floats:
    files = [file] * len(drawn.totals)
    if way == "fastai":
        return 255 * peers.fastai_pixels(files, drawn, spec).permute(0, 2, 3, 1).double().numpy()
    return torch.stack(peers.torchvision_pixels(files, drawn, spec)).permute(0, 2, 3, 1).double().numpy()


def farthest(way: str, spec: ImageSpec, drawn: Views, expected: Floats) -> float:
    """Source pixels between what a way shows and what it should, at the worst pixel that all ways see."""
    found = rendered(way, spec, drawn, encode(coordinates(WIDTH, HEIGHT), "PNG"))
    seen = peers.interior(drawn, spec, margin_px=6.0)
    assert seen.mean() > 0.4
    # Rounding to bytes, once for the picture and up to four times on the way, costs up to a pixel and a half.
    return float(np.abs(found[..., :2] - centres(expected, spec.size_px))[seen].max())


@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.7, 1.4)])
def test_the_product_of_the_stages_is_our_homography(ratio: tuple[float, float]) -> None:
    spec = replace(SPEC, ratio=ratio)
    drawn = views(spec)
    sizes: dict[str, Any] = {"widths": np.full(8, WIDTH, np.int32), "heights": np.full(8, HEIGHT, np.int32)}
    ours = geometry.draw(spec, **WHO, **sizes)
    for maps in (peers.fastai_maps(drawn, spec), peers.torchvision_maps(drawn, spec)):
        for i in range(8):
            product = np.linalg.multi_dot([each[i] for each in maps])
            np.testing.assert_allclose(product / product[2, 2], ours.onto(ours.source_px)[i], atol=1e-9)


def test_crops_and_windows_are_the_drawn_ones_in_whole_pixels() -> None:
    drawn = views()
    bare = replace(SPEC, flip=False, p_affine=0.0, min_scale=1.0)
    crop = peers.draw(bare, width=WIDTH, height=HEIGHT, **WHO).totals
    np.testing.assert_allclose(drawn.crops[:, :2], crop[:, :2, 2], atol=0.5)
    assert (drawn.crops[:, 2] == HEIGHT).all()
    area = drawn.windows[:, 2] * drawn.windows[:, 3] / SPEC.presize_px**2
    assert ((area > 0.57) & (area < 1.02)).all()
    assert (drawn.windows[:, :2] >= 0).all()
    assert (drawn.windows[:, :2] + drawn.windows[:, 2:] <= SPEC.presize_px).all()


@pytest.mark.parametrize("way", ["fastai", "torchvision"])
@pytest.mark.parametrize("min_scale", [0.6, 1.0])
def test_each_peer_shows_our_view_to_a_fraction_of_a_source_pixel(way: str, min_scale: float) -> None:
    spec = replace(SPEC, min_scale=min_scale)
    drawn = views(spec)
    assert farthest(way, spec, drawn, drawn.totals) < 1.6


@pytest.mark.parametrize("way", ["fastai", "torchvision"])
def test_a_wrong_view_is_caught(way: str) -> None:
    drawn = views()
    shift = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0, 1.0]])
    assert farthest(way, SPEC, replace(drawn, totals=shift @ drawn.totals), drawn.totals) > 2.5
    mirrored = drawn.totals @ np.array([[-1.0, 0.0, SPEC.size_px], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert farthest(way, SPEC, drawn, mirrored) > 20


def test_without_augmentation_fastais_way_is_pillows_resize() -> None:
    spec = ImageSpec(size_px=64, presize_px=64, flip=False, p_affine=0.0)
    picture = photo(90, 90)
    drawn = peers.draw(spec, width=90, height=90, seed=0, epochs=np.zeros(1, np.int64), ids=np.zeros(1, np.int64))
    file = encode(picture, "PNG")
    expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BILINEAR), np.float64)
    np.testing.assert_allclose(rendered("fastai", spec, drawn, file)[0], expected, atol=2e-3)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    antialiased = v2.resize(tensor, [64, 64], antialias=True).permute(1, 2, 0).double().numpy()
    np.testing.assert_array_equal(rendered("torchvision", spec, drawn, file)[0], antialiased)


def test_fastai_averages_areas_where_it_would_shrink_more_than_twice() -> None:
    spec = ImageSpec(size_px=16, presize_px=64, flip=False, p_affine=0.0)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    drawn = peers.draw(spec, width=64, height=64, seed=0, epochs=np.zeros(1, np.int64), ids=np.zeros(1, np.int64))
    halved = picture.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    at = (4 * np.arange(16) + 1.5) * 31 / 63  # fastai puts the centres of edge pixels on one another
    low = np.minimum(at.astype(int), 30)
    weight = at - low
    rows = halved[low] * (1 - weight)[:, None, None] + halved[low + 1] * weight[:, None, None]
    expected = rows[:, low] * (1 - weight)[:, None] + rows[:, low + 1] * weight[:, None]
    np.testing.assert_allclose(rendered("fastai", spec, drawn, encode(picture, "PNG"))[0], expected, atol=2e-3)


def test_fastais_lighting_moves_logits() -> None:
    drawn, file = views(), encode(photo(WIDTH, HEIGHT))
    plain = peers.fastai_pixels([file] * 8, drawn, SPEC).double().clamp(1e-7, 1 - 1e-7).numpy()
    (found,) = peers.fastai([([file] * 8, drawn)], SPEC)
    odds = (plain / (1 - plain) * (drawn.brightness / (1 - drawn.brightness))[:, None, None, None]) ** (
        drawn.contrast[:, None, None, None]
    )
    mean, std = (np.array(v)[:, None, None] for v in (SPEC.mean, SPEC.std))
    np.testing.assert_allclose(found.numpy(), (odds / (1 + odds) - mean) / std, atol=1e-3)
    assert np.ptp(drawn.brightness) > 0.05


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # fastai's own, at its import
@pytest.mark.parametrize("presize_px", [120, 160])  # the second is averaged over areas
def test_fastai_itself_does_what_its_way_written_anew_does(presize_px: int) -> None:
    pytest.importorskip("fastai", reason="fastai is no dependency; put it on PYTHONPATH to compare")
    spec = ImageSpec(size_px=64, presize_px=presize_px, flip=False, p_affine=0.0, p_lighting=0.0)
    drawn = peers.draw(spec, width=150, height=150, seed=0, epochs=np.zeros(2, np.int64), ids=np.arange(2))
    crop, _, window = peers.fastai_maps(drawn, spec)
    files = [encode(photo(150, 150, seed=i)) for i in range(2)]
    (ours,) = peers.fastai([(files, replace(drawn, totals=crop @ window))], spec)  # where fastai puts corners
    (theirs,) = peers.fastai_itself(spec)([files])
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-3)


def test_torchvisions_way_ends_normalised() -> None:
    drawn = views()
    neutral = replace(drawn, brightness=np.full(8, 0.5), contrast=np.ones(8))
    file = encode(photo(WIDTH, HEIGHT))
    (found,) = peers.torchvision([([file] * 8, neutral)], SPEC)
    plain = torch.stack(peers.torchvision_pixels([file] * 8, drawn, SPEC)).double().numpy() / 255
    mean, std = (np.array(v)[:, None, None] for v in (SPEC.mean, SPEC.std))
    np.testing.assert_allclose(found.numpy(), (plain - mean) / std, atol=1e-5)


def test_only_pixels_wholly_within_the_crop_are_compared() -> None:
    spec = ImageSpec(size_px=10, presize_px=20)
    drawn = presize_quality.turned(1, 20, spec, angle_deg=0.0, zoom=1.0)
    seen = peers.interior(drawn, spec, margin_px=3.0)[0]
    assert seen.sum() == 36  # the pixel [4, 6) is the first whole one above 3
    assert seen[2:8, 2:8].all()


def test_a_turned_view_is_the_closed_form() -> None:
    spec = ImageSpec(size_px=64, presize_px=120)
    drawn = presize_quality.turned(1, 100, spec, angle_deg=30.0, zoom=2.0)
    there = geometry.project(drawn.totals, np.array([[[32.0, 32.0], [64.0, 32.0]]]))[0]
    np.testing.assert_allclose(there, [[50, 50], [50 + 25 * np.cos(np.pi / 6), 50 - 12.5]], atol=1e-9)
    product = np.linalg.multi_dot([each[0] for each in peers.torchvision_maps(drawn, spec)])
    np.testing.assert_allclose(product, drawn.totals[0], atol=1e-9)


def test_the_lanczos_ideal_keeps_a_constant_and_agrees_with_the_box_on_slow_waves() -> None:
    spec = ImageSpec(size_px=32, presize_px=64)
    total = presize_quality.turned(1, 96, spec, angle_deg=10.0, zoom=1.5).totals[0]
    options: dict[str, Any] = {"size_px": 32, "border": "reflect"}
    flat = presize_quality.lanczos(np.full((96, 96, 3), 77, np.uint8), total, **options)
    np.testing.assert_allclose(flat, 77, atol=1e-9)
    x = np.arange(96) + 0.5
    wave = np.rint(128 + 100 * np.cos(2 * np.pi * x / 48))[None, :, None].repeat(96, 0).repeat(3, 2).astype(np.uint8)
    smooth = presize_quality.lanczos(wave, total, **options)
    inner = (slice(6, -6), slice(6, -6))
    assert psnr(smooth[inner], ideal(wave, total, **options)[inner]) > 45


def test_ssim_looks_only_where_all_ways_see() -> None:
    best = photo(64, 64).astype(np.float64)
    spoilt = best.copy()
    spoilt[:20] = 0
    seen = np.zeros((64, 64), np.bool_)
    seen[32:] = True
    assert presize_quality.ssim(spoilt, best, seen) == pytest.approx(1.0, abs=1e-6)
    assert presize_quality.ssim(spoilt, best, ~seen) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", list(prefilter.WAYS))
def test_dali_does_what_each_way_is_judged_by(name: str) -> None:
    spec, way = presize.SPEC, prefilter.WAYS[name]
    jpegs = [encode(photo(presize.WIDTH, presize.HEIGHT, seed=i)) for i in range(3)]
    drawn = prefilter.draw(spec, 3, width=presize.WIDTH, height=presize.HEIGHT)
    finished = next(prefilter.stream(jpegs, drawn, way)).double().numpy()
    mean, std = (each[:, None, None].astype(np.float64) for each in drawn.folded(spec))
    judged = prefilter.render([decode(jpeg) for jpeg in jpegs], drawn, way, size_px=spec.size_px)
    for found, expected in zip(finished * std + mean, judged, strict=True):
        assert psnr(found, expected) > 45
