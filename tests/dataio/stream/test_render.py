"""Do `render` and `rendered` show of files what validation shows of them, and nothing of what cannot be used?"""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kit.hostile import pictures, saved
from tests.kit.images import photo
from thawline.dataio import (
    ImageSpec,
    Manifest,
    by_folder,
    by_function,
    from_folder,
    label,
    render,
    split,
    split_loader,
)
from thawline.dataio.cores import usable_cores
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.stream.render import Item, rendered
from thawline.dataio.stream.renderer import EngineName, Renderer, choose_engine

NAMES = (
    *("rgb.jpg", "cmyk.jpg", "turned6.jpg", "grey16.png", "alpha.png", "palette.png", "1x1.png", "rgb.webp", "lzw.tif"),
    *("cmyk_not_adobe.jpg", "still.gif", "turned2_by_xmp.jpg", "3x5000.gif"),  # which only Pillow decodes
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """All of NAMES, and a photo that is shrunk so far that it is filtered first, for validation."""
    folder = tmp_path_factory.mktemp("render")
    for side in ("train", "valid"):
        (folder / side).mkdir()
        for name in NAMES:
            (folder / side / name).write_bytes(pictures()[name])
    (folder / "valid/large.jpg").write_bytes(saved(photo(400, 300, seed=1), "JPEG"))
    table = from_folder(folder, extensions=[".jpg", ".png", ".gif", ".webp", ".tif"])
    return split(label(table, by_function(lambda row: "even" if len(row["path"]) % 2 else "odd")), by_folder("valid"))


@pytest.mark.parametrize("engine", ["dali", "reference"])
@pytest.mark.parametrize("spec", [ImageSpec(size_px=32, presize_px=40), ImageSpec(size_px=24, presize="pad")])
def test_an_image_alone_has_the_pixels_that_it_has_in_a_validation_bit_by_bit(
    manifest: Manifest, engine: EngineName, spec: ImageSpec
) -> None:
    paths = dict(zip(manifest.rows["id"].to_pylist(), manifest.rows["path"].to_pylist(), strict=True))
    with split_loader(manifest, spec, "valid", global_batch=5, engine=engine) as loader:
        batches = list(loader.stream())
    ids, images = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids", "inputs"))
    seen = [(paths[i], pixels) for i, pixels in zip(ids.tolist(), images, strict=True)]
    assert len(seen) == len(NAMES) + 1
    for path, pixels in seen:
        alone = render(Path(manifest.root, path).read_bytes(), spec, engine=engine)
        assert alone.shape == (1, 3, spec.size_px, spec.size_px)
        assert torch.equal(alone[0], pixels), path


@pytest.mark.parametrize("engine", ["dali", "reference"])
def test_many_images_are_those_of_a_validation_and_what_cannot_be_used_is_told_and_passed_over(
    manifest: Manifest, engine: EngineName
) -> None:
    """Bit by bit; pixels in memory, too; and augmented views are a function of the file alone."""
    spec = ImageSpec(size_px=32, presize_px=40)
    with split_loader(manifest, spec, "valid", global_batch=5, engine=engine) as loader:
        seen = torch.cat([batch.inputs for batch in loader.stream()])
        paths = loader.subset.take(np.arange(len(loader.subset))).paths
    files = [Item(name, Path(manifest.root, name).read_bytes) for name in paths]
    broken = [Item(name, pictures()[name]) for name in ("cut3.jpg", "text.jpg", "bomb.png")]
    missing = Item("missing", Path(manifest.root, "not there").read_bytes)
    items = [files[0], broken[0], *files[1:7], missing, *files[7:], *broken[1:]]
    told = dict[str, str]()

    def told_of(number: int, why: str) -> None:
        told[items[number].name] = why

    with Renderer(spec=spec, local_batch=5, choice=choose_engine(engine)) as renderer:
        batches = [*rendered(items, renderer, views=2, tell=told_of)]
        assert [batch.view for batch in batches] == [0, 1, 2] * (len(batches) // 3)
        plain, first = (torch.cat([batch.inputs for batch in batches if batch.view == view]) for view in (0, 1))
        numbers = [number for batch in batches if batch.view == 0 for number in batch.numbers]
        assert [items[number].name for number in numbers] == paths
        assert torch.equal(plain, seen)
        assert told.keys() == {"cut3.jpg", "text.jpg", "bomb.png", "missing"}
        assert told["missing"] == "missing"
        pixels = Item("in memory", decode(np.frombuffer(pictures()["rgb.png"], np.uint8)))
        (pair,) = rendered([Item("", pictures()["rgb.png"]), pixels], renderer, tell=told_of)
        assert torch.equal(pair.inputs[0], pair.inputs[1])
        alone = [*rendered(files[3:4], renderer, views=2, tell=told_of)]
        assert torch.equal(alone[1].inputs[0], first[3])
        assert not torch.equal(first, plain)


def test_few_batches_are_read_ahead_however_many_images_there_are() -> None:
    """None before the first is asked for, and no more than are under way between the steps."""
    read = list[int]()

    def endless() -> Iterator[Item]:
        for number in count():
            read.append(number)
            yield Item(str(number), pictures()["rgb.png"])

    spec = ImageSpec(size_px=32, presize_px=40)
    with Renderer(spec=spec, local_batch=8, choice=choose_engine("reference")) as renderer:
        batches = rendered(endless(), renderer, tell=lambda number, why: None)
        assert read == []
        for batch in islice(batches, 20):
            assert read[-1] - batch.numbers[-1] < 16 * (2 * usable_cores() + 2) + 8
        batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "why"), [("cut3.jpg", "truncated"), ("text.jpg", "not an image"), ("bomb.png", "bomb")]
)
def test_what_no_run_would_use_is_refused(name: str, why: str) -> None:
    with pytest.raises(EngineError, match=rf"upload 7 cannot be used \(.*{why}.*\): a model sees nothing of it"):
        render(pictures()[name], ImageSpec(), name="upload 7")
