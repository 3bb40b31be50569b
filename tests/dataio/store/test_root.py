"""Is a place that only fsspec knows used as a folder is, and is a URI opened once? On fsspec's own memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from tests.kit.images import flat_manifest
from thawline.dataio.errors import SourceError
from thawline.dataio.labels.labels import by_parent, label
from thawline.dataio.reading.packing import pack
from thawline.dataio.reading.shards import check
from thawline.dataio.store import root as roots
from thawline.dataio.store.atomic import atomic_write
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Manifest
from thawline.dataio.table.sources import from_folder
from thawline.dataio.table.splits import by_folder, split
from thawline.trainer.checkpoints import checkpoint


@pytest.fixture
def memory() -> Iterator[str]:
    """The URI of an empty place in fsspec's memory."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    yield "memory://box/runs"
    fsspec.filesystem("memory").rm("/box", recursive=True) if fsspec.filesystem("memory").exists("/box") else None


def put(root: Root, name: str, data: bytes) -> None:
    with atomic_write(root, name) as sink:
        sink.write(data)


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    return Root.of(tmp_path / "runs" if request.param == "folder" else request.getfixturevalue("memory"))


def test_files_are_written_listed_read_moved_and_removed_as_in_a_folder(root: Root) -> None:
    put(root, "a #1.txt", b"one")
    put(root.child("in side"), "b.txt", b"three")
    put(root, "a #1.txt", b"two!")
    assert root.listing() == {"a #1.txt": 4, "in side": None}
    assert root.child("in side").read("b.txt") == b"three"
    assert Root.of(root.child("in side").text).read("b.txt") == b"three", "its text leads there, too"
    where, name = Root.holding(root.child("in side").full("b.txt"))
    assert (where.read(name), root.size("in side/b.txt"), root.size("in side")) == (b"three", 5, None)
    with root.open("in side/b.txt") as file:
        file.seek(2)
        assert file.read(2) == b"re"
    assert root.missing(["a #1.txt", "in side", "none"]) == ["in side", "none"]
    assert [root.exists(name) for name in ("in side", "none")] == [True, False]
    other = Root.of(f"{root}.old")
    root.move("in side", other)
    root.move("a #1.txt", other)
    assert (root.listing(), other.child("in side").listing()) == ({}, {"b.txt": 5})
    other.remove("in side")
    other.remove("none")
    assert other.listing() == {"a #1.txt": 4}
    with pytest.raises(FileNotFoundError):
        root.read("a #1.txt")


def test_a_file_that_is_not_finished_never_appears(root: Root) -> None:
    put(root, "a.txt", b"old")

    def interrupted() -> None:
        with atomic_write(root, "b.txt") as sink:
            sink.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert root.listing() == {"a.txt": 3}


def test_what_is_no_object_store_gets_its_files_by_a_move(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over SFTP, where a file is seen while it is written."""
    monkeypatch.setattr(roots, "_FSSPEC_OBJECT_STORES", frozenset())
    root = Root.of(memory)
    with atomic_write(root, "a.txt") as sink:
        sink.write(b"new")
        assert all(name.startswith(".a.txt.") for name in root.listing())
    assert root.listing() == {"a.txt": 3}


def test_checkpoints_of_a_place_that_fsspec_knows_are_those_that_were_written(memory: str) -> None:
    for step in (1, 2, 3):
        checkpoint.save(memory, step, {"model": {"w": torch.full((2,), float(step))}}, keep=2)
    saved, skipped = checkpoint.newest(memory)
    assert saved is not None
    assert (saved.step, saved.load("model")["w"].tolist(), skipped) == (3, [3.0, 3.0], [])
    assert sorted(Root.of(memory).listing()) == ["step_00000002", "step_00000003"]


def test_images_there_are_indexed_and_packed_as_those_on_disk(tmp_path: Path, memory: str) -> None:
    flat_manifest(tmp_path / "flat", train=6, valid=3)
    root = Root.of(memory)
    for file in (tmp_path / "flat").rglob("*.*"):
        put(root, file.relative_to(tmp_path / "flat").as_posix(), file.read_bytes())

    def indexed(place: str | Path) -> Manifest:
        return split(label(from_folder(place), by_parent()), by_folder("valid"))

    local, there = indexed(tmp_path / "flat"), indexed(memory)
    assert there.rows.to_pylist() == local.rows.to_pylist()
    packed = pack(there, "memory://box/packed", shard_bytes=4000)
    assert packed.shards == pack(local, tmp_path / "packed", shard_bytes=4000).shards
    loaded = Manifest.load("memory://box/packed/manifest.arrow")
    assert (loaded.fingerprint(), check(loaded)) == (local.fingerprint(), [])


def test_a_place_is_opened_once_for_all_that_lies_below(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = list[str](), pafs.FileSystem.from_uri

    class Counting:
        @staticmethod
        def from_uri(uri: str) -> Any:
            opened.append(uri)
            return real(uri)

    monkeypatch.setattr("thawline.dataio.store.root.pafs.FileSystem", Counting)
    root = Root.of(f"{memory}/once")
    assert opened == [], "a name alone opens nothing"
    for i in range(20):
        put(root.child(f"step_{i}"), "model.pt", b"x")
        assert root.child(f"step_{i}").read("model.pt") == b"x"
    assert opened == [f"{memory}/once"]


@pytest.mark.parametrize("uri", ["s3://me:secret@bucket/a", "abfs://box/a?account_key=secret", "memory://a?Token=b"])
def test_a_secret_in_a_uri_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(SourceError, match=r"carries a .* written into manifests and logs") as raised:
        Root.of(uri)
    assert "secret" not in str(raised.value)


def test_a_scheme_that_neither_knows_is_told() -> None:
    with pytest.raises(SourceError, match=r"nonesuch://a/b cannot be opened .*give a folder, or a URI"):
        Root.of("nonesuch://a/b").listing()
