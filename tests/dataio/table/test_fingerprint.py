"""When are two manifests the same data, and what does a manifest say of itself?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from tests.kit.manifests import FORMATS, TASKS, holey, sized, unlooked
from thawline.dataio.errors import ManifestError
from thawline.dataio.table.manifest import Manifest

# --- two manifests


@pytest.mark.parametrize("task", [*TASKS, "holes"])
def test_fingerprint_is_that_of_the_contents_in_either_format(tmp_path: Path, task: str) -> None:
    manifest = holey(tmp_path / "in") if task == "holes" else TASKS[task]()
    prints = {manifest.fingerprint()}
    for kind in FORMATS:
        manifest.save(tmp_path / f"m.{kind}")
        loaded = Manifest.load(tmp_path / f"m.{kind}")
        prints |= {loaded.fingerprint(), replace(loaded).fingerprint()}  # as saved, and counted anew
    paths = pa.array([f"other/{i}.webp" for i in range(len(manifest.rows))], pa.large_string())
    prints |= {replace(manifest, root="/other", rows=manifest.rows.set_column(1, "path", paths)).fingerprint()}
    assert len(prints) == 1


def test_fingerprint_changes_with_what_decides_a_run() -> None:
    manifest = sized(TASKS["single_label"]())
    prints = [manifest.fingerprint(), replace(manifest, classes=("c", "b", "a")).fingerprint()]
    rows = manifest.rows
    for name, other in (
        ("id", pa.array([0, 1, 2, 4])),
        ("label", pa.array(["b", "a", "b", "b"])),
        ("split", pa.array(["train", "train", "valid", "train"]).cast(rows.schema.field("split").type)),
        ("width", pa.array([10, 10, 10, 11], pa.int32())),
        ("hash", pa.array([None, None, None, 1], pa.uint64())),
        ("status", pa.array(["ok", "ok", "ok", "missing"]).cast(rows.schema.field("status").type)),
    ):
        prints.append(replace(manifest, rows=rows.set_column(rows.column_names.index(name), name, other)).fingerprint())
    assert len(set(prints)) == len(prints)


def test_pairs_of_points_are_kept_and_count_only_where_there_are_some(tmp_path: Path) -> None:
    old = TASKS["points"]()
    assert old.fingerprint() == "5515868c615d952dba94cbf32a16b399", "as before there were pairs: runs on it go on"
    pairs = (("point 0", "point 1"),)
    known = [old, *(replace(old, swap=swap) for swap in ((), pairs))]
    assert len({manifest.fingerprint() for manifest in known}) == 3
    for manifest in known:
        for kind in FORMATS:
            manifest.save(tmp_path / f"m.{kind}")
            loaded = Manifest.load(tmp_path / f"m.{kind}")
            assert loaded.swap == manifest.swap
            assert replace(loaded).fingerprint() == manifest.fingerprint()
    replace(old, swap=(("point 0", "tail"),)).save(tmp_path / "odd.parquet")
    with pytest.raises(ManifestError, match=r"'tail' is not among the 2 points .*; make it again with thawline index"):
        Manifest.load(tmp_path / "odd.parquet")


def test_vocabularies_must_be_the_same_in_the_same_order() -> None:
    manifest = TASKS["single_label"]()
    manifest.check_vocabulary(unlooked(["c", "a", "b"]))
    for other, message in (
        (unlooked(["a", "d", "c"]), r"the other manifest has other classes than this one \(-b, \+d\).*--classes"),
        (replace(manifest, classes=("b", "a", "c")), r"\(the same in another order\)"),
        (TASKS["multi_label"](), "is for multi_label, this one for single_label: their targets do not mean the same"),
    ):
        with pytest.raises(ManifestError, match=message):
            manifest.check_vocabulary(other)
    mask = TASKS["mask"]()
    with pytest.raises(ManifestError, match=r"^valid\.parquet has other classes"):
        mask.check_vocabulary(replace(mask, values=(7, 0)), name="valid.parquet")


def test_summary_counts_sides_classes_sizes_and_reasons(tmp_path: Path) -> None:
    assert holey(tmp_path).summary().splitlines() == [
        "8 images: 4 train, 4 valid",
        "2 classes (single_label): cat, dog",
        "9 to 17 px wide, 8 to 8 px high",
        "2 quarantined, not used: 1 empty file, 1 missing",
        "  cat/00.png: empty file",
        "  dog/05.png: missing",
        f"root {tmp_path}",
    ]


def test_summary_counts_unusable_masks_as_one_kind(tmp_path: Path) -> None:
    manifest = holey(tmp_path)
    field, said = manifest.rows.schema.field("status"), manifest.rows["status"].to_pylist()
    status = [why if why == "ok" else f"its mask {i}: {why}" for i, why in enumerate(said)]
    at = manifest.rows.column_names.index("status")
    rows = manifest.rows.set_column(at, field, pa.array(status).cast(field.type))
    assert "2 quarantined, not used: 2 its mask" in replace(manifest, rows=rows).summary().splitlines()
