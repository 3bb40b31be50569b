"""Does `thawline predict` find the images that are meant, and write all that the model says of them?"""

import csv
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.dataio.test_shapes import indexed
from thawline import models, pack
from thawline.cluster.cli.finished.predict import Predict
from thawline.cluster.errors import USER_ERRORS
from thawline.cluster.serve.asked import asked
from thawline.cluster.serve.mask_pictures import Masks
from thawline.cluster.serve.predictor import load
from thawline.dataio.pixels.pictures import VOID
from thawline.dataio.stream.render import Item
from thawline.models.bundle import Description, packed

CLASSES = {"single_label": ("cat", "dog", "'=1+1\n"), "multi_label": ("red", "round"), "number": ("mm",)}
CLASSES |= {"points": ("eye", "nose"), "mask": ("ground", "leaf", "stem")}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By task, one of an untrained model."""
    made = {}
    for task, classes in CLASSES.items():
        folder = made[task] = tmp_path_factory.mktemp(task)
        about = Description(
            model="tiny",
            outputs=len(classes),
            task=task,
            classes=classes,
            values=(0, 3, 9) if task == "mask" else (),
            image={"size_px": 32, "presize_px": 40},
            engine="reference",
            precision="fp32",
            step=0,
        )
        model = models.create("tiny", len(classes), task=task, weights="none", seed=3)
        for name, data in packed(model.state_dict(), about).items():
            (folder / name).write_bytes(data)
    return made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, two of which are called the same but for their ending, and two files that are none."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    (folder / "more").mkdir()
    for name in ("a.png", "b.png", "more/a.jpg", "more/a.png"):
        Image.fromarray(draw.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(folder / name)
    (folder / "text.jpg").write_text("text")
    (folder / "notes.txt").write_text("no image by its name")
    return folder


def predict(run: Path, *places: str | Path, **options: Any) -> int:
    return Predict(source=str(run), places=tuple(map(str, places)), **options).run()


@pytest.mark.parametrize("task", CLASSES)
def test_every_format_holds_what_the_model_says(
    task: str, bundles: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with load(bundles[task]) as predictor:
        said = [each for each in predictor.predict(sorted(images.rglob("*.*g"))) if each.error is None]
    assert predict(bundles[task], images) == 1
    out, err = capsys.readouterr()
    assert (
        err == f"{images}/text.jpg: not an image; passed over\n1 of 5 images cannot be used: nothing is said of them\n"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == [each.name for each in said]
    for row, each in zip(rows, said, strict=True):
        assert row["prediction"] == each.prediction
        assert row.get("probability") == each.probability
        assert list(row.get("probabilities", {}).items()) == list(each.probabilities.items())
    for ending in (".jsonl", ".csv", ".parquet"):
        file = tmp_path / f"out{ending}"
        assert predict(bundles[task], images, out=str(file)) == 1
        assert capsys.readouterr().out == f"{file}\n"
        assert read(file) == rows
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def read(file: Path) -> list[dict[str, Any]]:
    """What a file of predictions holds, as JSON lines would."""
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    if file.suffix == ".parquet":
        rows = pq.read_table(file).to_pylist()
        return [{k: dict(v) if k == "probabilities" else v for k, v in row.items()} for row in rows]
    with file.open(newline="", errors="surrogateescape") as lines:
        rows = list(csv.DictReader(lines))
    told = {"path", "mask"} | ({"prediction"} if rows[0]["prediction"] in CLASSES["single_label"] else set())
    return [{k: v if k in told else json.loads(v) for k, v in row.items()} for row in rows]


def test_on_a_terminal_each_image_is_a_line(
    bundles: dict[str, Path], images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert predict(bundles["multi_label"], images / "a.png", top_k=2) == 0
    with load(bundles["multi_label"]) as predictor:
        ranked = predictor.predict(images / "a.png").probabilities
    words = ", ".join(f"{name} {share:.3f}" for name, share in ranked.items())
    assert capsys.readouterr().out == f"{images}/a.png  {words}\n"


def test_files_folders_patterns_uris_manifests_packs_and_stdin_are_the_images_that_they_name(
    bundles: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{images}/b.png\n\n{images}/gone.png\n"))
    manifest = indexed(tmp_path / "shapes", "mask", count=12)
    (tmp_path / "shapes" / manifest.rows["path"][3].as_py()).unlink()
    manifest.save(tmp_path / "m.parquet")
    pack(indexed(tmp_path / "again", "mask", count=12), tmp_path / "packed")
    places: list[str | Path] = [
        images / "a.png",
        images / "more",
        f"{images}/**/b.p*",
        (images / "b.png").as_uri(),
        images.as_uri(),
        "-",
    ]
    assert asked([str(images), f"{images}/*.png"]).total == 7
    assert predict(bundles["number"], *places, tmp_path / "m.parquet", tmp_path / "packed/manifest.arrow") == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    names = ["a.png", "more/a.jpg", "more/a.png", "b.png", None, "a.png", "b.png", "more/a.jpg", "more/a.png", "b.png"]
    given = [row["path"] for row in rows[:10]]
    assert given == [(images / "b.png").as_uri() if name is None else f"{images}/{name}" for name in names]
    assert "gone.png: missing; passed over" in err
    assert len(rows) == 10 + 11 + 12
    whole = [row["prediction"] for row in rows[-12:]]
    paths = manifest.rows["path"].to_pylist()
    of_files = {row["path"]: row["prediction"] for row in rows[10:21]}
    for path, number in zip(paths, whole, strict=True):
        assert of_files.get(f"{manifest.root}/{path}", number) == pytest.approx(number, rel=1e-5)


def test_masks_are_pictures_with_the_values_of_the_runs_own(
    bundles: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    assert predict(bundles["mask"], images, masks=str(tmp_path / "m"), out=str(tmp_path / "o.jsonl")) == 1
    assert predict(bundles["mask"], images, masks=str(tmp_path / "over"), overlay=True) == 1
    with load(bundles["mask"]) as predictor:
        said = {each.name: each.mask for each in predictor.predict([images / "a.png", images / "more/a.png"])}
    files = {row["path"]: row["mask"] for row in read(tmp_path / "o.jsonl")}
    assert files[f"{images}/more/a.png"] == f"{tmp_path}/m/more/a-2.png"
    assert len({*files.values()}) == 4
    for name, mask in said.items():
        picture = Image.open(files[name])
        assert (picture.mode, picture.size, mask is not None) == ("P", (40, 30), True)
        table = np.array([0, 3, 9, *[VOID] * 253], np.uint8)
        np.testing.assert_array_equal(np.array(picture), table[mask])
        over = np.array(Image.open(files[name].replace("/m/", "/over/"))).astype(int)
        plain = np.array(Image.open(name)).astype(int)
        drawn = (mask != 0) & (mask != VOID)
        np.testing.assert_array_equal(over[~drawn], plain[~drawn])
        assert np.abs(over[drawn] - plain[drawn] / 2).max() <= 128


def test_a_masks_name_leads_out_of_no_folder(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    manifest = indexed(tmp_path / "shapes", "single_label", count=12)
    moved = [f"../shapes/{path}" if i % 2 else path for i, path in enumerate(manifest.rows["path"].to_pylist())]
    index = manifest.rows.schema.get_field_index("path")
    strange = replace(manifest, rows=manifest.rows.set_column(index, "path", [moved]))
    strange.save(tmp_path / "m.parquet")
    shorts = [named.short for named in asked([str(tmp_path / "m.parquet")]).images]
    assert not any(".." in short or short.startswith("/") for short in shorts)
    masks = Masks(str(tmp_path / "m"), values=(), classes=2, overlay=False)
    saved = [masks.save(np.zeros((2, 2), np.uint8), Item("", b""), short) for short in (*shorts, *shorts)]
    assert len({*saved}) == 24
    assert all(Path(file).resolve().is_relative_to(tmp_path / "m") for file in saved)


@pytest.mark.parametrize(
    ("task", "places", "options", "told"),
    [
        ("number", ["{images}/more/none"], {"out": "{tmp}/o.xlsx"}, r"--out .*o.xlsx does not end in .csv, .jsonl"),
        ("number", ["{images}"], {"out": "{images}/notes.csv"}, r"notes.csv exists: it is not written over"),
        ("number", ["{images}"], {"out": "{images}/a.png/o.csv"}, r"--out .* cannot be written \("),
        ("number", ["{tmp}"], {}, r"no images in .*: it holds 0 other files"),
        ("number", ["{images}/*.gif"], {}, r"no file matches .*\*.gif: there is nothing to predict"),
        ("number", ["{images}/notes.csv"], {}, r"notes.csv is a list and no manifest: .* one a line"),
        ("number", ["{images}/no.parquet"], {}, r"no.parquet"),
        ("number", ["{images}"], {"threshold": 0.2}, r"threshold=0.2 with task number"),
        ("number", ["{images}"], {"masks": "{tmp}/m"}, r"--masks with task number: its model says no masks"),
        ("half", ["{images}"], {}, r"model.safetensors has .* bytes, and .*: it was copied in part"),
        ("gone", ["{images}"], {}, r"gone holds no bundle \(model.json is missing\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_gets_a_sentence_and_leaves_nothing_behind(
    task: str, places: list[str], options: dict[str, Any], told: str,
    bundles: dict[str, Path], images: Path, tmp_path: Path,
) -> None:  # fmt: skip
    def filled(text: Any) -> Any:
        return text.format(images=images, tmp=tmp_path / "empty") if isinstance(text, str) else text

    (tmp_path / "empty").mkdir()
    (images / "notes.csv").write_text("a,b\n")
    half = tmp_path / "half"
    half.mkdir()
    for file in bundles["number"].iterdir():
        (half / file.name).write_bytes(file.read_bytes()[: -1 if file.suffix == ".safetensors" else None])
    runs = {**bundles, "half": half, "gone": tmp_path / "gone"}
    with pytest.raises(USER_ERRORS, match=told):
        predict(runs[task], *map(filled, places), **{name: filled(value) for name, value in options.items()})
    assert list((tmp_path / "empty").iterdir()) == []
    assert (images / "notes.csv").read_text() == "a,b\n"


def test_a_name_with_bytes_of_no_script_is_written(bundles: dict[str, Path], images: Path, tmp_path: Path) -> None:
    strange = os.fsdecode(b"\xff.png")
    shutil.copy(images / "a.png", tmp_path / strange)
    for ending, path in ((".jsonl", strange), (".csv", strange), (".parquet", "\\udcff.png")):
        assert predict(bundles["number"], tmp_path / strange, out=str(tmp_path / f"out{ending}")) == 0
        assert [row["path"] for row in read(tmp_path / f"out{ending}")] == [f"{tmp_path}/{path}"]


def test_a_description_of_a_later_version_gets_a_sentence(bundles: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bundles["number"], tmp_path / "later")
    text = (tmp_path / "later/model.json").read_text().replace('"presize_px": 40', '"presize_px": 40, "depth": 3')
    (tmp_path / "later/model.json").write_text(text)
    with pytest.raises(models.BundleError, match=r"describes its images in a way .*'depth'.*: they might be seen"):
        load(tmp_path / "later")


def test_without_a_place_it_is_misuse(bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(bundles["number"]) == 2
    assert "was given no IMAGE" in capsys.readouterr().err
