"""Does a folder of hostile files index and train? Each is used rightly or quarantined for the true reason."""

import math
import os
import re
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from tests.kit.hostile import CORNERS, HEIGHT, NAMES, WIDTH, pictures, write
from tests.kit.images import psnr
from thawline import models, trainer
from thawline.dataio.batch import Batch, ImageBatch
from thawline.dataio.labels.labels import by_function, label
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import loaders, split_loader
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import by_folder, split

pytestmark = pytest.mark.slow  # DALI is tried on each file in processes of its own

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")

CUT = r"truncated: (image file is truncated|Truncated File Read).*"
BOMB = "too large: decompression bomb, more than 178,956,970 pixels"
MODES_COUNT = os.geteuid() != 0  # root reads what nobody may

QUARANTINED = {
    **{f"cut{i}.{end}": CUT for end in ("jpg", "png", "progressive.jpg") for i in range(10)},
    "cut_in_first_picture.gif": CUT,
    "without_end.jpg": CUT,
    "cut.webp": "truncated: 273 bytes of 546",
    "cut.avif": "cannot be decoded: a broken AVIF, or a rare kind of it",
    "wrong_checksum.png": "cannot be decoded: broken data stream when reading image file",
    "only_a_header.jpg": "cannot be decoded: a broken JPEG, or a rare kind of it",
    "five_bands.tif": "cannot be decoded: a broken TIFF, or a rare kind of it",
    "float.tif": "cannot be decoded: its values have 32 bits or a sign, and nothing says which is white; save it with "
    "8 or 16",
    "program.eps.jpg": "cannot be decoded: EPS is a program, and programs are not run",
    "phone.heic.jpg": "HEIC: Pillow cannot decode this format here",
    "empty.jpg": "empty file",
    **dict.fromkeys(("text.jpg", "page.png", "zeros.jpg", "noise.jpg"), "not an image"),
    **dict.fromkeys(("bomb.png", "bomb.gif"), BOMB),
    "broken_link.jpg": "missing",
    "loop.jpg": "cannot be read: Too many levels of symbolic links",
    **({"mode000.jpg": "permission denied"} if MODES_COUNT else {}),
}
"""Name -> the whole reason, a pattern."""

SMALL, SCENE = (WIDTH, HEIGHT), (150, 100)
TURNED_KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF"}
USED: dict[str, tuple[str, str, tuple[int, int], int]] = {
    **dict.fromkeys(("rgb.jpg", "progressive.jpg", "full_chroma.jpg", "grey.jpg"), ("dali", "JPEG", SMALL, 1)),
    **dict.fromkeys(("cmyk.jpg", "ycck.jpg", "link.jpg", "valid/rgb.jpg"), ("dali", "JPEG", SMALL, 1)),
    "cmyk_not_adobe.jpg": ("pillow", "JPEG", SMALL, 1),  # DALI inverts it
    "two_pictures.jpg": ("dali", "MPO", SMALL, 1),
    **dict.fromkeys(("rgb.png", "grey.png", "black_white.png", "alpha.png"), ("dali", "PNG", SMALL, 1)),
    **dict.fromkeys(("grey_alpha.png", "palette.png", "palette_alpha.png"), ("dali", "PNG", SMALL, 1)),
    **dict.fromkeys(("grey16.png", "rgb16.png", "animated.png", "png_called.jpg"), ("dali", "PNG", SMALL, 1)),
    **dict.fromkeys(("rgb.tif", "lzw.tif", "grey16.tif"), ("dali", "TIFF", SMALL, 1)),
    **dict.fromkeys(("grey_alpha.tif", "cmyk.tif", "black_white.tif"), ("pillow", "TIFF", SMALL, 1)),
    **dict.fromkeys(("rgb.webp", "alpha.webp", "animated.webp"), ("dali", "WEBP", SMALL, 1)),
    "rgb.bmp": ("dali", "BMP", SMALL, 1),
    "rgb.ppm": ("dali", "PPM", SMALL, 1),
    "rgb.jp2": ("dali", "JPEG2000", SMALL, 1),
    **dict.fromkeys(("still.gif", "animated.gif", "gif_called.jpg", "valid/rgb.gif"), ("pillow", "GIF", SMALL, 1)),
    "cut_in_second_picture.gif": ("pillow", "GIF", SMALL, 1),  # the first is whole
    **dict.fromkeys(("rgb.avif", "avif_called.png"), ("pillow", "AVIF", SMALL, 1)),
    **{f"turned{o}.{end}": ("dali", kind, SMALL, o) for end, kind in TURNED_KINDS.items() for o in range(1, 9)},
    "valid/turned8.png": ("dali", "PNG", SMALL, 8),
    "turned6.avif": ("pillow", "AVIF", SMALL, 6),
    "turned2_by_xmp.jpg": ("pillow", "JPEG", SMALL, 2),  # DALI does not turn these three
    "turned2_by_xmp.webp": ("pillow", "WEBP", SMALL, 2),
    "turned2_then_1.jpg": ("pillow", "JPEG", SMALL, 2),
    "turned9.jpg": ("dali", "JPEG", SMALL, 1),
    "broken_exif.jpg": ("dali", "JPEG", SMALL, 1),
    **{f"bits_flipped{i}.jpg": ("dali", "JPEG", SCENE, 1) for i in range(10)},  # no decoder can know
    **dict.fromkeys(("bits_flipped7.jpg", "bits_flipped9.jpg"), ("pillow", "JPEG", SCENE, 1)),  # DALI talks about them
    "rubbish_behind.jpg": ("dali", "JPEG", SCENE, 1),
    "without_end.png": ("pillow", "PNG", SCENE, 1),  # its pixels are whole
    "1x1.jpg": ("dali", "JPEG", (1, 1), 1),
    "1x1.png": ("dali", "PNG", (1, 1), 1),
    "1x10000.png": ("dali", "PNG", (1, 10_000), 1),
    "10000x1.jpg": ("dali", "JPEG", (10_000, 1), 1),
    "3x5000.gif": ("pillow", "GIF", (3, 5000), 1),
    "valid/12000x9000.jpg": ("dali", "JPEG", (12_000, 9_000), 1),
    **dict.fromkeys(NAMES, ("dali", "JPEG", SMALL, 1)),
    **({} if MODES_COUNT else {"mode000.jpg": ("dali", "JPEG", SMALL, 1)}),
}
"""Name -> who can decode it, its format, its size upright, its EXIF orientation."""

SPEC = ImageSpec(size_px=32, presize_px=40, presize="squish")  # the whole picture: its corners stay corners
ENGINES: tuple[Any, ...] = ("dali", "reference")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The hostile folder, indexed."""
    folder = tmp_path_factory.mktemp("hostile") / "pictures"
    write(folder)
    table = from_folder(folder, extensions=[".jpg", ".png", ".tif", ".webp", ".bmp", ".ppm", ".jp2", ".gif", ".avif"])
    labelled = label(table, by_function(lambda row: "even" if len(row["path"]) % 2 == 0 else "odd"))
    return split(labelled, by_folder("valid"), max_bad=1)


def paths_of(manifest: Manifest, *, usable: bool) -> dict[int, str]:
    rows = manifest.rows.select(["id", "path", "status"]).to_pylist()
    return {row["id"]: row["path"] for row in rows if (row["status"] == "ok") == usable}


def test_every_file_is_used_rightly_or_quarantined_for_the_true_reason(manifest: Manifest) -> None:
    rows = {row["path"]: row for row in manifest.rows.to_pylist()}
    assert len(rows) > 150
    assert rows.keys() == USED.keys() | QUARANTINED.keys()
    used = {path: row for path, row in rows.items() if row["status"] == "ok"}
    assert {
        path: (row["codec"], row["format"], (row["width"], row["height"]), row["orientation"])
        for path, row in used.items()
    } == USED
    wrong = {p: rows[p]["status"] for p, why in QUARANTINED.items() if not re.fullmatch(why, rows[p]["status"])}
    assert not wrong
    assert {rows[path]["split"] for path in QUARANTINED} == {None}
    assert {path for path, row in rows.items() if row["split"] == "valid"} == {
        p for p in USED if p.startswith("valid/")
    }
    data = pictures()
    assert all(row["bytes"] == len(data[path]) for path, row in rows.items() if path in data)


@pytest.fixture(scope="module")
def streamed(manifest: Manifest) -> dict[str, dict[str, list[ImageBatch]]]:
    """What each engine makes: two epochs of training and one of validation."""
    made: dict[str, dict[str, list[ImageBatch]]] = {}
    for engine in ENGINES:
        train, valid = loaders(manifest, SPEC, global_batch=9, engine=engine)
        two_epochs = list(islice(train.stream(), math.ceil(2 * train.samples / 9)))
        made[engine] = {"train": two_epochs, "valid": list(valid.stream())}
        assert not train.quarantined
        assert not valid.quarantined
        train.close()
        valid.close()
    return made


@pytest.mark.parametrize("engine", ENGINES)
def test_every_usable_file_is_streamed_and_no_other(manifest: Manifest, streamed: Any, engine: str) -> None:
    train, valid = (torch.cat([batch.ids for batch in streamed[engine][side]]) for side in ("train", "valid"))
    n = manifest.subset("train").ids.size
    for epoch in (train[:n], train[n : 2 * n]):
        assert sorted(epoch.tolist()) == manifest.subset("train").ids.tolist()
    assert sorted(valid.tolist()) == manifest.subset("valid").ids.tolist()
    assert {*train.tolist(), *valid.tolist()} == paths_of(manifest, usable=True).keys()
    assert all(batch.inputs.isfinite().all() for side in ("train", "valid") for batch in streamed[engine][side])


def bytes_of(batch: ImageBatch) -> NDArray[np.float64]:
    """(n, size, size, 3) float64, 0..255 where lighting leaves it there."""
    images = batch.inputs.double().permute(0, 2, 3, 1).numpy()
    return (images * np.array(SPEC.std) + np.array(SPEC.mean)) * 255


@pytest.mark.parametrize("side", ["train", "valid"])
def test_both_engines_show_the_same_pixels_of_every_file(manifest: Manifest, streamed: Any, side: str) -> None:
    names, low = paths_of(manifest, usable=True), dict[str, float]()
    for ours, oracle in zip(streamed["dali"][side], streamed["reference"][side], strict=True):
        assert torch.equal(ours.ids, oracle.ids)
        assert torch.equal(ours.targets, oracle.targets)
        for i, db in zip(ours.ids.tolist(), psnr(bytes_of(ours), bytes_of(oracle)), strict=True):
            if db < 40:
                low[names[i]] = round(float(db), 1)
    assert not low


@pytest.fixture(scope="module")
def plain(manifest: Manifest) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Engine -> name -> every turned file as validation shows it, (32, 32, 3) in 0..255."""
    names, made = paths_of(manifest, usable=True), dict[str, dict[str, NDArray[np.float64]]]()
    turned = pa.array(["turned" in path or "exif" in path for path in manifest.rows["path"].to_pylist()])
    rows = manifest.rows.filter(turned).combine_chunks()
    sides = pa.array(["valid"] * rows.num_rows).cast(rows.schema.field("split").type)
    rows = rows.set_column(rows.schema.get_field_index("split"), "split", sides)
    for engine in ENGINES:
        loader = split_loader(replace(manifest, rows=rows), SPEC, "valid", engine=engine)
        made[engine] = {
            names[i]: image
            for batch in loader.stream()
            for i, image in zip(batch.ids.tolist(), bytes_of(batch), strict=True)
        }
        loader.close()
    return made


@pytest.mark.parametrize("engine", ENGINES)
def test_turned_pictures_come_out_upright(plain: Any, engine: str) -> None:
    assert len(plain[engine]) == 4 * 8 + 7
    places = [4, 27]  # in the middle of the corners
    for name, image in plain[engine].items():
        seen = image[np.ix_(places, places)]
        assert np.abs(seen - CORNERS).max() < 25, name  # JPEG and WebP soften the chroma


def test_a_model_trains_through_them(manifest: Manifest) -> None:
    seen = list[int]()

    def watch(batch: Batch, step: int) -> Batch:
        seen.extend(batch.ids.tolist())
        return batch

    train, valid = loaders(manifest, SPEC, global_batch=9)
    model = models.create("tiny", 2, weights="none", seed=0)
    learn = trainer.Learner(model, train, valid, batch_transform=watch, log_every=1)
    learn.fit_one_cycle(1, 1e-3)
    assert {*seen} == {*manifest.subset("train").ids.tolist()}
    losses = [float(row["loss"] or 0) for row in learn.recorder.of_kind("train")]
    assert len(losses) == train.steps(1)
    assert np.isfinite(losses).all()
    assert math.isfinite(float(learn.recorder.of_kind("valid")[-1]["valid_loss"] or 0))
    assert not train.quarantined
    learn.close()


def test_a_decoded_picture_is_the_one_that_was_saved() -> None:
    data = pictures()

    def pixels(name: str) -> NDArray[np.uint8]:
        return decode(np.frombuffer(data[name], np.uint8))

    for lossless in ("rgb.tif", "lzw.tif", "rgb.bmp", "rgb.ppm", "animated.png", "animated.webp", "png_called.jpg"):
        np.testing.assert_array_equal(pixels(lossless), pixels("rgb.png"), lossless)
    for lossy in ("rgb.jpg", "full_chroma.jpg", "cmyk.jpg", "rgb.webp", "rgb.avif", "two_pictures.jpg"):
        assert psnr(pixels(lossy)[None].astype(float), pixels("rgb.png")[None].astype(float)) > 25, lossy
    np.testing.assert_array_equal(pixels("alpha.png"), pixels("rgb.png"))  # the alpha is left out
    np.testing.assert_array_equal(pixels("palette_alpha.png"), pixels("palette.png"))
    np.testing.assert_array_equal(pixels("animated.gif"), pixels("still.gif"))
    ramp = np.linspace(0, 255, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH, 1)
    for deep in ("grey16.png", "grey16.tif"):  # scaled, not clipped
        assert np.abs(pixels(deep) - ramp).max() <= 0.51, deep
