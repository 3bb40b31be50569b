"""Is a damaged checkpoint ever loaded? Every way of spoiling one that we could think of, and the one before it."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from thawline.dataio.store.root import Root
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.format import FORMAT, Saved
from thawline.trainer.errors import CheckpointError

GOOD, SPOILT = 3, 7
NAMES = ("model.pt", "state.pt", "manifest.json")
Damage = Callable[[Path, Path], None]
"""Spoils the second folder, the newest; the first is the good one before it."""


@cache
def parts(step: int) -> dict[str, dict[str, Any]]:
    """A network with BatchNorm, its optimiser after two steps, rows: what a run saves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
            optimizer.step()
    state = {"progress": {"step": step, "stream_hash": "ab"}, "rows": [{"loss": 0.5}], "scaler": {}}
    return {"model": model.state_dict(), "state": {**state, "optimizer": optimizer.state_dict()}}


def same(one: Any, other: Any) -> bool:
    """Equal in structure, type and every bit of every tensor."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


# The ways -------------------------------------------------------------------------------------------------


def truncate(name: str, share: float, good: Path, spoilt: Path) -> None:
    data = (spoilt / name).read_bytes()
    (spoilt / name).write_bytes(data[: int(share * len(data)) if share < 1 else len(data) - 1])


def flip(name: str, seed: int, good: Path, spoilt: Path) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray((spoilt / name).read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (spoilt / name).write_bytes(data)


def zero(name: str, tail: int, good: Path, spoilt: Path) -> None:
    """As a file system that was cut off leaves it: the length is right, the end is zeros."""
    data = (spoilt / name).read_bytes()
    (spoilt / name).write_bytes(data[:-tail] + bytes(tail))


def append(name: str, good: Path, spoilt: Path) -> None:
    (spoilt / name).write_bytes((spoilt / name).read_bytes() + b"\n")


def remove(name: str, good: Path, spoilt: Path) -> None:
    (spoilt / name).unlink()


def remove_folder(good: Path, spoilt: Path) -> None:
    shutil.rmtree(spoilt)
    spoilt.mkdir()


def file_for_folder(good: Path, spoilt: Path) -> None:
    shutil.rmtree(spoilt)
    spoilt.write_text("a checkpoint, once")


def from_good(names: tuple[str, ...], good: Path, spoilt: Path) -> None:
    for name in names:
        shutil.copy(good / name, spoilt / name)


def swap(one: str, other: str, good: Path, spoilt: Path) -> None:
    (spoilt / one).rename(spoilt / "held")
    (spoilt / other).rename(spoilt / one)
    (spoilt / "held").rename(spoilt / other)


def folder_for_file(name: str, good: Path, spoilt: Path) -> None:
    (spoilt / name).unlink()
    (spoilt / name).mkdir()


def link(name: str, target: str, good: Path, spoilt: Path) -> None:
    (spoilt / name).unlink()
    (spoilt / name).symlink_to(target)


def link_for_folder(good: Path, spoilt: Path) -> None:
    shutil.rmtree(spoilt)
    spoilt.symlink_to(spoilt.name)


def link_to_good(good: Path, spoilt: Path) -> None:
    shutil.rmtree(spoilt)
    spoilt.symlink_to(good)


def pipe(name: str, good: Path, spoilt: Path) -> None:
    (spoilt / name).unlink()
    os.mkfifo(spoilt / name)


def manifest(data: bytes, good: Path, spoilt: Path) -> None:
    (spoilt / "manifest.json").write_bytes(data)


def edit(change: Callable[[str], str], good: Path, spoilt: Path) -> None:
    file = spoilt / "manifest.json"
    before = file.read_text()
    file.write_text(change(before))
    assert file.read_text() != before


def enlarge(good: Path, spoilt: Path) -> None:
    os.truncate(spoilt / "manifest.json", 1 << 42)


def recode(good: Path, spoilt: Path) -> None:
    file = spoilt / "manifest.json"
    file.write_bytes(file.read_text().encode("utf-16"))


def forge(change: Callable[[dict[str, Any]], object], good: Path, spoilt: Path) -> None:
    """A manifest with right sums over wrong content, as no accident makes it."""
    about = json.loads((spoilt / "manifest.json").read_text())
    del about["sha256"]
    change(about)
    digest = hashlib.sha256(json.dumps(about, indent=1).encode()).hexdigest()
    (spoilt / "manifest.json").write_text(json.dumps({**about, "sha256": digest}, indent=1) + "\n")


def replace_part(name: str, data: bytes, good: Path, spoilt: Path) -> None:
    """Other bytes under a right size and sum."""
    (spoilt / f"{name}.pt").write_bytes(data)
    forge(
        lambda about: about["parts"][name].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
        good,
        spoilt,
    )


class Trap:
    """Pickles to a call of `spring`."""

    calls = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (spring, ())


def spring() -> int:
    Trap.calls += 1
    return Trap.calls


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name in names:
            out.writestr(name, b"nothing")
    return buffer.getvalue()


def old_format(good: Path, spoilt: Path) -> None:
    sums = {name: hashlib.sha256((spoilt / name).read_bytes()).hexdigest() for name in NAMES[:2]}
    (spoilt / "manifest.json").write_text(json.dumps({"format": 1, "step": SPOILT, "sha256": sums}, indent=1))


DAMAGES: dict[str, Damage] = {
    **{f"{name} cut at {share}": partial(truncate, name, share) for name in NAMES for share in (0, 0.01, 0.5, 1)},
    **{f"{name} with bit {seed} flipped": partial(flip, name, seed) for name in NAMES for seed in range(12)},
    **{f"{name} ends in {tail} zeros": partial(zero, name, tail) for name in NAMES for tail in (8, 20, 200)},
    **{f"{name} is longer": partial(append, name) for name in NAMES},
    **{f"{name} removed": partial(remove, name) for name in NAMES},
    **{f"{name} is a folder": partial(folder_for_file, name) for name in NAMES},
    **{f"{name} links to itself": partial(link, name, name) for name in NAMES},
    **{f"{name} links to nothing": partial(link, name, "/nowhere/at/all") for name in NAMES},
    **{f"{name} links to endless zeros": partial(link, name, "/dev/zero") for name in NAMES},
    **{f"{name} is a pipe": partial(pipe, name) for name in NAMES},
    **{f"{name} is the good one's": partial(from_good, (name,)) for name in NAMES},
    **{f"{' and '.join(names)} are the good one's": partial(from_good, names) for names in (NAMES[:2], NAMES[1:])},
    "all files are the good one's": partial(from_good, NAMES),
    "the folder is empty": remove_folder,
    "the folder is a file": file_for_folder,
    "the folder links to itself": link_for_folder,
    "the folder links to the good one": link_to_good,
    "the parts have changed names": partial(swap, "model.pt", "state.pt"),
    "a part and the manifest have changed names": partial(swap, "model.pt", "manifest.json"),
    **{
        f"the manifest is {data!r}": partial(manifest, data)
        for data in (b"{}", b"[]", b"null", b"7", b'"step_00000007"', b"{", b"\xff\xfe\x00", b"\x00" * 64, b"NaN")
    },
    "the manifest is nested a million deep": partial(manifest, b"[" * 1_000_000),
    "the manifest is larger than memory": enlarge,
    "the manifest is UTF-16": recode,
    "the manifest has a byte order mark": partial(edit, lambda text: "\ufeff" + text),
    "the manifest is on one line": partial(edit, lambda text: json.dumps(json.loads(text))),
    "the manifest has a key twice": partial(edit, lambda text: text.replace('"step": 7', '"step": 3,\n "step": 7')),
    "the manifest has another step": partial(edit, lambda text: text.replace('"step": 7', '"step": 3')),
    "the manifest has another metric": partial(edit, lambda text: text.replace("0.125", "0.025")),
    "the manifest has another sum": partial(edit, lambda text: text.replace('"sha256": "', '"sha256": "0', 1)),
    "the manifest has a number of 9,999 digits": partial(edit, lambda text: text.replace("7", "7" * 9999, 1)),
    "the manifest has an infinite number": partial(edit, lambda text: text.replace('"step": 7', '"step": 1e999')),
    "the format before this one": old_format,
    "a newer format": partial(forge, lambda about: about.update(format=FORMAT + 1)),
    "no format": partial(forge, lambda about: about.pop("format")),
    "another step, with a right sum": partial(forge, lambda about: about.update(step=9)),
    "a step in words, with a right sum": partial(forge, lambda about: about.update(step="seven")),
    "a step and a half, with a right sum": partial(forge, lambda about: about.update(step=7.5)),
    "no step, with a right sum": partial(forge, lambda about: about.pop("step")),
    "no parts, with a right sum": partial(forge, lambda about: about.update(parts={})),
    "parts in a list, with a right sum": partial(forge, lambda about: about.update(parts=["model"])),
    "a part that is nowhere, with a right sum": partial(
        forge, lambda about: about["parts"].update(ema={"file": "ema.pt", "bytes": 3, "sha256": ""})
    ),
    "a part elsewhere, with a right sum": partial(
        forge, lambda about: about["parts"]["model"].update(file=f"../step_{GOOD:08d}/model.pt")
    ),
    "a part with a field too many, with a right sum": partial(
        forge, lambda about: about["parts"]["model"].update(device="cuda")
    ),
    "code, with a right sum": partial(replace_part, "model", saved({"w": Trap()})),
    "code in a plain pickle, with a right sum": partial(replace_part, "model", pickle.dumps({"w": Trap()})),
    "a list, with a right sum": partial(replace_part, "model", saved([torch.ones(2)])),
    "a tensor, with a right sum": partial(replace_part, "state", saved(torch.ones(2))),
    "no bytes, with a right sum": partial(replace_part, "model", b""),
    "text, with a right sum": partial(replace_part, "model", b"weights\n"),
    "another archive, with a right sum": partial(replace_part, "model", archive(["a.txt"])),
    "an archive with nothing in its places, with a right sum": partial(
        replace_part, "model", archive(["x/data.pkl", "x/version", "x/byteorder", "x/data/0"])
    ),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3 and 7."""
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (GOOD, SPOILT):
        checkpoint.save(root, step, parts(step), keep=2, metrics={"error_rate": 0.125})
    return root


def test_there_are_at_least_fifty_ways() -> None:
    assert len(DAMAGES) >= 50


@pytest.mark.parametrize("way", DAMAGES)
def test_what_is_damaged_is_never_loaded_and_the_one_before_it_is(tmp_path: Path, pristine: Path, way: str) -> None:
    root = shutil.copytree(pristine, tmp_path / "checkpoints")
    DAMAGES[way](root / f"step_{GOOD:08d}", root / f"step_{SPOILT:08d}")
    found, skipped = checkpoint.newest(root)
    assert found is not None
    if found.step == SPOILT:  # its sums are right: only reading it finds out
        assert "right sum" in way
        name = next(name for name in found.parts if not loads(found, name))
        with pytest.raises(CheckpointError, match=rf"{name}\.pt cannot be read \(.+\): .* remove .*step_00000007"):
            found.load(name)
        shutil.rmtree(root / f"step_{SPOILT:08d}")  # as the message asks
        found, skipped = checkpoint.newest(root)
        assert found is not None
        assert skipped == []
    else:
        assert [each.name for each in skipped] == [f"step_{SPOILT:08d}"]
        assert len(skipped[0].reason) > 10
    assert found.step == GOOD
    assert {name: same(found.load(name), part) for name, part in parts(GOOD).items()} == {"model": True, "state": True}
    assert Trap.calls == 0


def loads(found: Saved, name: str) -> bool:
    try:
        found.load(name)
    except CheckpointError:
        return False
    return True


def test_both_damaged_are_both_named_and_none_is_loaded(tmp_path: Path, pristine: Path) -> None:
    root = shutil.copytree(pristine, tmp_path / "checkpoints")
    one, other = (root / f"step_{step:08d}/model.pt" for step in (GOOD, SPOILT))
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    found, skipped = checkpoint.newest(root)
    assert found is None
    assert [(each.name, each.reason) for each in skipped] == [
        (f"step_{step:08d}", "model.pt changed since it was written") for step in (SPOILT, GOOD)
    ]


def test_every_bit_of_a_manifest_counts(tmp_path: Path, pristine: Path) -> None:
    root = shutil.copytree(pristine, tmp_path / "checkpoints")
    file = root / f"step_{SPOILT:08d}/manifest.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        found, _ = checkpoint.newest(root)
        assert found is not None
        assert found.step == GOOD, f"bit {bit % 8} of byte {bit // 8}"


def test_a_file_that_the_manifest_does_not_list_is_not_read_and_does_no_harm(tmp_path: Path, pristine: Path) -> None:
    root = shutil.copytree(pristine, tmp_path / "checkpoints")
    (root / f"step_{SPOILT:08d}/extra.pt").write_bytes(saved({"w": Trap()}))
    found, skipped = checkpoint.newest(root)
    assert (found and found.step, skipped) == (SPOILT, [])
    assert found is not None
    assert same(found.load("model"), parts(SPOILT)["model"])
    with pytest.raises(CheckpointError, match=r"extra\.pt cannot be read \(its manifest lists no part extra\)"):
        found.load("extra")
    assert Trap.calls == 0


def test_what_changes_after_it_was_found_is_loaded_as_it_was_found(tmp_path: Path, pristine: Path) -> None:
    """Its bytes were read, once, to be checked, and those are what is loaded."""
    root = shutil.copytree(pristine, tmp_path / "checkpoints")
    found, _ = checkpoint.newest(root)
    assert found is not None
    flip("model.pt", 1, root, root / f"step_{SPOILT:08d}")
    assert same(found.load("model"), parts(SPOILT)["model"])


def test_a_file_that_the_disk_cannot_read_is_skipped(
    tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Root.read

    def fail(root: Root, name: str) -> bytes:
        if (root.folder.name, name) == (f"step_{SPOILT:08d}", "state.pt"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(root, name)

    monkeypatch.setattr(Root, "read", fail)
    found, skipped = checkpoint.newest(pristine)
    assert (found and found.step) == GOOD
    assert [each.reason for each in skipped] == ["it cannot be read (Input/output error)"]
