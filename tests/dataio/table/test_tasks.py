"""Do points and masks lie where the pixels show them, under every augmentation, in both engines?"""

import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from tests.kit.images import EVERYTHING, PLAIN, encode, photo
from tests.kit.scenes import COLOURS, NAMES, POINTS, scenes
from thawline.dataio.batch import ImageBatch
from thawline.dataio.checks.verify import check_files
from thawline.dataio.errors import EngineError, SpecError
from thawline.dataio.labels.keypoints import UNPAIRED, points
from thawline.dataio.labels.targets import decode_mask, value_table
from thawline.dataio.pixels.pictures import VOID
from thawline.dataio.pixels.spec import Border, ImageSpec, Presize
from thawline.dataio.show import denormalise, explain, show_batch
from thawline.dataio.stream.loader import ImageLoader, loaders
from thawline.dataio.stream.renderer import EngineName
from thawline.dataio.table.manifest import Manifest, build

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
both_engines = pytest.mark.parametrize("engine", ["dali", "reference"])
MOST: dict[str, Any] = {**EVERYTHING, "max_lighting": 0.0, "rotate_deg": 45.0}  # colours tell the shapes apart
SIDE = 96


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scenes(tmp_path_factory.mktemp("masks"), "mask")


@pytest.fixture(scope="module")
def pointed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scenes(tmp_path_factory.mktemp("points"), "points")


def pair(manifest: Manifest, engine: EngineName, **changes: Any) -> tuple[ImageLoader, ImageLoader]:
    spec = ImageSpec(**{"size_px": SIDE, "presize_px": SIDE, **MOST, **changes})
    return loaders(manifest, spec, batch=3, seed=3, engine=engine, threads=1)


def seen(loader: ImageLoader, batch: ImageBatch) -> NDArray[np.float64]:
    """The pixels as shown, (n, h, w, 3) in 0..255."""
    return denormalise(batch.inputs, loader.spec).astype(np.float64) * 255


def class_by_colour(pixels: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n, h, w): which of COLOURS a pixel is nearest to."""
    return np.argmin(((pixels[..., None, :] - COLOURS) ** 2).sum(-1), axis=-1)


def inside(mask: NDArray[np.int64], *, margin: int) -> NDArray[np.bool_]:
    """Where a window of 2 margin + 1 pixels holds one value only: away from edges, where nearest and blended differ."""
    window = (1, 2 * margin + 1, 2 * margin + 1)
    return ndimage.minimum_filter(mask, window) == ndimage.maximum_filter(mask, window)


# Masks -----------------------------------------------------------------------------------------------------


@both_engines
@pytest.mark.parametrize("border", ["reflect", "replicate", "constant"])
@pytest.mark.parametrize("presize", ["crop", "pad"])
def test_a_mask_shows_the_class_of_the_pixel_under_it(
    masked: Manifest, engine: EngineName, border: Border, presize: Presize
) -> None:
    train, valid = pair(masked, engine, border=border, presize=presize, dihedral=True)
    shapes, void = 0, 0
    for loader, count in ((train, 12), (valid, 1)):
        for batch in islice(loader.stream(), count):
            assert batch.targets.dtype == torch.int64
            assert batch.targets.shape == (len(batch.ids), SIDE, SIDE)
            mask = batch.targets.numpy()
            by_colour = class_by_colour(seen(loader, batch))
            sure = inside(mask, margin=3) & (mask != VOID)
            assert (mask == by_colour)[sure].mean() > 0.999
            shapes += int((mask[sure] > 0).sum())
            void += int((mask == VOID).sum())
            black = seen(loader, batch).sum(-1) < 10
            assert not (black & (mask != VOID) & inside(mask, margin=3)).any()
    assert shapes > 3000
    assert (void > 1000) == (border == "constant")


def test_both_engines_make_the_same_masks(masked: Manifest) -> None:
    ours, oracle = (pair(masked, engine, border="reflect")[0].stream() for engine in ("dali", "reference"))
    for mine, theirs in islice(zip(ours, oracle, strict=True), 12):
        assert torch.equal(mine.ids, theirs.ids)
        assert (mine.targets == theirs.targets).float().mean() > 0.998  # ties of rounding, at edges


def test_values_of_no_class_are_void_and_others_take_their_places(tmp_path: Path) -> None:
    np.testing.assert_array_equal(value_table((7, 0, 255))[[0, 7, 255, 1, 254]], [1, 0, 2, VOID, VOID])
    with pytest.raises(EngineError, match=r"the mask cannot be read as a mask \(its mode is RGB"):
        decode_mask(encode(photo(20, 10), "PNG"))
    with pytest.raises(EngineError, match="cannot be read as a mask"):
        decode_mask(np.frombuffer(b"nothing", np.uint8))


# Points ----------------------------------------------------------------------------------------------------


def centroids(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3, 2) x, y px of the disc, the bar and the ring by their colours; NaN where one is not all in the picture."""
    found = np.full((len(pixels), 3, 2), np.nan)
    near = ((pixels[..., None, :] - COLOURS) ** 2).sum(-1) < 30**2  # blends of two others at an edge are not a third
    for i in range(len(pixels)):
        for shape in (1, 2, 3):
            where = near[i, ..., shape]
            edge = where[[0, 1, -2, -1]].any() or where[:, [0, 1, -2, -1]].any()
            if where.sum() > 60 and not edge:
                y, x = np.nonzero(where)
                found[i, shape - 1] = x.mean() + 0.5, y.mean() + 0.5
    return found


@both_engines
@pytest.mark.parametrize("presize", ["crop", "squish", "pad"])
def test_points_lie_where_the_pixels_show_them(pointed: Manifest, engine: EngineName, presize: Presize) -> None:
    train, valid = pair(pointed, engine, presize=presize, border="constant", dihedral=True, max_warp=0.05)
    compared = 0
    for loader, count in ((train, 24), (valid, 1)):
        for batch in islice(loader.stream(), count):
            assert batch.targets.dtype == torch.float32
            assert batch.targets.shape == (len(batch.ids), 3, 2)
            placed = (batch.targets.numpy().astype(np.float64) + 1) / 2 * SIDE
            shown = centroids(seen(loader, batch))
            there = ~np.isnan(shown[..., 0])
            # a perspective moves a shape's centre of mass off the image of its centre, so it is mild here
            assert np.abs(placed - shown)[there].max() < 0.8
            compared += int(there.sum())
    assert compared > 60


def test_lists_of_points_become_arrays_with_nothing_where_a_point_is_missing() -> None:
    import pyarrow as pa

    labels = pa.array([[1, 2, 3, 4], [5, 6], [], [7, 8, float("nan"), float("nan")]], pa.list_(pa.float32()))
    nan = float("nan")
    expected = [[[1, 2], [3, 4]], [[5, 6], [nan, nan]], [[nan, nan]] * 2, [[7, 8], [nan, nan]]]
    np.testing.assert_array_equal(points(labels, 2), expected)
    np.testing.assert_array_equal(points(labels.slice(1, 2), 2), expected[1:3])


def turns_left(triangle: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n, 3, 2) -> (n,): which way round its corners lie; a mirror changes that, and no turn, zoom or tilt does."""
    (ax, ay), (bx, by) = np.moveaxis(triangle[:, 1:] - triangle[:, :1], 0, -1)
    return np.asarray(ax * by - ay * bx > 0)


@both_engines
@pytest.mark.parametrize("dihedral", [False, True])
def test_points_of_a_pair_change_places_where_the_picture_is_a_mirror_image(
    pointed: Manifest, engine: EngineName, dihedral: bool
) -> None:
    """Told by the pixels alone: which way round disc, bar and ring lie there, and in the scene."""
    paired = replace(pointed, swap=(("disc", "bar"),))
    train, _ = pair(paired, engine, presize="pad", border="constant", dihedral=dihedral, max_warp=0.05)
    labels = dict(zip(paired.rows["id"].to_pylist(), paired.rows["label"].to_pylist(), strict=True))
    counts = Counter[bool]()
    for batch in islice(train.stream(), 30):
        shown = centroids(seen(train, batch))
        there = ~np.isnan(shown).any(axis=(1, 2))
        drawn = np.array([labels[number] for number in batch.ids.tolist()]).reshape(-1, 3, 2)
        mirrored = turns_left(drawn) != turns_left(shown)
        expected = np.where(mirrored[:, None, None], shown[:, [1, 0, 2]], shown)  # the mirrored disc is called bar
        placed = (batch.targets.numpy().astype(np.float64) + 1) / 2 * SIDE
        assert np.abs(placed - expected)[there].max(initial=0) < 0.8
        counts.update(mirrored[there].tolist())
    assert min(counts[True], counts[False]) > 5, counts


def test_a_left_eye_stays_left_in_what_is_shown(tmp_path: Path) -> None:
    """The closed form: mirrored, (x, y) is at (-x, y), and the two eyes' names have changed places."""
    eyes = np.array([[8.0, 10.0], [26.0, 14.0], [18.0, 20.0]])  # 40 x 40 px; left, right, nose
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    names = ("left_eye", "right_eye", "nose")
    columns = {"path": ["a.png"] * 2, "label": [eyes.ravel().tolist()] * 2, "split": ["train", "valid"], "id": [0, 1]}
    checks = check_files(tmp_path, ["a.png"] * 2)
    columns |= {name: checks[name] for name in checks.column_names}
    manifest = build(columns, root=str(tmp_path), task="points", classes=names, swap=(("left_eye", "right_eye"),))
    train, _ = loaders(manifest, ImageSpec(size_px=40, presize_px=40, **{**PLAIN, "flip": True}), batch=1)
    plain = eyes / 20 - 1
    mirrored = plain[[1, 0, 2]] * [-1, 1]
    targets = [batch.targets[0].numpy() for batch in islice(train.stream(), 24)]
    as_is = [np.allclose(target, plain, atol=1e-6) for target in targets]
    turned = [np.allclose(target, mirrored, atol=1e-6) for target in targets]
    assert all(a != b for a, b in zip(as_is, turned, strict=True))
    assert 4 < sum(turned) < 20
    for axes in show_batch(train, rows=2, cols=4).axes:
        left, right, _ = np.asarray(axes.collections[0].get_offsets())
        assert left[0] < 20 < right[0]
    assert {"mirrored   yes: left_eye and right_eye", "mirrored   no\n"} == {
        found[0]
        for at in range(24)
        if (found := re.search(r"mirrored   (no\n|yes: left_eye and right_eye)", explain(train, position=at)))
    }


def test_points_without_pairs_are_not_mirrored_and_it_is_said_once(
    pointed: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    unpaired = replace(pointed, swap=None)
    train, valid = pair(unpaired, "reference")
    assert [record.getMessage() for record in caplog.records] == [UNPAIRED]
    assert (train.spec.flip, valid.spec.flip) == (False, False)
    still, _ = pair(unpaired, "reference", flip=False)
    paired, _ = pair(pointed, "reference", flip=True)
    for one, other, mirror in zip(train.stream(), still.stream(), islice(paired.stream(), 6), strict=False):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.ids, mirror.ids)
    assert len(caplog.records) == 1
    assert not train.source.work(np.arange(60)).geometry.mirrored.any()
    for name in ("flip", "dihedral"):
        mirroring = replace(still.spec, flip=name == "flip", dihedral=name == "dihedral")
        _, plain = loaders(pointed, mirroring, valid=unpaired, batch=3)
        assert not plain.augmented(1).source.work(np.arange(3)).geometry.mirrored.any(), "only training was to mirror"
        with pytest.raises(SpecError, match=rf"^{name}=True mirrors images, .* --swap LEFT,RIGHT .* {name}=False "):
            pair(unpaired, "reference", **{name: True})


# What people are shown -------------------------------------------------------------------------------------


def test_show_batch_draws_points_at_their_pixels(pointed: Manifest) -> None:
    train, _ = pair(pointed, "reference")
    figure = show_batch(train, rows=2, cols=3)
    batches = list(islice(train.stream(), 2))
    targets = torch.cat([batch.targets for batch in batches]).numpy()
    for axes, target in zip(figure.axes, targets, strict=True):
        drawn = np.asarray(axes.collections[0].get_offsets())
        np.testing.assert_allclose(drawn, (target + 1) / 2 * SIDE - 0.5, atol=1e-4)  # pixel centres are whole there
        assert axes.get_xlim() == (-0.5, SIDE - 0.5)


def test_show_batch_draws_the_mask_over_the_image(masked: Manifest) -> None:
    train, _ = pair(masked, "reference", border="constant")
    figure = show_batch(train, rows=1, cols=3)
    (batch,) = islice(train.stream(), 1)
    for axes, target in zip(figure.axes, batch.targets.numpy(), strict=True):
        image, mask = (np.ma.asarray(drawn.get_array()) for drawn in axes.images)  # type: ignore[var-annotated]
        assert image.shape == (SIDE, SIDE, 3)
        np.testing.assert_array_equal(np.ma.getmaskarray(mask), target == VOID)
        np.testing.assert_array_equal(mask.filled(VOID), target)


def test_explain_tells_points_in_pixels_and_a_masks_shares(pointed: Manifest, masked: Manifest) -> None:
    train, _ = pair(pointed, "reference")
    text = explain(train, position=2)
    (target,) = train.source.work(np.array([2])).targets
    placed = (np.asarray(target) + 1) / 2 * SIDE
    for name, (x, y) in zip(POINTS, placed, strict=True):
        assert f"{name} {x:.1f},{y:.1f}" in text
    assert "targets (3, 3, 2) float32" in text
    train, _ = pair(masked, "reference")
    text = explain(train)
    assert f"target     ({SIDE}, {SIDE}) {NAMES[0]} " in text
    assert f"targets (3, {SIDE}, {SIDE}) int64" in text
