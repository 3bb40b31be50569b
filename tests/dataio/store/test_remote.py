"""Is a data set in an object store the same as on disk? Against a real S3 interface on loopback (moto's server)."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kit.images import first, flat_manifest
from tests.kit.packs import SMALL, loader, photos
from thawline.dataio.errors import ShardError, SourceError
from thawline.dataio.labels.labels import by_parent, label
from thawline.dataio.reading.packing import pack
from thawline.dataio.reading.readers import FileReader
from thawline.dataio.reading.shards import check, open_reader
from thawline.dataio.store.root import Root
from thawline.dataio.stream.loader import ImageLoader
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import by_folder, split

pytest.importorskip("thawline.dataio.pixels.dali", reason="DALI is not installed")
pytest_plugins = ["tests.kit.stores"]


class Requests(logging.Handler):
    """What the server was asked for: lines such as 'GET /bucket/name'."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP", record.getMessage())
        if found:
            self.lines.append(" ".join(found.groups()))

    def gets(self, words: str) -> list[str]:
        return [line for line in self.lines if line.startswith("GET") and words in line]


@pytest.fixture
def asked() -> Iterator[Requests]:
    log, handler = logging.getLogger("werkzeug"), Requests()
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


def upload(folder: Path, root: str) -> None:
    filesystem, base = Root.of(root).opened
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with filesystem.open_output_stream(f"{base}/{file.relative_to(folder).as_posix()}") as out:
                out.write(file.read_bytes())


def at(manifest: Manifest, root: str) -> Manifest:
    """The same manifest with its files elsewhere."""
    return Manifest(manifest.rows, root, manifest.task, manifest.classes, manifest.values)


def assert_same(one: ImageLoader, other: ImageLoader) -> None:
    for a, b in zip(first(one, 5), first(other, 5), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
    assert not one.quarantined
    assert not other.quarantined
    one.close()
    other.close()


def test_a_folder_in_a_store_is_listed_verified_and_split_as_one_on_disk(tmp_path: Path, s3: str) -> None:
    flat_manifest(tmp_path, train=6, valid=3)
    (tmp_path / "train" / "broken.jpg").write_bytes(b"no image")
    upload(tmp_path, s3.format("flat"))

    def indexed(root: str | Path) -> Manifest:
        return split(label(from_folder(root), by_parent()), by_folder("valid"))

    local, remote = indexed(tmp_path), indexed(s3.format("flat"))
    assert remote.root == s3.format("flat")
    assert remote.rows.to_pylist() == local.rows.to_pylist()
    assert remote.rows.num_rows == 10
    assert [row["path"] for row in remote.quarantined().to_pylist()] == ["train/broken.jpg"]
    assert remote.fingerprint() == local.fingerprint()
    remote.check_paths()


@pytest.mark.parametrize(("task", "engine"), [("single_label", "dali"), ("mask", "reference")])
def test_loose_files_in_a_store_train_as_those_on_disk(tmp_path: Path, s3: str, task: str, engine: str) -> None:
    manifest = photos(tmp_path / "loose", task=task)
    upload(tmp_path / "loose", s3.format("loose"))
    remote = at(manifest, s3.format("loose"))
    for which in ("train", "valid"):
        local = loader(manifest, FileReader(Root.of(manifest.root), masks=task == "mask"), engine=engine, split=which)
        assert_same(local, loader(remote, open_reader(remote), engine=engine, split=which))


@pytest.mark.parametrize(("task", "engine"), [("single_label", "dali"), ("mask", "reference")])
def test_shards_in_a_store_train_as_files_on_disk(
    tmp_path: Path, s3: str, task: str, engine: str, asked: Requests
) -> None:
    manifest = photos(tmp_path / "loose", task=task)
    upload(tmp_path / "loose", s3.format("loose"))
    pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    remote = pack(at(manifest, s3.format("loose")), s3.format("packed"), shard_bytes=SMALL)
    assert len(remote.shards) > 3
    assert remote.home == s3.format("packed")
    remote.check_paths()
    assert check(remote) == []
    filesystem, base = Root.of(s3.format("packed")).opened
    for shard in remote.shards:  # from a store or from a disk, to a store or to a disk
        with filesystem.open_input_stream(f"{base}/{shard.name}") as stream:
            assert stream.read() == (tmp_path / "packed" / shard.name).read_bytes()
    asked.lines.clear()
    cache = tmp_path / "cache"
    for which in ("train", "valid"):
        local = loader(manifest, FileReader(Root.of(manifest.root), masks=task == "mask"), engine=engine, split=which)
        assert_same(local, loader(remote, open_reader(remote, cache=cache), engine=engine, split=which))
    assert len(asked.gets("/packed/shard-")) == len(remote.shards)  # each once, for two loaders
    assert not asked.gets("/loose/")


def test_a_manifest_is_loaded_from_where_it_was_packed(tmp_path: Path, s3: str) -> None:
    manifest = photos(tmp_path / "loose")
    pack(manifest, s3.format("packed"), shard_bytes=SMALL)
    loaded = Manifest.load(Root.of(s3.format("packed")).full("manifest.arrow"))
    assert loaded.home == s3.format("packed")
    assert loaded.fingerprint() == manifest.fingerprint()
    local = loader(manifest, FileReader(Root.of(manifest.root)))
    assert_same(local, loader(loaded, open_reader(loaded, cache=tmp_path / "cache")))


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_manifest_saved_to_a_store_is_loaded_again(tmp_path: Path, s3: str, ending: str) -> None:
    manifest = flat_manifest(tmp_path, train=6, valid=3)
    manifest.save(Root.of(s3.format("kept")).full(f"m.{ending}"))
    loaded = Manifest.load(Root.of(s3.format("kept")).full(f"m.{ending}"))
    assert loaded.home == s3.format("kept")
    assert loaded.rows.equals(manifest.rows)
    assert (loaded.root, loaded.classes, loaded.fingerprint()) == (
        manifest.root,
        manifest.classes,
        manifest.fingerprint(),
    )


def test_an_unfinished_pack_goes_on_in_a_store(
    tmp_path: Path, s3: str, asked: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = photos(tmp_path / "loose")
    dest = s3.format("packed")

    def interrupt(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(manifest, dest, shard_bytes=SMALL, progress=interrupt)
    stood = sorted(name for name, _ in Root.of(dest).walk())
    assert stood == ["pack.json", "shard-00000.arrow", "shard-00001.arrow"]
    asked.lines.clear()
    packed = pack(manifest, dest, shard_bytes=SMALL)
    written = {line.split("/")[-1].partition("?")[0] for line in asked.lines if line.startswith(("PUT", "POST"))}
    assert not written & set(stood[1:])
    local = pack(manifest, tmp_path / "packed", shard_bytes=SMALL)
    assert packed.shards == local.shards


def test_damage_in_a_store_is_found_by_check_and_on_the_way_here(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thawline.dataio.store.cache._WAITS_S", (0.0,))
    packed = pack(photos(tmp_path / "loose"), s3.format("packed"), shard_bytes=SMALL)
    filesystem, base = Root.of(s3.format("packed")).opened
    place = f"{base}/{packed.shards[1].name}"
    with filesystem.open_input_stream(place) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    with filesystem.open_output_stream(place) as out:
        out.write(bytes(data))
    (damage,) = check(packed)
    assert f"{packed.shards[1].name}?" in damage
    assert "xxh3_128" in damage
    with pytest.raises(ShardError, match=r"shard-00001.arrow.* cannot be fetched"):
        open_reader(packed, cache=tmp_path / "cache")
    filesystem.delete_file(place)
    (damage,) = check(packed)
    assert "(missing)" in damage


def test_a_store_that_is_not_there_is_told(tmp_path: Path, s3: str) -> None:
    with pytest.raises((ShardError, SourceError), match="nowhere"):
        pack(photos(tmp_path / "loose"), "s3://nowhere/packed?" + s3.partition("?")[2])
