"""How does a test get a server that fails? A small pets data set on a site that cuts, resets and redirects."""

import hashlib
import io
import os
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as datasets
from PIL import Image

from thawline.dataio.samples import fetch_pets
from thawline.dataio.store import downloads

BREEDS = ("Abyssinian", "american_bulldog", "yorkshire_terrier")

EACH = 4


def contents(seed: int) -> dict[str, dict[str, bytes]]:
    """The files of the two archives, by path; noise, so that they remain large when packed."""
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
    for name, selected in (
        ("list", lines),
        ("trainval", [line for i, line in enumerate(lines) if i % EACH < half]),
        ("test", [line for i, line in enumerate(lines) if i % EACH >= half]),
    ):
        annotations[f"annotations/{name}.txt"] = "".join(selected).encode()
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
class LogLine:
    """One line of the server's log."""

    name: str
    range: str | None
    status: int
    sent: int = 0


@dataclass
class Site:
    """The server's files, its faults, and its log."""

    files: dict[str, bytes]
    url: str = ""
    ranges: bool = True
    versions: bool = True
    statuses: list[int] = field(default_factory=list)
    """Responses to the next requests instead of the file; 0 is no response at all."""
    cuts: list[int] = field(default_factory=list)
    """Lengths in bytes at which the next bodies end."""
    reset: bool = False
    """Cut with a reset, not with an end of file."""
    log: list[LogLine] = field(default_factory=list)

    def sent(self, name: str) -> int:
        return sum(line.sent for line in self.log if line.name == name)


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Quiet: the tests read `site.log`."""

        def do_GET(self) -> None:
            name, requested_range = self.path.rsplit("/", 1)[-1], self.headers.get("Range")
            if self.path.startswith("/old/"):
                self.send_response(302)
                self.send_header("Location", f"{site.url}/{name}")
                self.end_headers()
                return
            if site.statuses or name not in site.files:
                status = site.statuses.pop(0) if site.statuses else 404
                site.log.append(LogLine(name, requested_range, status))
                if status == 0:
                    return
                self.send_response(status)
                self.end_headers()
                return
            data, start = site.files[name], 0
            same = self.headers.get("If-Range") in (None, f'"{md5(data)}"')
            if requested_range and site.ranges and same:
                start = int(requested_range.removeprefix("bytes=").removesuffix("-"))
            line = LogLine(name, requested_range, 416 if start >= len(data) else 206 if start else 200)
            site.log.append(line)
            self.send_response(line.status)
            if line.status == 416:
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
            line.sent = len(body)
            self.wfile.write(body)
            if site.reset and start + len(body) < len(data):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())  # at once: the server would otherwise end the stream properly

    return Handler


CONTENTS = contents(seed=0)

ARCHIVES = {name: packed(files) for name, files in CONTENTS.items()}

IMAGES = ARCHIVES["images.tar.gz"]

HALF = len(IMAGES) // 2


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server with the two archives, from which torchvision downloads as if from Oxford; no proxy, no waiting."""
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


def files_under(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_complete(folder: Path) -> None:
    base = folder / "oxford-iiit-pet"
    unpacked = files_under(base)
    unpacked.pop(".unpacked")
    assert unpacked == ARCHIVES | CONTENTS["images.tar.gz"] | CONTENTS["annotations.tar.gz"]


def interrupt_after(count_bytes: int) -> Callable[[str, int, int | None], None]:
    """A progress callback that ends the program as Ctrl-C does."""

    def progress(name: str, done: int, total: int | None) -> None:
        if done >= count_bytes:
            raise KeyboardInterrupt

    return progress


def interrupted_download(site: Site, folder: Path) -> int:
    """Leave an incomplete archive of images in the folder; return its length."""
    site.cuts = [HALF]
    with pytest.raises(KeyboardInterrupt):
        fetch_pets(folder, progress=interrupt_after(HALF))
    partial = folder / "oxford-iiit-pet" / "images.tar.gz.part"
    assert partial.read_bytes() == IMAGES[:HALF]
    site.log.clear()
    return HALF
