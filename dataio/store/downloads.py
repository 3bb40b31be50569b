"""How is a large file downloaded over a network that breaks? Whole, checked, and no byte twice.

The part of NAME that has arrived lies beside it as NAME.part, and the version (the server's ETag or date) in
NAME.part.version. The next attempt, or the next call, asks for the rest if it is still that version; a server that
cannot continue, or has another version by now, sends the whole. Proxies are the environment's. Nothing is unpacked.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, build_opener

from thawline.dataio.errors import SourceError

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes that are here, and the bytes in all (None where the server does not say)."""

_ATTEMPTS = 5  # in a row without a further byte: a bad line may break as often as it likes otherwise
_FIRST_WAIT_S = 1.0  # before the second attempt; doubled before each one after it
_TIMEOUT_S = 30.0  # without a byte
_CHUNK_BYTES = 1 << 18


class Resource(NamedTuple):
    """A file to download."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


class _BrokenError(Exception):
    """An attempt failed. promising: the server responds, so another attempt may succeed."""

    def __init__(self, reason: object, *, promising: bool) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.promising = promising


def fetch(resources: Sequence[Resource], folder: Path, *, progress: Progress | None = None) -> None:
    """Download the files into a folder that exists; one that is there with the right md5 is skipped.

    Raises: SourceError when a file cannot be downloaded, or has another md5 than was given. OSError when it cannot be
    written; what has arrived is kept.
    """
    for resource in resources:
        file = folder / resource.name
        if file.is_file() and _md5(file) == resource.md5:
            continue
        part = file.with_name(f"{file.name}.part")
        try:
            _persist(resource, part, progress or (lambda name, done, total: None))
        except _BrokenError as broken:
            state = "is not the right file (its md5 differs)" if file.exists() else "is missing"
            raise SourceError(
                f"{resource.url} cannot be fetched ({broken}) and {file} {state}: nothing can be unpacked; check the "
                "network and repeat the command, which goes on where it broke off, or fetch "
                f"{' and '.join(each.url for each in resources)} elsewhere and put them into {folder}"
            ) from broken
        found = _md5(part)
        if found != resource.md5:
            part.unlink()
        else:
            part.replace(file)
        _version_file(part).unlink(missing_ok=True)
        if found != resource.md5:
            raise SourceError(
                f"{resource.url} came with md5 {found} instead of {resource.md5}: it is damaged or another file, and "
                f"was removed; repeat the command, or put the right one at {file}"
            )


def _persist(resource: Resource, part: Path, progress: Progress) -> None:
    best, failures, promising = -1, 0, False
    while True:
        try:
            return _attempt(resource, part, progress)
        except _BrokenError as broken:
            here = _size(part)
            failures = 1 if here > best else failures + 1
            best = max(best, here)
            promising = promising or broken.promising
            if not promising or failures == _ATTEMPTS:
                raise
        time.sleep(_FIRST_WAIT_S * 2 ** (failures - 1))


def _attempt(resource: Resource, part: Path, progress: Progress) -> None:
    """Request what is missing, and append it. Raises _BrokenError when it does not all arrive."""
    here = _size(part)
    request = Request(resource.url, headers={"User-Agent": "thawline"})
    if here:
        request.add_header("Range", f"bytes={here}-")
        version = _version_file(part)
        if version.is_file() and (word := version.read_text(encoding="utf-8")):
            request.add_header("If-Range", word)
    try:
        # not urlopen, whose opener keeps the proxies of the first call
        response = build_opener().open(request, timeout=_TIMEOUT_S)
    except HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{here}":
                return  # everything had arrived before the last interruption
            if error.code == 416:
                part.unlink()
            promising = error.code in (408, 416, 429) or error.code >= 500
            raise _BrokenError(f"{error.code} {error.reason}", promising=promising) from error
    except URLError as error:
        raise _BrokenError(error.reason, promising=False) from error  # no connection: no name, no route, refused
    except (OSError, HTTPException) as error:
        raise _BrokenError(error, promising=True) from error
    with response:
        _append(response, part, here, lambda done, total: progress(resource.name, done, total))


def _append(response: HTTPResponse, part: Path, here: int, progress: Callable[[int, int | None], None]) -> None:
    done, total = 0, _number(response.headers.get("Content-Length"))
    if response.status == 206:
        span, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        done, total = here, _number(whole)
        if _number(span.partition("-")[0]) != here:
            part.unlink()
            raise _BrokenError(f"it sent {span or 'an unknown part'}, not what follows {here}", promising=True)
    else:
        part.write_bytes(b"")  # first: the old bytes must never be taken for the new version
        _version_file(part).write_text(_version(response.headers), encoding="utf-8")
    with part.open("ab") as out:
        progress(done, total)
        for chunk in _chunks(response):
            out.write(chunk)
            done += len(chunk)
            progress(done, total)
    if total is not None and done != total:
        raise _BrokenError(f"the connection ended after {done:,} of {total:,} bytes", promising=True)


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The response's bytes as they arrive. Network errors become _BrokenError, to tell them from the disk's."""
    while True:
        try:
            chunk = response.read1(_CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise _BrokenError(error, promising=True) from error
        if not chunk:
            return
        yield chunk


def _version(headers: Message) -> str:
    """The value for If-Range: a strong ETag, else the date, else none."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
