"""Do the pets arrive whole whatever breaks on the way? Against a real HTTP server on loopback with small archives."""

import hashlib
import io
import os
import re
import shlex
import shutil
import socket
import struct
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as datasets
from PIL import Image

from thawline.cluster.cli import main
from thawline.dataio.errors import SourceError
from thawline.dataio.samples import fetch_pets
from thawline.dataio.store import downloads

BREEDS = ("Abyssinian", "american_bulldog", "yorkshire_terrier")
EACH = 4


def contents(seed: int) -> dict[str, dict[str, bytes]]:
    """What the two archives hold, by path; noise, so that they do not shrink to nothing when packed."""
    draw = np.random.default_rng(seed)
    images, annotations, lines = dict[str, bytes](), dict[str, bytes](), list[str]()
    for number, breed in enumerate(BREEDS, start=1):
        for index in range(1, EACH + 1):
            for files, name, kind, shape in (
                (images, f"images/{breed}_{index}.jpg", "JPEG", (60, 80, 3)),
                (annotations, f"annotations/trimaps/{breed}_{index}.png", "PNG", (60, 80)),
            ):
                stream = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(stream, kind)
                files[name] = stream.getvalue()
            lines.append(f"{breed}_{index} {number} {1 + (number > 1)} 1\n")
    half = EACH // 2
    for name, chosen in (
        ("list", lines),
        ("trainval", [line for i, line in enumerate(lines) if i % EACH < half]),
        ("test", [line for i, line in enumerate(lines) if i % EACH >= half]),
    ):
        annotations[f"annotations/{name}.txt"] = "".join(chosen).encode()
    return {"images.tar.gz": images, "annotations.tar.gz": annotations}


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass
class Answer:
    """One line of the server's log."""

    name: str
    range: str | None
    status: int
    sent: int = 0


@dataclass
class Site:
    """What the server has, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    url: str = ""
    ranges: bool = True
    versions: bool = True
    statuses: list[int] = field(default_factory=list)
    """Answered to the next requests instead of the file; 0 is no answer at all."""
    cuts: list[int] = field(default_factory=list)
    """The next bodies end after so many bytes."""
    reset: bool = False
    """Cut with a reset, not with an end of file."""
    log: list[Answer] = field(default_factory=list)

    def sent(self, name: str) -> int:
        return sum(answer.sent for answer in self.log if answer.name == name)


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Quiet: the tests read `site.log`."""

        def do_GET(self) -> None:
            name, asked = self.path.rsplit("/", 1)[-1], self.headers.get("Range")
            if self.path.startswith("/old/"):
                self.send_response(302)
                self.send_header("Location", f"{site.url}/{name}")
                self.end_headers()
                return
            if site.statuses or name not in site.files:
                status = site.statuses.pop(0) if site.statuses else 404
                site.log.append(Answer(name, asked, status))
                if status == 0:
                    return
                self.send_response(status)
                self.end_headers()
                return
            data, start = site.files[name], 0
            same = self.headers.get("If-Range") in (None, f'"{md5(data)}"')
            if asked and site.ranges and same:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            answer = Answer(name, asked, 416 if start >= len(data) else 206 if start else 200)
            site.log.append(answer)
            self.send_response(answer.status)
            if answer.status == 416:
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.end_headers()
                return
            if site.versions:
                self.send_header("ETag", f'"{md5(data)}"')
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            body = data[start : start + site.cuts.pop(0)] if site.cuts else data[start:]
            answer.sent = len(body)
            self.wfile.write(body)
            if site.reset and start + len(body) < len(data):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())  # at once: the server would end the stream properly first

    return Handler


CONTENTS = contents(seed=0)
ARCHIVES = {name: packed(files) for name, files in CONTENTS.items()}
IMAGES = ARCHIVES["images.tar.gz"]
HALF = len(IMAGES) // 2


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server with the two archives, which torchvision takes for Oxford's; no proxy, no waiting."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(downloads, "_FIRST_WAIT_S", 0.0)
    site = Site(dict(ARCHIVES))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(site))
    site.url = f"http://127.0.0.1:{server.server_port}"
    expect(monkeypatch, site.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def expect(monkeypatch: pytest.MonkeyPatch, url: str, archives: dict[str, bytes] = ARCHIVES) -> None:
    resources = tuple((f"{url}/{name}", md5(data)) for name, data in archives.items())
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", resources)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def files_under(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_complete(folder: Path) -> None:
    base = folder / "oxford-iiit-pet"
    found = files_under(base)
    found.pop(".unpacked")
    assert found == ARCHIVES | CONTENTS["images.tar.gz"] | CONTENTS["annotations.tar.gz"]


def interrupt_after(count_bytes: int) -> Callable[[str, int, int | None], None]:
    """A progress that ends the program as Ctrl-C does."""

    def progress(name: str, done: int, total: int | None) -> None:
        if done >= count_bytes:
            raise KeyboardInterrupt

    return progress


def interrupted_download(site: Site, folder: Path) -> int:
    """Leave a part of the images in the folder; return its length."""
    site.cuts = [HALF]
    with pytest.raises(KeyboardInterrupt):
        fetch_pets(folder, progress=interrupt_after(HALF))
    part = folder / "oxford-iiit-pet" / "images.tar.gz.part"
    assert part.read_bytes() == IMAGES[:HALF]
    site.log.clear()
    return HALF


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


def test_a_cut_connection_is_continued_and_no_byte_comes_twice(site: Site, tmp_path: Path) -> None:
    site.cuts = [HALF, 1000]
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    images = [answer for answer in site.log if answer.name == "images.tar.gz"]
    assert [(answer.range, answer.status) for answer in images] == [
        (None, 200),
        (f"bytes={HALF}-", 206),
        (f"bytes={HALF + 1000}-", 206),
    ]
    assert site.sent("images.tar.gz") == len(IMAGES)


def test_a_reset_connection_is_continued(site: Site, tmp_path: Path) -> None:
    site.reset, site.cuts = True, [HALF, 1000]
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert [answer.status for answer in site.log[1:3]] == [206, 206]  # what had been read before the reset was kept


def test_a_line_that_breaks_more_often_than_five_times_still_gets_there(site: Site, tmp_path: Path) -> None:
    site.cuts = [2000] * 12
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.sent("images.tar.gz") == len(IMAGES)


def test_an_interrupted_command_continues_where_it_broke_off(site: Site, tmp_path: Path) -> None:
    here = interrupted_download(site, tmp_path)
    seen: list[tuple[str, int, int | None]] = []
    fetch_pets(tmp_path, progress=lambda *row: seen.append(row))
    assert_complete(tmp_path)
    assert (site.log[0].range, site.log[0].status, site.log[0].sent) == (f"bytes={here}-", 206, len(IMAGES) - here)
    assert seen[0] == ("images.tar.gz", here, len(IMAGES))


def test_an_interruption_after_the_last_byte_fetches_nothing_again(site: Site, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch_pets(tmp_path, progress=interrupt_after(len(IMAGES)))
    site.log.clear()
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.log[0] == Answer("images.tar.gz", f"bytes={len(IMAGES)}-", 416)
    assert site.sent("images.tar.gz") == 0


def test_a_redirect_keeps_the_range(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = interrupted_download(site, tmp_path)
    expect(monkeypatch, f"{site.url}/old")
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.sent("images.tar.gz") == len(IMAGES) - here


def test_a_file_that_changed_at_the_server_starts_over(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = interrupted_download(site, tmp_path)
    newer = {name: packed(files) for name, files in contents(seed=1).items()}
    assert len(newer["images.tar.gz"]) > here
    site.files = newer
    expect(monkeypatch, site.url, newer)
    fetch_pets(tmp_path)
    assert (site.log[0].range, site.log[0].status) == (f"bytes={here}-", 200)
    assert (tmp_path / "oxford-iiit-pet" / "images.tar.gz").read_bytes() == newer["images.tar.gz"]
    assert (tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg").read_bytes() == (
        contents(seed=1)["images.tar.gz"]["images/Abyssinian_1.jpg"]
    )


def test_a_part_longer_than_the_file_starts_over(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "oxford-iiit-pet" / "images.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(IMAGES + b"more")
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert [answer.status for answer in site.log] == [416, 200, 200]


def test_a_server_that_cannot_continue_starts_over(site: Site, tmp_path: Path) -> None:
    interrupted_download(site, tmp_path)
    site.ranges = False
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert (site.log[0].status, site.log[0].sent) == (200, len(IMAGES))


def test_a_server_that_never_gets_further_is_given_up(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cuts = False, [HALF] * 20
    with pytest.raises(SourceError, match=rf"ended after {HALF:,} of {len(IMAGES):,} bytes\).*repeat the command"):
        fetch_pets(tmp_path)
    assert len(site.log) == 5


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.statuses = [0, 503, 429, 500]
    fetch_pets(tmp_path)
    assert_complete(tmp_path)


def test_a_file_that_is_gone_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    del site.files["images.tar.gz"]
    with pytest.raises(SourceError, match=r"images\.tar\.gz cannot be fetched \(404 Not Found\)"):
        fetch_pets(tmp_path)
    assert len(site.log) == 1


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
