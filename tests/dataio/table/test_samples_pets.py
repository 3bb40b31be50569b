"""Do the pets arrive whole whatever breaks on the way? Against a real HTTP server on loopback with small archives."""

import re
import shlex
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchvision.datasets as datasets

from tests.kit.download_site import (
    ARCHIVES,
    BREEDS,
    CONTENTS,
    HALF,
    IMAGES,
    Site,
    assert_complete,
    expect,
    files_under,
    interrupted_download,
    md5,
)
from thawline.cluster.cli import main
from thawline.dataio.errors import SourceError
from thawline.dataio.samples import fetch_pets


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_everything_arrives_and_is_asked_for_once(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    folder = tmp_path / "deep" / "pets"
    images = fetch_pets(folder, progress=lambda *row: seen.append(row))
    assert images == folder / "oxford-iiit-pet" / "images"
    assert_complete(folder)
    assert [(answer.name, answer.range, answer.status) for answer in site.log] == [
        ("images.tar.gz", None, 200),
        ("annotations.tar.gz", None, 200),
    ]
    for name, data in ARCHIVES.items():
        rows = [row for row in seen if row[0] == name]
        assert rows == sorted(rows)
        assert rows[0] == (name, 0, len(data))
        assert rows[-1] == (name, len(data), len(data))
    loaded = datasets.OxfordIIITPet(folder, split="test")
    assert (len(loaded), loaded.classes) == (6, ["Abyssinian", "American Bulldog", "Yorkshire Terrier"])


def test_a_second_call_fetches_nothing_and_unpacks_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_pets(tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    site.log.clear()
    monkeypatch.setattr(datasets.utils, "extract_archive", None)
    assert fetch_pets(tmp_path) == tmp_path / "oxford-iiit-pet" / "images"
    for name in ARCHIVES:  # 0.8 GB that may go once they are unpacked
        (tmp_path / "oxford-iiit-pet" / name).unlink()
    fetch_pets(tmp_path)
    assert site.log == []
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.parent.name == "images"} == {
        file: stamp for file, stamp in stamps.items() if file.parent.name == "images"
    }


@pytest.mark.parametrize("versions", [True, False])
def test_a_wrong_checksum_removes_the_file_and_says_so(site: Site, tmp_path: Path, versions: bool) -> None:
    site.versions = versions
    interrupted_download(site, tmp_path)
    site.files["images.tar.gz"] = IMAGES[:HALF] + bytes(len(IMAGES) - HALF)
    with pytest.raises(SourceError, match=rf"came with md5 [0-9a-f]{{32}} instead of {md5(IMAGES)}.*was removed"):
        fetch_pets(tmp_path)
    assert files_under(tmp_path) == {}
    site.files["images.tar.gz"] = IMAGES
    fetch_pets(tmp_path)
    assert_complete(tmp_path)


def test_no_network_is_one_sentence_with_a_way_out(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, base = free_address(), tmp_path / "oxford-iiit-pet"
    expect(monkeypatch, dead)
    with pytest.raises(SourceError) as failure:
        fetch_pets(tmp_path)
    words = str(failure.value)
    assert f"{dead}/images.tar.gz cannot be fetched" in words
    assert "Connection refused" in words
    assert f"{base / 'images.tar.gz'} is missing" in words
    assert f"fetch {dead}/images.tar.gz and {dead}/annotations.tar.gz elsewhere and put them into {base}" in words
    assert "\n" not in words

    (base / "images.tar.gz").write_bytes(IMAGES[:-1])  # what the sentence asks for, not quite
    with pytest.raises(SourceError, match="is not the right file"):
        fetch_pets(tmp_path)
    for name, data in ARCHIVES.items():
        (base / name).write_bytes(data)
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.log == []


@pytest.mark.parametrize("kill_at", [0, 5, 12, 20], ids=["first image", "image", "first trimap", "trimap"])
def test_an_unpacking_that_was_killed_is_repaired(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    copied, copy = 0, tarfile.copyfileobj  # type: ignore[attr-defined]

    def killed(source: Any, target: Any, length: int, *rest: Any, **options: Any) -> None:
        nonlocal copied
        if copied == kill_at:
            target.write(source.read(length // 2))
            raise KeyboardInterrupt
        copied += 1
        copy(source, target, length, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch_pets(tmp_path)
    expected = CONTENTS["images.tar.gz"] | CONTENTS["annotations.tar.gz"]
    broken = [
        name for name, data in files_under(tmp_path / "oxford-iiit-pet").items() if expected.get(name, data) != data
    ]
    assert len(broken) == 1
    site.log.clear()
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.log == []


def test_a_folder_that_was_removed_is_unpacked_again(site: Site, tmp_path: Path) -> None:
    shutil.rmtree(fetch_pets(tmp_path))
    site.log.clear()
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.log == []


def test_a_full_disk_and_a_file_in_the_way_are_sentences(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=r"pets cannot go to .*oxford-iiit-pet \(Not a directory\)"):
        fetch_pets(tmp_path / "file")
    base = tmp_path / "full" / "oxford-iiit-pet"
    base.mkdir(parents=True)
    (base / "images.tar.gz.part").symlink_to("/dev/full")
    with pytest.raises(SourceError, match=r"No space left on device.*1\.7 GB free; what has come is kept"):
        fetch_pets(tmp_path / "full")


# --- the command


@pytest.fixture
def thawline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `thawline ARGUMENTS`, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["thawline", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_the_command_prints_the_folder_and_what_to_type_next(
    site: Site, tmp_path: Path, thawline: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my pets"
    code, out, err = thawline("sample", "pets", folder)
    images = folder / "oxford-iiit-pet" / "images"
    assert (code, out) == (0, f"{images}\n")
    lines = err.splitlines()
    total = len(IMAGES) / 1e6
    assert lines[0] == f"images.tar.gz: 0.0 of {total:,.1f} MB"
    assert f"images.tar.gz: {total:,.1f} of {total:,.1f} MB" in lines
    assert "\x1b" not in err
    assert lines[-1] == (f"next: thawline index '{images}' --label 'regex:(.+)_\\d+\\.jpg$' --out pets.parquet")
    verb, source, *options = shlex.split(lines[-1])[2:]
    assert (verb, source) == ("index", str(images))
    pattern = options[1].removeprefix("regex:")
    assert {found[1] for file in images.iterdir() if (found := re.search(pattern, file.name))} == set(BREEDS)


def test_a_terminal_gets_a_bar(
    site: Site, tmp_path: Path, thawline: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich's word for: take this for a terminal
    code, out, err = thawline("sample", "pets", tmp_path)
    assert (code, out) == (0, f"{tmp_path / 'oxford-iiit-pet' / 'images'}\n")
    assert "\x1b[" in err
    assert "annotations.tar.gz" in err
    assert " MB\n" not in err


def test_the_command_without_a_network_is_one_sentence(
    site: Site, tmp_path: Path, thawline: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, free_address())
    code, out, err = thawline("sample", "pets", tmp_path)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("thawline: http://127.0.0.1:")
