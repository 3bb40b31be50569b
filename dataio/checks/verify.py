"""Which files cannot be used, why, and which decoder can read the others?

Every file is read once, hashed and decoded in full, by Pillow and by DALI: a bad file would otherwise fail in the
middle of a run. Where DALI decodes other pixels than Pillow, or none, or warns about the file, the codec is 'pillow':
such a file is usable, too, since readers transcode it. Nothing is deleted or changed; the reason goes into `status`.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from thawline.dataio.ahead import read_ahead
from thawline.dataio.cores import usable_cores
from thawline.dataio.errors import EngineError, SourceError
from thawline.dataio.labels.masks import MASK_CHECKS, count_values, why_lossy
from thawline.dataio.labels.targets import decode_mask
from thawline.dataio.pixels import probe
from thawline.dataio.pixels.pictures import (
    MAX_PIXELS,
    MOST_BYTES,
    MOST_PIXELS,
    check_pixels,
    hush_pillow,
    load,
    to_rgb,
    why_undecodable,
)
from thawline.dataio.store import files
from thawline.dataio.store.root import Root

CHECKS = pa.schema(
    {
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "hash": pa.uint64(),
        "format": pa.string(),
        "orientation": pa.int8(),
        "codec": pa.string(),
        "status": pa.string(),
    }
)

GROUP = 16
"""Files that a thread checks at once: few enough to stop soon, and no more than decoding.AT_ONCE."""

_ORIENTATION = 0x0112
_ROWS = 16_384  # rows of a table: as objects, millions of rows would fill the memory
_DALI_PX = 16_000_000  # in one call of DALI: every thread holds the pixels of both decoders, 3 bytes each
_LARGE_PX = 50_000_000  # larger images are decoded one at a time: Pillow holds up to three copies
_LEVELS = {"JPEG": 3, "MPO": 3}  # of 255, by which decoders may differ: builds of libjpeg round differently
_OTHER_LEVELS = 1

_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WEBP",
    b"\0\0\0\x0cjP": "JPEG2000",
    b"P7\n": "PAM",
}

_quiet, _large = threading.Lock(), threading.Lock()


@dataclass(slots=True)
class Check:
    """A row of `CHECKS` and `MASK_CHECKS`, see `check_files`; None is unknown."""

    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    hash: int | None = None
    format: str | None = None
    orientation: int | None = None
    codec: str | None = None
    status: str = "ok"
    mask_hash: int | None = None
    mask_values: list[int] | None = None
    mask_pixels: list[int] | None = None


def check_files(
    root: str | Path,
    paths: Sequence[str],
    *,
    masks: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Decode every file and return `CHECKS`, a row a path; with `masks`, one for each path, `MASK_CHECKS` as well.

    Width and height are in px and upright, `orientation` is EXIF's (1 to 8; 1 if it is missing or malformed), `hash`
    the xxh3_64 of the file's bytes, `format` Pillow's name, `codec` the decoder for later: 'dali' (which decodes
    Pillow's pixels, without warnings), or 'pillow', for all files where DALI is not installed. `status` is 'ok' or the
    reason in a few words. `mask_values` are those that occur, `mask_pixels` the pixels of each. An image of more than
    `max_pixels` is not decoded, and unusable. `threads`: by default one for each core that this process may use;
    `progress` is called with (files done, all files).

    Raises: SourceError for `max_pixels` that Pillow refuses; ResourceError when open files or memory run out.
    """
    if not 1 <= max_pixels <= MOST_PIXELS:
        raise SourceError(
            f"max_pixels={max_pixels:,} is not in 1 to {MOST_PIXELS:,}: Pillow refuses to decode larger images "
            f"(decompression bombs); give one within (--max-pixels {MOST_PIXELS})"
        )
    schema = CHECKS if masks is None else pa.schema([*CHECKS, *MASK_CHECKS])
    pairs = list(zip(paths, [None] * len(paths) if masks is None else masks, strict=True))
    groups = (pairs[start : start + GROUP] for start in range(0, len(pairs), GROUP))
    threads, stop = threads or usable_cores(), threading.Event()
    checks: list[Check] = []
    tables = [schema.empty_table()]
    # warning filters belong to the whole process, so threads must not restore them: changed once, around them all
    with _quiet, warnings.catch_warnings(), probe.dali_decoder() as dali:
        try:
            done = 0
            check_group = partial(_check_group, _Settings(Root.of(root), max_pixels, dali, stop))
            for group in read_ahead(check_group, groups, ahead=2 * threads, threads=threads):
                for check in group:
                    checks.append(check)
                    done += 1
                    if progress is not None:
                        progress(done, len(pairs))
                if len(checks) >= _ROWS:
                    tables.append(_table(checks, schema))
                    checks.clear()
        finally:
            stop.set()  # interrupted: each thread ends after its current file
    return pa.concat_tables([*tables, _table(checks, schema)]).combine_chunks()


def _table(checks: list[Check], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array([getattr(check, f.name) for check in checks], f.type) for f in schema], schema)


@dataclass(frozen=True)
class _Settings:
    """The settings of a check."""

    root: Root
    max_pixels: int
    dali: probe.Decoder | None
    stop: threading.Event


@dataclass(frozen=True)
class _Decoded:
    """A file that Pillow decoded, and its pixels: (H, W, 3) uint8."""

    check: Check
    data: bytes
    pixels: NDArray[np.uint8]


def _check_group(settings: _Settings, pairs: list[tuple[str, str | None]]) -> list[Check]:
    def opened() -> Iterator[tuple[Check, _Decoded | None]]:
        for path, mask in pairs:
            if settings.stop.is_set():
                return
            check, decoded = _check(settings, path)
            if mask is not None:
                _check_mask(settings, mask, check)
            yield check, decoded

    return _compared(settings.dali, opened())


def _compared(dali: probe.Decoder | None, opened: Iterable[tuple[Check, _Decoded | None]]) -> list[Check]:
    """The checks, each with its codec; few pixels are held at a time."""
    checks, undecided, pixels = list[Check](), list[_Decoded](), 0
    for check, decoded in opened:
        checks.append(check)
        if decoded is None or check.status != "ok":
            continue
        undecided.append(decoded)
        pixels += decoded.pixels.size // 3
        if pixels > _DALI_PX:
            _compare_with_dali(dali, undecided)
            undecided, pixels = [], 0
    _compare_with_dali(dali, undecided)
    return checks


@contextmanager
def checking(
    *, max_pixels: int = MAX_PIXELS, compare: bool = True
) -> Iterator[Callable[[Sequence[bytes]], list[Check]]]:
    """Within: (at most GROUP files) -> the result of `check_files` for each, from any thread.

    compare: False where Pillow will decode them all, so that nobody need know what DALI would make of them. A call
    raises ResourceError if DALI's process cannot start.
    """
    with probe.dali_decoder() if compare else nullcontext() as dali:
        yield lambda files: _compared(dali, (_opened(data, max_pixels) for data in files))


def _check(settings: _Settings, path: str) -> tuple[Check, _Decoded | None]:
    data = _read(settings.root, path)
    return (Check(status=data), None) if isinstance(data, str) else _opened(data, settings.max_pixels)


def _opened(data: bytes, max_pixels: int) -> tuple[Check, _Decoded | None]:
    check = Check(bytes=len(data), hash=xxhash.xxh3_64_intdigest(data))
    try:
        return check, _Decoded(check, data, _decode(data, check, max_pixels))
    except Exception as error:  # see pictures.decode
        check.status = _reason(error, data)
    return check, None


def _read(root: Root, path: str) -> bytes | str:
    """The file's bytes, or why it cannot be read. Raises ResourceError."""
    try:
        return root.read(path, most=MOST_BYTES)
    except OSError as error:
        return files.why_unreadable(error)


def _decode(data: bytes, check: Check, max_pixels: int) -> NDArray[np.uint8]:
    """Decode with Pillow, fill in the check, and return the pixels. Raises any error of Pillow; ValueError."""
    hush_pillow()
    with Image.open(io.BytesIO(data)) as image:
        check.format = image.format
        if image.format in ("JPEG", "MPO"):
            _check_scan(image, data)
        check_pixels(image, max_pixels)
        with _large if image.width * image.height > _LARGE_PX else nullcontext():
            if image.format != "TIFF":  # loading a TIFF rotates it and drops the tag
                load(image)
            check.orientation = _orientation(image)
            pixels = to_rgb(image)
    check.height, check.width = pixels.shape[:2]
    check.codec = "pillow"
    return pixels


def _check_scan(image: Image.Image, data: bytes) -> None:
    """Raises ValueError for a JPEG too short to hold its pixels: decoders invent the missing ones without an error.

    Huffman coding takes at least one bit for each block of 8 x 8; arithmetic coding, which is rare, may take less.
    """
    least = -(-image.width // 8) * -(-image.height // 8) // 8
    arithmetic = any(marker in data[:65536] for marker in (b"\xff\xc9\0", b"\xff\xca\0"))
    if len(data) < least and not arithmetic:
        raise ValueError(
            f"truncated: {len(data):,} bytes, and {image.width:,} x {image.height:,} pixels take {least:,} at least"
        )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # malformed EXIF: decoders do not rotate such an image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _compare_with_dali(dali: probe.Decoder | None, undecided: list[_Decoded]) -> None:
    """Set the codec to 'dali' for each file that DALI decodes to the same pixels."""
    if dali is None or not undecided:
        return
    with _large if sum(decoded.pixels.size // 3 for decoded in undecided) > _LARGE_PX else nullcontext():
        by_dali = dali([decoded.data for decoded in undecided], [decoded.pixels for decoded in undecided])
        for decoded, pixels in zip(undecided, by_dali, strict=True):
            levels = _LEVELS.get(decoded.check.format or "", _OTHER_LEVELS)
            if not isinstance(pixels, str) and _alike(pixels, decoded.pixels, levels):
                decoded.check.codec = "dali"


def _alike(a: NDArray[np.uint8], b: NDArray[np.uint8], levels: int) -> bool:
    """Whether no two values of the pictures differ by more than `levels`; .1 ms for 500 x 375."""
    if a.shape != b.shape:
        return False
    rows = max(1, 1_000_000 // max(1, a.shape[1]))  # in chunks, to make no further copies of a large picture
    chunks = (slice(start, start + rows) for start in range(0, len(a), rows))
    return all((np.maximum(a[chunk], b[chunk]) - np.minimum(a[chunk], b[chunk])).max() <= levels for chunk in chunks)


def _check_mask(settings: _Settings, name: str, check: Check) -> None:
    """Check an image's mask; the image cannot be used without it."""
    data = _read(settings.root, name)
    reason: str | None = None
    if isinstance(data, str):
        reason = data
    else:
        check.mask_hash = xxhash.xxh3_64_intdigest(data)
        reason = why_lossy(data)
        try:
            mask = decode_mask(files.as_array(data), max_pixels=settings.max_pixels)
            check.mask_values, check.mask_pixels = count_values(mask)
            if reason is None and check.width and check.height and not _fits(mask.shape, (check.height, check.width)):
                sizes = f"{mask.shape[1]} x {mask.shape[0]} px", f"{check.width} x {check.height}"
                reason = f"{sizes[0]}, and the upright image {sizes[1]}"
        except EngineError as error:
            reason = reason or _reason(error.__cause__ or error, data)
    if reason is not None and check.status == "ok":
        check.status = f"its mask {name}: {reason}"


def _fits(mask: tuple[int, ...], image: tuple[int, int]) -> bool:
    """Whether two (height, width) have the same aspect ratio, within a pixel of the smaller."""
    small, large = sorted((mask, image), key=max)
    longer = int(large[1] > large[0])
    return abs(large[1 - longer] * small[longer] / large[longer] - small[1 - longer]) <= 1


def _reason(error: BaseException, data: bytes) -> str:
    cause = why_undecodable(error)
    if cause.startswith(("too large", "truncated: ", "its mode is ")):
        return cause
    kind = next((name for magic, name in _BEGINNINGS.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        kind = data[8:12].decode("ascii", "replace").strip().upper()
        if kind != "AVIF" or not features.check("avif"):  # HEIC, videos
            return f"{kind}: Pillow cannot decode this format here"
    if kind == "WEBP" and len(data) < (expected := 8 + int.from_bytes(data[4:8], "little")):  # Pillow gives no cause
        return f"truncated: {len(data):,} bytes of {expected:,}"
    if not isinstance(error, UnidentifiedImageError):
        return f"{'truncated' if 'truncated' in cause.lower() else 'cannot be decoded'}: {cause}"
    if not data:
        return "empty file"
    return f"cannot be decoded: a broken {kind}, or a rare kind of it" if kind else "not an image"
