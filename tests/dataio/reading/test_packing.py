"""Do shards hold what the files hold, whatever happens while they are made?"""

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.kit.images import encode, photo, psnr
from tests.kit.packs import SMALL, contents, every, photos, rebuilt
from thawline.cluster.machine import provenance
from thawline.dataio.errors import ManifestError, QuarantineError, ShardError
from thawline.dataio.pixels.pictures import decode
from thawline.dataio.reading.packing import pack
from thawline.dataio.table.manifest import Manifest

# What they hold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["single_label", "mask"])
def test_each_record_is_its_file_byte_by_byte(tmp_path: Path, task: str) -> None:
    manifest = photos(tmp_path / "loose", task=task)
    packed = pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    assert len(packed.shards) > 3
    found = every(packed)
    assert len(found) == 13
    for path, encoded in found:
        whole = (tmp_path / "loose" / path).read_bytes()
        if path.endswith(".gif"):
            assert bytes(encoded.image[1:4]) == b"PNG"
            original = decode(np.frombuffer(whole, np.uint8))
            np.testing.assert_array_equal(decode(encoded.image), original)
        else:
            assert encoded.image.tobytes() == whole
        mask = (tmp_path / "loose" / "masks" / f"{Path(path).stem}.png").read_bytes()
        assert (encoded.mask is None) if task != "mask" else (encoded.mask.tobytes() == mask)


def test_shards_follow_each_other_over_all_rows_and_say_their_own_columns(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    packed = pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    bounds = [(shard.first, shard.first + shard.rows) for shard in packed.shards]
    assert [a for a, _ in bounds] == [0, *(b for _, b in bounds[:-1])]
    assert bounds[-1][1] == manifest.rows.num_rows
    for shard in packed.shards:
        with pa.memory_map(str(tmp_path / "packed" / shard.name)) as file:
            rows = pa.ipc.open_file(file).read_all()
        part = packed.rows.slice(shard.first, shard.rows)
        assert rows.column_names == [*packed.rows.column_names, "data", "data_hash"]
        for name in packed.rows.column_names:
            assert rows[name].to_pylist() == part[name].to_pylist()
        assert [data is None for data in rows["data"].to_pylist()] == [s != "ok" for s in part["status"].to_pylist()]
        assert sum(n or 0 for n in part["bytes"].to_pylist()[:-1]) < SMALL


def test_the_packed_manifest_makes_the_same_run(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    packed = pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    loaded = Manifest.load(tmp_path / "packed" / "manifest.arrow")
    assert packed.fingerprint() == loaded.fingerprint() == manifest.fingerprint()
    assert loaded.home == packed.home == str(tmp_path / "packed")
    assert loaded.shards == packed.shards
    assert loaded.rows.equals(packed.rows)
    assert set(loaded.rows["codec"].to_pylist()) == {"dali"}
    untouched = ["id", "path", "label", "split", "width", "height", "hash", "status"]
    assert loaded.rows.select(untouched).to_pylist() == manifest.rows.select(untouched).to_pylist()
    loaded.check_paths()


def test_packing_twice_gives_the_same_files_whatever_the_threads(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    for name, threads in (("one", 1), ("two", 5)):
        pack(manifest, tmp_path / name, shard_bytes=SMALL, threads=threads)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_can_be_packed_again_into_others(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    packed = pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    again = pack(packed, tmp_path / "again")
    assert len(again.shards) == 1
    assert again.fingerprint() == manifest.fingerprint()
    for (path, one), (_, other) in zip(every(packed), every(again), strict=True):
        assert one.image.tobytes() == other.image.tobytes(), path


# Smaller ----------------------------------------------------------------------------------------------------


def test_large_images_become_smaller_and_small_ones_stay(tmp_path: Path) -> None:
    manifest = replace(photos(tmp_path / "loose", task="points", side=38), swap=(("nose", "tail"),))
    packed = pack(manifest, tmp_path / "packed", max_side_px=40, quality=95)
    assert packed.fingerprint() != manifest.fingerprint()
    assert packed.swap == Manifest.load(tmp_path / "packed/manifest.arrow").swap == manifest.swap
    new, old = packed.rows.to_pylist(), manifest.rows.to_pylist()
    read = dict(every(packed))
    changed = [i for i, (a, b) in enumerate(zip(new, old, strict=True)) if a["hash"] != b["hash"]]
    assert changed == [i for i in range(14) if old[i]["status"] == "ok" and max(old[i]["width"], old[i]["height"]) > 40]
    for i in changed:
        a, b, pixels = new[i], old[i], decode(read[new[i]["path"]].image)
        assert pixels.shape == (a["height"], a["width"], 3)
        scale = 40 / max(b["width"], b["height"])
        assert (a["width"], a["height"]) == (round(b["width"] * scale), round(b["height"] * scale))
        assert (a["format"], a["orientation"]) == ("JPEG", 1)
        assert a["bytes"] == len(read[a["path"]].image)
        factors = np.tile([a["width"] / b["width"], a["height"] / b["height"]], 2)
        np.testing.assert_allclose(a["label"], np.array(b["label"]) * factors, rtol=1e-6)


def test_shrinking_is_antialiased_and_keeps_lossless_files_lossless(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose", count=2)
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # the finest there are: an aliased shrink shows them black or white
    for row, (kind, pixels) in enumerate((("PNG", stripes), ("JPEG", photo(256, 256, seed=3)))):
        (tmp_path / "loose" / f"a/{row:02}.jpg").write_bytes(encode(pixels, kind).tobytes())
    rows = manifest.rows.to_pydict()
    sizes = [(tmp_path / "loose" / path).stat().st_size for path in rows["path"]]
    wide = {"width": [256, 256], "height": [256, 256], "hash": [0, 0], "bytes": sizes}  # hash 0: not compared
    manifest = rebuilt(manifest, {**rows, **wide, "split": ["train", "valid"]})
    packed = pack(manifest, tmp_path / "packed", max_side_px=64, quality=95)
    assert packed.rows["format"].to_pylist() == ["PNG", "JPEG"]
    images = [decode(encoded.image).astype(float) for _, encoded in every(packed)]
    assert np.abs(images[0][:, 2:-2] - 127.5).max() < 6
    boxes = photo(256, 256, seed=3).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert psnr(images[1][None], boxes[None])[0] > 33


# What goes wrong while packing ------------------------------------------------------------------------------


def test_files_that_are_gone_or_changed_are_quarantined_and_taken_up_when_they_are_back(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    pack(manifest, tmp_path / "whole", shard_bytes=SMALL)
    kept = {name: (tmp_path / "loose" / name).read_bytes() for name in ("a/02.jpg", "a/11.jpg")}
    (tmp_path / "loose" / "a/02.jpg").unlink()
    (tmp_path / "loose" / "a/11.jpg").write_bytes(b"else")
    with pytest.raises(
        QuarantineError,
        match=r"2 files cannot be packed \(.*a/02.jpg: missing; .*a/11.jpg: changed.*the 1 that max_bad",
    ):
        pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    assert not (tmp_path / "packed" / "manifest.arrow").exists()
    packed = pack(manifest, tmp_path / "packed", shard_bytes=SMALL, max_bad=0.5)
    bad = {row["path"]: row["status"] for row in packed.quarantined().to_pylist()}
    assert bad.pop("a/09.jpg") == "not an image"
    assert bad == {"a/02.jpg": "missing", "a/11.jpg": "changed since it was indexed (it has 4 bytes now)"}
    assert packed.rows["split"].to_pylist()[2] is packed.rows["split"].to_pylist()[11] is None
    assert packed.fingerprint() != manifest.fingerprint()
    assert len(every(packed)) == 11
    for name, data in kept.items():
        (tmp_path / "loose" / name).write_bytes(data)
    pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_place_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    with pytest.raises(ShardError, match=r"holds 2 other files or folders \(a, masks\): .* give another DEST"):
        pack(manifest, tmp_path / "loose")
    pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    before = contents(tmp_path / "packed")
    with pytest.raises(ShardError, match=r"with another max_side_px, quality: the two would mix; give another DEST"):
        pack(manifest, tmp_path / "packed", shard_bytes=SMALL, max_side_px=20, quality=50)
    with pytest.raises(ShardError, match=r"was packed from another manifest"):
        pack(photos(tmp_path / "fewer", count=8), tmp_path / "packed", shard_bytes=SMALL)
    assert contents(tmp_path / "packed") == before


def test_images_that_were_never_looked_at_are_refused(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    unknown = rebuilt(manifest, {**manifest.rows.to_pydict(), "bytes": [None] * 14})
    with pytest.raises(ManifestError, match=r"13 images have no size .* index again"):
        pack(unknown, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


_KILLED = """
import os, signal, sys
from pathlib import Path
import thawline.dataio.store.atomic as atomic
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.reading.packing import pack

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

manifest, sync, save = Manifest.load(sys.argv[1]), atomic._sync, Manifest.save
for moment in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        kind, number = moment.split("-")
        calls = []
        def counted(path):
            calls.append(path)
            die() if kind == "sync" and len(calls) == int(number) else sync(path)
        def progress(done, total):
            die() if kind == "row" and done == int(number) else None
        def saved(*_):
            die() if kind == "save" else None
        atomic._sync, Manifest.save = counted, saved
        pack(manifest, Path(sys.argv[1]).parent / moment, shard_bytes=4000, progress=progress)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, moment
"""
_MOMENTS = ["sync-1", "sync-2", "row-2", "sync-3", "sync-4", "sync-5", "sync-6", "sync-9", "row-9", "sync-13", "save-0"]


@pytest.mark.slow
def test_a_pack_that_was_killed_goes_on_and_ends_as_if_it_had_not(tmp_path: Path) -> None:
    """Killed between any two steps that matter: what is synced, entered, moved into place."""
    manifest = photos(tmp_path / "loose")
    manifest.save(tmp_path / "m.arrow")
    pack(manifest, tmp_path / "whole", shard_bytes=SMALL)
    whole = contents(tmp_path / "whole")
    script = [sys.executable, "-c", _KILLED, str(tmp_path / "m.arrow"), *_MOMENTS]
    subprocess.run(script, cwd=provenance.HOME, check=True)
    stood = list[int]()
    for moment in _MOMENTS:
        dest = tmp_path / moment
        before = {file.name: file.stat() for file in dest.glob("shard-*")}
        assert all((dest / name).read_bytes() == whole[name] for name in before), f"half a shard after {moment}"
        assert not (dest / "manifest.arrow").exists()
        pack(manifest, dest, shard_bytes=SMALL)
        assert contents(dest) == whole, moment
        for name, status in before.items():
            after = (dest / name).stat()
            assert (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns), f"{name}: {moment}"
        stood.append(len(before))
    assert stood == sorted(stood)
    assert stood[0] == 0
    assert stood[-1] == len(list((tmp_path / "whole").glob("shard-*")))


def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")

    def limited(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limited(9000)  # the journal fits, a shard does not
    try:
        with pytest.raises(
            ShardError, match=r"packed cannot be written \(.*too large.*the shards there are complete.*goes on"
        ):
            pack(manifest, tmp_path / "packed")
    finally:
        limited(before)
    assert sorted(contents(tmp_path / "packed")) == ["pack.json"]
    assert len(pack(manifest, tmp_path / "packed").shards) == 1
