"""Does a batch fit? By the sizes in the manifest, against the memory that there is; nothing is decoded for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from torch import nn

from tests.kit.images import flat_manifest
from thawline.cluster.errors import JobError, LaunchError
from thawline.cluster.job.checks import batch_of
from thawline.cluster.job.job import Data, Job
from thawline.cluster.machine import memory
from thawline.cluster.machine.memory import available_bytes, check_features, check_memory, kept_by_forward
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import ImageLoader, loaders
from thawline.models import create

GB = 10**9


def bombs(folder: Path, *, batch: int, bombs: int, side_px: int = 13_000, engine: str = "dali") -> list[ImageLoader]:
    """Loaders of 100 training images, the first of which are said to be that large; the others have 100 px."""
    manifest = flat_manifest(folder, train=100, valid=4)
    rows = manifest.rows
    for name in ("width", "height"):
        sides = np.full(rows.num_rows, 100)
        sides[np.flatnonzero(np.array(rows["split"].to_pylist()) == "train")[:bombs]] = side_px
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), pa.array(sides, pa.int32()))
    options = {"batch": batch, "engine": engine, "threads": 2, "check_paths": False}
    return list(loaders(replace(manifest, rows=rows), ImageSpec(size_px=32, presize_px=40), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [32, 64])
def test_what_cannot_fit_is_refused_with_the_file_and_the_number_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * GB)
    found = bombs(tmp_path, batch=batch, bombs=12)
    largest = f"{tmp_path}/.*, has 169,000,000 pixels"
    with pytest.raises(LaunchError, match=rf"needs about 6.1 GB.*4.0 GB left.*{largest}.*--data.global-batch \d+ "):
        check_memory(found, ranks_here=1)
    fits = 8  # their mean 61 MB, six times their deviation of 165 MB by the root of 8, and one of 507 MB: 3.8 GB
    with pytest.raises(LaunchError, match=rf"--data.global-batch {fits} or less"):
        check_memory(found, ranks_here=1)
    told: list[str] = []
    smaller = [replace(each, order=replace(each.order, global_batch=fits)) for each in found]
    check_memory(smaller, ranks_here=1, tell=told.append)
    assert "may hold 3.8 GB of decoded pixels" in told[0]
    assert str(tmp_path) in told[0], "the file is named"
    with pytest.raises(LaunchError, match=r"global-batch 3 or less"):  # two ranks share the machine; any 3 may meet
        check_memory(found, ranks_here=2)


def test_a_few_large_images_among_many_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * GB)
    told: list[str] = []
    check_memory(bombs(tmp_path, batch=8, bombs=12, side_px=4000), ranks_here=1, tell=told.append)
    assert told == [], "48 MB each, which is a camera's picture"
    # The reference engine decodes one after another: a batch of any size needs the same.
    check_memory(bombs(tmp_path, batch=100, bombs=100, side_px=4000, engine="reference"), ranks_here=1)
    with pytest.raises(LaunchError):
        check_memory(bombs(tmp_path, batch=100, bombs=100, side_px=4000), ranks_here=1)


def test_an_image_that_never_fits_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: GB // 4)
    with pytest.raises(LaunchError, match=r"index --max-pixels"):
        check_memory(bombs(tmp_path, batch=8, bombs=12), ranks_here=1)


def test_what_the_forward_pass_keeps_is_what_autograd_saves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 8 * 8, 2))
    model[1].eval()
    image, activation = 4 * 3 * 8 * 8, 4 * 5 * 8 * 8  # the convolution keeps its input, ReLU its output, for all after
    assert kept_by_forward(model, 8) == image + activation
    assert kept_by_forward(model, 8, micro_batches=2) == (image + activation) / 2
    assert [layer.training for layer in model] == [True, False, True, True]


def test_features_that_cannot_be_kept_are_refused_with_their_bytes_and_how_many_views_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = flat_manifest(tmp_path, train=100, valid=4)
    train, _ = loaders(manifest, ImageSpec(size_px=32, presize_px=40), batch=8, engine="reference")
    model = create("tiny", 2, weights="none")
    each = 2 * 64 * 4 + 250  # the means and maxima of 64 channels in float32, and where they are found
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 2 * 3 * 100 * each)  # half is for three views on two
    said = check_features(model, train, views=3, ranks_here=2)
    assert "features of 100 images will take up to 0.5 MB" in said
    with pytest.raises(LaunchError, match=r"cache_features=4 keeps 0\.8 kB of each of 100 .*cache_features=3, or"):
        check_features(model, train, views=4, ranks_here=2)
    check_features(model, train, views=6, ranks_here=1)
    assert model.training


def test_memory_is_what_the_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tuple(tmp_path / name for name in ("max", "current", "stat"))
    monkeypatch.setattr(memory, "_limits", lambda: [files])
    free = available_bytes()
    assert free > 0, "no such group"
    for text, left in (("max", None), ("3000", 3000 - 2000 + 500), ("1000", 0)):
        for file, content in zip(files, (text, "2000", "anon 5\ninactive_file 500"), strict=True):
            file.write_text(content)
        assert (available_bytes() == left) if left is not None else available_bytes() > 3000


def test_a_batch_larger_than_the_split_is_refused_where_asked_for_and_cut_where_it_is_the_default() -> None:
    default = Job()
    asked = replace(default, data=Data(global_batch=100_000))
    assert batch_of(default, samples=64) == 64
    assert batch_of(default, samples=40) == 40
    assert batch_of(replace(default, data=Data(global_batch=30)), samples=40) == 30
    with pytest.raises(
        JobError, match=r"global_batch=100000 is larger than the 112 .* --data.global-batch 112 or less"
    ):
        batch_of(asked, samples=112)
    with pytest.raises(JobError, match=r"6 training images over workers=4 .* at least 8 training images"):
        batch_of(replace(default, workers=4), samples=6)
