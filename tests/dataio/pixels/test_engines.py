"""Do DALI and torch render the same, and what the geometry says? Pixels on odd images, keypoints, memory, ids."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kit.images import (
    EVERYTHING,
    PLAIN,
    colour_numbers,
    encode,
    first,
    lent_memory,
    make_work,
    odd_files,
    photo,
    pixels_of,
    psnr,
    run_engine,
    take_work,
    upright_sizes,
)
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.geometry import SAMPLES
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.pixels.spec import Border, ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.table.manifest import Manifest

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
FILES = odd_files()
SIZES = upright_sizes(FILES.values())
ENGINES = ("dali", "reference")


def spec_of(**changes: Any) -> ImageSpec:
    return ImageSpec(**{"size_px": 64, "presize_px": 80, **EVERYTHING, **changes})


def odd_work(spec: ImageSpec, *, epoch: int = 0) -> Work:
    """Every odd file once, with its training geometry."""
    n = len(FILES)
    ids, epochs = np.arange(n, dtype=np.int64), np.full(n, epoch, np.int64)
    drawn = geometry.draw(spec, seed=42, epochs=epochs, ids=ids, widths=SIZES[0], heights=SIZES[1])
    return make_work(list(FILES.values()), drawn, size_px=spec.size_px)


# Parity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("border", ["reflect", "replicate", "constant"])
def test_dali_equals_reference_on_odd_images_under_every_augmentation(border: Border) -> None:
    spec = spec_of(border=border)
    works = [odd_work(spec, epoch=epoch) for epoch in range(4)]
    assert any((work.geometry.prefilter_px > 0).any() for work in works)
    outside = [geometry.project(w.geometry.homographies, np.zeros((len(w.ids), 1, 2))).min() < 0 for w in works]
    assert all(outside)  # the border is in the picture
    pairs = zip(works, run_engine("dali", works, spec), run_engine("reference", works, spec), strict=True)
    for epoch, (work, ours, oracle) in enumerate(pairs):
        worst = psnr(pixels_of(ours, work, spec), pixels_of(oracle, work, spec))
        low = {name: round(float(db), 1) for name, db in zip(FILES, worst, strict=True) if db < 45}
        assert not low, f"epoch {epoch}, dB: {low}"


@pytest.mark.parametrize("effect", [{"max_saturation": 0.8}])
def test_an_effect_is_the_same_in_both_engines_and_does_something(effect: dict[str, Any]) -> None:
    spec, plain = spec_of(**effect), spec_of()
    work = odd_work(spec)
    (ours,), (oracle,) = (run_engine(name, [work], spec) for name in ENGINES)
    assert psnr(pixels_of(ours, work, spec), pixels_of(oracle, work, spec)).min() >= 40  # DALI rounds once more
    (without,) = run_engine("dali", [work], plain)
    changed = psnr(pixels_of(ours, work, spec), pixels_of(without, work, spec)) < 30
    coloured = np.array([not name.startswith("grey") for name in FILES])
    assert changed[coloured & (np.abs(np.log(work.geometry.saturation)) > 0.5)].all()
    assert not changed[~coloured | (work.geometry.saturation == 1)].any()


def test_saturation_moves_pixels_from_their_grey() -> None:
    """By the formula in Geometry.saturation, in plain numpy."""
    spec = spec_of(**{**PLAIN, "min_scale": 1.0, "max_saturation": 0.6, "max_lighting": 0.0})
    pixels = photo(64, 64, seed=9)
    n = 8
    size = np.full(n, 64, np.int32)
    ids = np.arange(n, dtype=np.int64)
    drawn = geometry.draw(spec, seed=1, epochs=ids, ids=ids, widths=size, heights=size)
    work = make_work([encode(pixels, "PNG")] * n, drawn, size_px=spec.size_px)
    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[None, ..., None]
    expected = grey + drawn.saturation[:, None, None, None] * (pixels[None] - grey)
    (oracle,), (ours,) = (run_engine(name, [work], spec) for name in ("reference", "dali"))
    np.testing.assert_allclose(pixels_of(oracle, work, spec), expected.clip(0, 255), atol=1e-3)
    np.testing.assert_allclose(pixels_of(ours, work, spec), expected.clip(0, 255), atol=1.5)  # 8 bits, twice


@pytest.mark.parametrize("presize", ["crop", "squish", "pad"])
def test_dali_equals_reference_in_validation(presize: str) -> None:
    spec = spec_of(presize=presize)
    work = make_work(
        list(FILES.values()), geometry.centred(spec, widths=SIZES[0], heights=SIZES[1]), size_px=spec.size_px
    )
    (ours,), (oracle,) = (run_engine(name, [work], spec) for name in ENGINES)
    assert psnr(pixels_of(ours, work, spec), pixels_of(oracle, work, spec)).min() >= 45


@pytest.mark.parametrize("name", ENGINES)
def test_half_precision_is_single_precision_rounded(name: str) -> None:
    spec = spec_of()
    (single,), (half,) = (run_engine(name, [odd_work(spec)], spec, dtype=t) for t in (torch.float32, torch.float16))
    assert half.inputs.dtype == torch.float16
    one_step = 2.0**-10 * half.inputs.float().abs().clamp(min=2.0**-14)
    assert ((half.inputs.float() - single.inputs).abs() <= one_step).all()


@pytest.mark.parametrize("name", ENGINES)
def test_an_unwarped_image_keeps_its_pixels(name: str) -> None:
    spec = spec_of(**{**PLAIN, "min_scale": 1.0})
    pixels = photo(64, 64, seed=9)
    size = np.array([64], np.int32)
    work = make_work([encode(pixels, "PNG")], geometry.centred(spec, widths=size, heights=size), size_px=spec.size_px)
    (batch,) = run_engine(name, [work], spec)
    np.testing.assert_allclose(pixels_of(batch, work, spec)[0], pixels, atol=1e-3)
    expected = (pixels / 255 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(batch.inputs[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


# Decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reference_decodes_upright(orientation: int) -> None:
    lying = photo(96, 61, seed=3)
    turns: dict[int, NDArray[np.uint8]] = {
        1: lying,
        2: lying[:, ::-1],
        3: lying[::-1, ::-1],
        4: lying[::-1],
        5: lying.transpose(1, 0, 2),
        6: np.rot90(lying, -1),
        7: lying[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(lying),
    }
    found = decode(encode(lying, "PNG", orientation=orientation))
    np.testing.assert_array_equal(found, turns[orientation])


def test_reference_decodes_every_kind_to_rgb() -> None:
    colour = (51, 102, 204)  # in Pillow's palette, so nothing is dithered
    for mode, kind in (("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG")):
        found = decode(encode(np.full((9, 12, 3), colour, np.uint8), kind, mode=mode))
        assert found.dtype == np.uint8
        assert found.shape == (9, 12, 3)
        np.testing.assert_allclose(found, np.broadcast_to(colour, found.shape), atol=3)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("spoiled", ["truncated", "empty", "text"])
def test_a_file_that_cannot_be_decoded_is_named(name: str, spoiled: str, capfd: pytest.CaptureFixture[str]) -> None:
    spec = spec_of()
    good = odd_work(spec)
    whole = good.encoded[7]
    bad = {"truncated": whole[: len(whole) // 2], "empty": whole[:0], "text": np.frombuffer(b"not an image", np.uint8)}
    work = take_work(good, range(4, 12))
    work.encoded[3] = bad[spoiled]
    why = ".+" if spoiled == "truncated" else "it is no image"
    with pytest.raises(
        EngineError, match=rf"image7 cannot be decoded \({why}\).+remove or mend the file and index again"
    ):
        run_engine(name, [take_work(good, range(8)), work], spec)
    capfd.readouterr()  # nvImageCodec writes to stderr by itself


# Memory and order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_are_channels_last_with_what_was_asked_for(name: str, dtype: torch.dtype) -> None:
    spec = spec_of()
    (batch,) = run_engine(name, [odd_work(spec)], spec, dtype=dtype)
    assert batch.inputs.shape == (len(FILES), 3, 64, 64)
    assert batch.inputs.dtype == dtype
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert (batch.targets.dtype, batch.ids.dtype) == (torch.int64, torch.int64)
    assert batch.targets.tolist() == batch.ids.tolist() == list(range(len(FILES)))


def test_dali_lends_the_warped_samples_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = lent_memory(monkeypatch)
    spec = spec_of()
    (batch,) = run_engine("dali", [odd_work(spec)], spec, dtype=torch.float16)
    assert len(lent) == len(SAMPLES)  # the warped samples, of which one new image is made
    assert batch.inputs.data_ptr() not in lent


@pytest.mark.slow
def test_a_process_that_ends_at_once_leaves_no_file_of_dali(tmp_path: Path) -> None:
    code = (
        "import os, sys, tests.dataio.pixels.test_engines as t\n"
        "spec = t.spec_of()\n"
        "(batch,) = t.run_engine('dali', [t.odd_work(spec)], spec)\n"
        "print(len(batch.ids), any('autograph_generated' in name for name in sys.modules), flush=True)\n"
        "os._exit(0)\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(FILES)), "True"]
    assert list(tmp_path.iterdir()) == []


def test_batches_that_are_kept_are_not_overwritten_by_later_ones() -> None:
    spec = spec_of()
    works = [take_work(odd_work(spec, epoch=epoch), range(8)) for epoch in range(12)]
    kept = run_engine("dali", works, spec)
    for i in range(6):  # one at a time: nothing comes after it
        (fresh,) = run_engine("dali", [works[i]], spec)
        assert torch.equal(kept[i].inputs, fresh.inputs)
        assert torch.equal(kept[i].ids, fresh.ids)
    assert len({batch.inputs.data_ptr() for batch in kept}) == len(kept)


@pytest.mark.parametrize("name", ENGINES)
def test_rendering_of_a_sample_does_not_depend_on_its_companions(name: str) -> None:
    spec = spec_of()
    whole = odd_work(spec)
    (together,) = run_engine(name, [whole], spec)
    mixed = np.random.default_rng(0).permutation(len(FILES)).tolist()
    parts = [mixed[:1], mixed[1:3], mixed[3:10], mixed[10:]]
    for batch, rows in zip(run_engine(name, [take_work(whole, p) for p in parts], spec), parts, strict=True):
        assert batch.ids.tolist() == rows
        assert torch.equal(batch.inputs, together.inputs[rows])


@pytest.mark.parametrize("name", ENGINES)
def test_ids_and_targets_arrive_beside_their_own_pixels(name: Any, flat: Manifest) -> None:
    """Every image's colour says which it is, whatever the plan thinks."""
    from thawline.dataio.stream.loader import loaders

    spec = ImageSpec(size_px=16, presize_px=16, **{**EVERYTHING, "max_lighting": 0.0})
    for loader in loaders(flat, spec, global_batch=8, engine=name, threads=2):
        seen = 0
        for batch in first(loader, 12):
            assert colour_numbers(loader, batch) == batch.ids.tolist()
            assert batch.targets.tolist() == [i % 3 for i in batch.ids.tolist()]
            seen += len(batch.ids)
        assert seen == (96 if loader.order.endless else 11)
        loader.close()


# Keypoints -------------------------------------------------------------------------------------------------


def dots(width: int, height: int, *, sigma: float, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A black image with one soft dot in each channel, and where they are: (3, 2), x before y."""
    draw = np.random.default_rng(seed)
    at = draw.uniform(4 * sigma, [width - 4 * sigma, height - 4 * sigma], (3, 2))
    across, down = (
        np.exp(-((np.arange(size)[:, None] + 0.5 - at[:, i]) ** 2) / (2 * sigma**2))
        for i, size in enumerate((width, height))
    )
    image = down[:, None] * across
    return (image * 255).round().astype(np.uint8), at


def centroid(channel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The centre of what is bright in (h, w), x before y, in coordinates with pixel centres at .5."""
    weight = np.where(channel > 0.2 * channel.max(), channel, 0)
    y, x = np.mgrid[: channel.shape[0], : channel.shape[1]] + 0.5
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("width", "height", "sigma"), [(110, 84, 1.2), (640, 500, 6.0)])
def test_keypoints_land_where_the_warped_image_shows_them(name: str, width: int, height: int, sigma: float) -> None:
    count = 60
    spec = spec_of(size_px=72, presize_px=90, border="constant")
    images, points = zip(*(dots(width, height, sigma=sigma, seed=i) for i in range(count)), strict=True)
    ids, epochs = np.arange(count), np.arange(count) % 5
    size = np.full(count, width, np.int32), np.full(count, height, np.int32)
    drawn = geometry.draw(spec, seed=5, epochs=epochs, ids=ids, widths=size[0], heights=size[1])
    filtered = drawn.prefilter_px[:, 0] > 0
    assert filtered.all() if width > 200 else not filtered.any()
    work = make_work([encode(image, "PNG") for image in images], drawn, size_px=spec.size_px)
    (batch,) = run_engine(name, [work], spec)
    seen = pixels_of(batch, work, spec)
    factor = np.ones((count, 2))
    factor[filtered] = drawn.prefilter_px[filtered][:, ::-1] / [width, height]
    back = np.linalg.inv(drawn.homographies).astype(np.float64)
    expected = geometry.project(back, np.array(points) * factor[:, None])
    margin = 8  # several widths of a dot in the output: nothing of it is cut off
    visible = ((expected > margin) & (expected < spec.size_px - margin)).all(axis=-1)
    assert visible.sum() > 50
    found = np.array([centroid(seen[i, ..., channel]) for i, channel in np.argwhere(visible)])
    assert np.abs(found - expected[visible]).max() < 0.5
