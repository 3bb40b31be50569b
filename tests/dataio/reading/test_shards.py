"""Is a packed sample the bytes of its file, where they lie, and is damage told?"""

import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.images import first
from tests.kit.packs import SMALL, as_before, contents, every, loader, photos, rebuilt, wear
from thawline.benchmarks import shards as benchmark
from thawline.benchmarks.shards import sink
from thawline.cluster.cli import main
from thawline.dataio.errors import ShardError
from thawline.dataio.reading.packing import pack
from thawline.dataio.reading.readers import Encoded, FileReader
from thawline.dataio.reading.shards import check, open_reader
from thawline.dataio.store.root import Root
from thawline.dataio.stream.plan import Training
from thawline.dataio.table.manifest import Manifest

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")


@pytest.mark.parametrize("engine", ["dali", "reference"])
@pytest.mark.parametrize("task", ["single_label", "multi_label", "points", "mask"])
def test_streams_from_shards_and_from_files_are_the_same(tmp_path: Path, task: str, engine: str) -> None:
    manifest = photos(tmp_path / "loose", task=task)
    packed = pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    for split in ("train", "valid"):
        loose = loader(manifest, FileReader(Root.of(manifest.root), masks=task == "mask"), engine=engine, split=split)
        shards = loader(packed, open_reader(packed), engine=engine, split=split)
        for one, other in zip(first(loose, 5), first(shards, 5), strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.inputs, other.inputs)
            np.testing.assert_array_equal(one.targets.numpy(), other.targets.numpy())  # NaN equals NaN
        assert not loose.quarantined
        assert not shards.quarantined
        loose.close()
        shards.close()


# Reading ----------------------------------------------------------------------------------------------------


def mapped(file: Path) -> list[tuple[int, int]]:
    """Where this process has mapped a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [line[0].split("-") for line in lines]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_records_lie_in_the_mapped_file_and_nothing_is_copied(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose", task="mask", side=300)
    packed = pack(manifest, tmp_path / "packed", shard_bytes=100_000)
    reader = open_reader(packed)
    part = packed.subset("train")
    rows = part.take(np.arange(len(part)))
    (places,) = {len(mapped(tmp_path / "packed" / shard.name)) for shard in packed.shards}
    assert places == 0  # nothing is mapped before it is asked for
    tracemalloc.start()
    read = [reader.read(rows, i) for i in range(len(rows))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = [mapped(tmp_path / "packed" / shard.name) for shard in packed.shards]
    for number, encoded in zip(rows.numbers, read, strict=True):
        assert isinstance(encoded, Encoded)
        k = int(np.searchsorted([shard.first for shard in packed.shards], number, side="right")) - 1
        for array in (encoded.image, encoded.mask):
            assert array is not None
            address = array.__array_interface__["data"][0]
            assert any(low <= address and address + len(array) <= high for low, high in held[k])
            assert not array.flags.writeable
    assert sum(len(e.image) for e in read if isinstance(e, Encoded)) > 5 * peak
    kept = read[0]
    reader.close()
    assert isinstance(kept, Encoded)
    assert kept.image.tobytes() == (tmp_path / "loose" / rows.paths[0]).read_bytes()  # after its reader closed


def test_threads_read_the_same(tmp_path: Path) -> None:
    packed = pack(photos(tmp_path / "loose"), tmp_path / "packed", shard_bytes=SMALL)
    expected = [encoded.image.tobytes() for _, encoded in every(packed)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            reader, part = open_reader(packed), packed.subset("train")  # all at once map what nobody has mapped
            rows = part.take(np.arange(len(part)))
            read = list(pool.map(lambda i, rows=rows, reader=reader: reader.read(rows, i), range(len(rows))))
            assert [encoded.image.tobytes() for encoded in read] == expected[: len(read)]


def test_a_row_without_bytes_is_a_reason(tmp_path: Path) -> None:
    manifest = photos(tmp_path / "loose")
    packed = pack(manifest, tmp_path / "packed")
    rows = packed.rows.to_pydict()
    rows["status"][9], rows["split"][9] = "ok", "train"  # was quarantined, so it has none
    table = rebuilt(packed, rows).rows
    reader = open_reader(packed)
    part = Manifest(table, packed.root, packed.task, packed.classes).subset("train")
    taken = part.take(np.searchsorted(part.rows, [9]))
    assert reader.read(taken, 0) == "it was not packed: its bytes are missing in the shard"
    assert reader.where(taken, 0) == f"{tmp_path}/packed/shard-00000.arrow: a/09.jpg"


def spoil(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(data[:-100])
    elif how == "flipped":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif how == "replaced":
        file.write_bytes(bytes(len(data)))
    elif how == "endless":  # a link to a device; a pipe would only hang
        file.unlink()
        file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "missing"),
        ("truncated", "bytes in place of"),
        ("flipped", "xxh3_128 is"),
        ("replaced", "xxh3_128 is"),
        ("endless", "not a regular file"),
    ],
)
def test_damage_is_found_by_check_and_mended_by_packing_again(tmp_path: Path, how: str, words: str) -> None:
    manifest = photos(tmp_path / "loose")
    packed = pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    whole = contents(tmp_path / "packed")
    others = {name: (tmp_path / "packed" / name).stat().st_ino for name in whole if name.startswith("shard")}
    seen = list[tuple[int, int]]()
    assert check(packed, progress=lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (sum(shard.bytes for shard in packed.shards),) * 2
    shard = packed.shards[2]
    spoil(tmp_path / "packed" / shard.name, how)
    (damage,) = check(packed)
    assert damage.startswith(f"{tmp_path}/packed/{shard.name} is damaged (")
    assert words in damage
    assert f"rows {shard.first} to {shard.first + shard.rows - 1}" in damage
    pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    assert contents(tmp_path / "packed") == whole
    for name in set(others) - {shard.name}:
        assert (tmp_path / "packed" / name).stat().st_ino == others[name]


def test_a_shard_that_is_not_what_was_packed_is_refused(tmp_path: Path) -> None:
    packed = pack(photos(tmp_path / "loose"), tmp_path / "packed", shard_bytes=SMALL)
    file = tmp_path / "packed" / packed.shards[0].name
    content = file.read_bytes()
    for how, words in (("truncated", r"has [\d,]+ bytes in place of [\d,]+"), ("missing", "is missing")):
        spoil(file, how)
        with pytest.raises(ShardError, match=rf"{file} {words}: .* pack again"):
            open_reader(packed)
        file.write_bytes(content)
    spoil(file, "replaced")
    with pytest.raises(ShardError, match=rf"{file} is not the shard that was packed .* pack again"):
        open_reader(packed)
    file.write_bytes(content)


# What cannot be trusted -------------------------------------------------------------------------------------


def packs(folder: Path, *, before: bool, **options: Any) -> tuple[Manifest, Manifest]:
    """A manifest, and its pack: `before`: as packs were before they kept checksums of their samples."""
    manifest = photos(folder / "loose", **options)
    packed = pack(manifest, folder / "packed", shard_bytes=SMALL)
    return manifest, as_before(packed) if before else packed


BEFORE = pytest.mark.parametrize("before", [False, True], ids=["now", "before"])


@BEFORE
@pytest.mark.parametrize("task", ["single_label", "mask"])
def test_packs_of_before_are_read_as_those_of_now(tmp_path: Path, before: bool, task: str) -> None:
    manifest, packed = packs(tmp_path, before=before, task=task)
    for (path, loose), (_, found) in zip(every(manifest), every(packed), strict=True):
        assert isinstance(found, Encoded), (path, found)
        if not path.endswith(".gif"):  # which became a PNG
            assert found.image.tobytes() == loose.image.tobytes()
        assert (found.mask is None) == (task != "mask")


@BEFORE
def test_the_shard_of_another_pack_is_refused_before_a_sample_is_read(
    tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = [pack(benchmark.make_files(tmp_path / "a", 24, 3000), tmp_path / "packed_a", shard_bytes=20_000)]
    monkeypatch.setattr(benchmark, "SEED", 7)  # other contents of the same names, sizes, ids and labels
    packed.append(pack(benchmark.make_files(tmp_path / "b", 24, 3000), tmp_path / "packed_b", shard_bytes=20_000))
    one, other = (as_before(each) for each in packed) if before else packed
    name = one.shards[1].name
    shutil.copy(Path(other.home, name), Path(one.home, name))
    with pytest.raises(ShardError, match=rf"packed_a/{name} holds other images than the manifest says .*; pack again"):
        open_reader(one)
    open_reader(other).close()


@BEFORE
@pytest.mark.parametrize("path", ["a/03.jpg", "a/05.gif"])  # as it was, and turned into a PNG
def test_a_worn_image_is_quarantined_as_a_worn_file_is(tmp_path: Path, before: bool, path: str) -> None:
    manifest, packed = packs(tmp_path, before=before, count=20)
    shard, file = wear(packed, path), tmp_path / "loose" / path
    file.write_bytes(file.read_bytes()[:-9])
    loose, worn = loader(manifest, FileReader(Root.of(manifest.root))), loader(packed, open_reader(packed))
    for one, other in zip(first(loose, 6), first(worn, 6), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.inputs, other.inputs)
    (told,) = worn.quarantined.values()
    assert told.startswith(f"{shard}: {path}: damaged since it was packed")
    assert told.endswith("; pack again")
    assert worn.quarantined.keys() == loose.quarantined.keys()


def test_a_worn_mask_is_a_reason(tmp_path: Path) -> None:
    _, packed = packs(tmp_path, before=False, task="mask")
    shard = Path(packed.home, packed.shards[0].name)
    data, mask = bytearray(shard.read_bytes()), (tmp_path / "loose/masks/01.png").read_bytes()
    data[data.find(mask) + len(mask) // 2] ^= 1
    shard.write_bytes(data)
    assert "its mask was damaged since it was packed" in dict(every(packed))["a/01.jpg"]


@pytest.mark.parametrize("how", ["truncated", "emptied", "missing", "of another pack", "replaced"])
def test_a_shard_that_is_spoilt_while_it_is_mapped_is_told_and_not_touched(tmp_path: Path, how: str) -> None:
    """Whoever reads a mapped page that the file has no more is killed (SIGBUS)."""
    _, packed = packs(tmp_path, before=False)
    shard, reader, part = Path(packed.home, packed.shards[0].name), open_reader(packed), packed.subset("train")
    rows = part.take(np.arange(1))
    assert isinstance(reader.read(rows, 0), Encoded)
    if how == "emptied":
        os.truncate(shard, 0)
    elif how == "of another pack":
        data = bytearray(shard.read_bytes())
        hashes = np.array(packed.rows["hash"].slice(0, 2).to_pylist(), np.uint64).tobytes()
        data[data.find(hashes)] ^= 1
        shard.write_bytes(data)
    else:
        spoil(shard, how)
    with pytest.raises(ShardError, match=rf"{shard} (has|is|holds) .*; pack again|{shard} is not .* pack again"):
        reader.read(rows, 0)


def test_a_shard_that_is_copied_over_itself_or_touched_is_read_on(tmp_path: Path) -> None:
    _, packed = packs(tmp_path, before=False)
    shard, reader, part = Path(packed.home, packed.shards[0].name), open_reader(packed), packed.subset("train")
    rows = part.take(np.arange(1))
    held = reader.read(rows, 0)
    shutil.copy(shard, tmp_path / "copy")
    for change in (lambda: os.utime(shard), lambda: (tmp_path / "copy").replace(shard)):
        change()
        again = reader.read(rows, 0)
        assert isinstance(held, Encoded)
        assert isinstance(again, Encoded)
        assert again.image.tobytes() == held.image.tobytes()


# The command line -------------------------------------------------------------------------------------------

Thawline = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def thawline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, str, str]]:
    def run(*words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["thawline", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_pack_prints_the_manifest_to_train_on_and_check_tells_damage(tmp_path: Path, thawline: Thawline) -> None:
    manifest = photos(tmp_path / "loose", count=6)
    manifest.save(tmp_path / "m.parquet")
    words = ["pack", str(tmp_path / "m.parquet"), str(tmp_path / "packed")]
    code, out, err = thawline(*words, "--max-side-px", "30", "--quality", "80", "--shard-mib", "1")
    assert (code, out) == (0, f"{tmp_path}/packed/manifest.arrow\n")
    assert f"1 shards, {(tmp_path / 'packed/shard-00000.arrow').stat().st_size:,} bytes" in err
    packed = Manifest.load(out.strip())
    assert max(packed.rows["width"].to_pylist()) == 30
    assert manifest.rows["width"].to_pylist()[0] > 30
    code, out, err = thawline(*words, "--check")
    assert (code, out, err.split()[-1]) == (0, "", "whole")
    spoil(tmp_path / "packed/shard-00000.arrow", "flipped")
    code, out, err = thawline(*words, "--check")
    assert (code, out) == (1, "")
    assert "shard-00000.arrow is damaged (its xxh3_128 is" in err
    code, _, err = thawline("pack", str(tmp_path / "m.parquet"), str(tmp_path / "loose"), "--check")
    assert code == 1
    assert "no manifest at" in err


# The benchmark ----------------------------------------------------------------------------------------------


def test_the_benchmark_feeds_the_plans_files_and_dali_takes_them(tmp_path: Path) -> None:
    loose = benchmark.make_files(tmp_path / "loose", 24, 3000)
    packed = pack(loose, tmp_path / "packed", shard_bytes=20_000)
    plan, names = Training(n=24, global_batch=7, seed=benchmark.SEED), loose.rows["path"].to_pylist()
    following = benchmark.batches(packed, batch=7)
    for step in range(5):
        expected = [(tmp_path / "loose" / names[i]).read_bytes() for i in plan.at(plan.positions(step))[1]]
        assert [array.tobytes() for array in following()] == expected
    for touch in (False, True):
        assert sink(benchmark.batches(packed, batch=7), batch=7, touch=touch)() == 7
    before = os.sched_getaffinity(0)
    with benchmark.one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    assert benchmark.rss_anon_bytes() > 10 << 20
