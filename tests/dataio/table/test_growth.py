"""Growth: does every image stay on its side, under its id, and every class in its place?"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from thawline.cluster.cli.index import make_manifest
from thawline.dataio.checks.census import label_moments
from thawline.dataio.errors import ManifestError
from thawline.dataio.table.growth import grow
from thawline.dataio.table.manifest import Manifest


def picture(file: Path, number: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 6), (number, 3 * number % 256, 99)).save(file)


def by_path(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in manifest.rows.to_pylist()}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_old_images_stay_on_their_side_and_copies_go_to_it(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "photos"
    for i in range(40):
        picture(folder / f"{('cat', 'owl')[i % 2]}/{i}.png", i)
    old = make_manifest(folder, valid="0.25", seed=seed)
    before = by_path(old)
    for i in range(40, 80):
        picture(folder / f"{('cat', 'bee')[i % 2]}/{i}.png", i)
    for i in range(10):  # copies under other names
        shutil.copy(folder / f"{('cat', 'owl')[i % 2]}/{i}.png", folder / f"cat/copy{i}.png")
    for i in range(10, 20):  # moved
        (folder / f"{('cat', 'owl')[i % 2]}/{i}.png").rename(folder / f"owl/moved{i}.png")
    for i in range(20, 23):
        (folder / f"{('cat', 'owl')[i % 2]}/{i}.png").unlink()
    new = make_manifest(folder, valid="0.25", seed=seed)
    growth = grow(old, new)
    after = by_path(growth.manifest)
    sides = {row["hash"]: row["split"] for row in before.values()}
    assert all(row["split"] == sides.get(row["hash"], row["split"]) for row in after.values()), (
        "no old image changes side"
    )
    assert any(row["split"] != after[path]["split"] for path, row in by_path(new).items()), "which the draw would have"
    for i in range(23, 40):
        path = f"{('cat', 'owl')[i % 2]}/{i}.png"
        assert (after[path]["id"], after[path]["split"]) == (before[path]["id"], before[path]["split"])
    for i in range(10, 20):
        assert after[f"owl/moved{i}.png"]["id"] == before[f"{('cat', 'owl')[i % 2]}/{i}.png"]["id"]
    ids = [row["id"] for row in after.values()]
    assert len({*ids}) == len(ids) == 40 + 40 + 10 - 3
    assert min(row["id"] for path, row in after.items() if path not in before and "moved" not in path) == 40
    assert growth.manifest.classes == ("cat", "owl", "bee"), "old ones keep their places"
    assert (growth.classes, growth.gone, sum(growth.images.values())) == (("bee",), 3, 50)
    growth.manifest.save(tmp_path / "grown.parquet")
    assert Manifest.load(tmp_path / "grown.parquet").rows == growth.manifest.rows
    assert grow(growth.manifest, new).manifest.fingerprint() == growth.manifest.fingerprint()
    with pytest.raises(ManifestError, match=r"is for multi_label with .* index the images as before"):
        grow(old, replace(new, task="multi_label"))


def test_an_image_under_the_name_of_another_goes_where_its_bytes_were(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for i in range(20):
        picture(folder / f"{('cat', 'owl')[i % 2]}/{i}.png", i)
    old = make_manifest(folder, valid="0.25")
    before = by_path(old)
    train, valid = ([path for path, row in before.items() if row["split"] == side] for side in ("train", "valid"))
    shutil.copy(folder / valid[0], folder / train[0])
    shutil.copy(folder / train[1], folder / valid[1])
    picture(folder / train[2], 77)
    growth = grow(old, make_manifest(folder, valid="0.25"))
    after = by_path(growth.manifest)
    assert [after[path]["split"] for path in (train[0], valid[1], train[2])] == ["valid", "train", "train"]
    assert after[train[2]]["id"] == before[train[2]]["id"]
    assert growth.replaced == 3
    assert "3 have other files under their names" in str(growth)


def test_numbers_stay_in_the_units_of_the_first_images(tmp_path: Path) -> None:
    lines = ["path,size"]
    for i in range(8):
        picture(tmp_path / f"{i}.png", i)
        lines.append(f"{i}.png,{i * i}")
    made = []
    for count, name in ((5, "old"), (9, "new")):
        (tmp_path / f"{name}.csv").write_text("\n".join(lines[:count]))
        made.append(make_manifest(tmp_path / f"{name}.csv", label="number:size", valid="0.25"))
    first = label_moments(made[0])
    assert label_moments(made[1]) != first
    grown = grow(*made).manifest
    grown.save(tmp_path / "grown.parquet")
    loaded = Manifest.load(tmp_path / "grown.parquet")
    assert label_moments(loaded) == first
    assert label_moments(grow(loaded, made[1]).manifest) == first, "however often it goes on"
    for wrong in (((1.0,), (0.0,)), ((1.0, 2.0), (1.0, 2.0)), ((1.0,),)):
        replace(grown, moments=wrong).save(tmp_path / "wrong.parquet")  # type: ignore[arg-type]
        with pytest.raises(ManifestError, match=r"wrong\.parquet has no moments that numbers could be standardised by"):
            Manifest.load(tmp_path / "wrong.parquet")
