"""Which files cannot be used, why, and who can decode the others?

Every file is read once, hashed and decoded in full, by Pillow and by DALI: one bad file would otherwise break into a
run. What only Pillow reads is usable too, since readers transcode it. Nothing is deleted or changed; the reason goes
into `status`.
"""

from __future__ import annotations

import io
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import xxhash
from PIL import Image, UnidentifiedImageError, features

from dataio import files
from dataio.cores import usable_cores
from dataio.errors import EngineError
from dataio.masks import MASK_CHECKS, count_values, why_lossy
from dataio.pictures import hush_pillow, load, to_rgb, why_undecodable
from dataio.targets import decode_mask
from dataio.work import read_ahead

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

_ORIENTATION, _BITS_PER_SAMPLE, _SAMPLES, _PLANAR, _EXTRA = 0x0112, 258, 277, 284, 338
_GROUP = 16  # files a thread takes at once: few enough to stop soon, enough to share the start of a DALI pipeline
_ROWS = 16_384  # then they go into a table: as objects, millions of rows would fill the memory
_DALI_PX = 32_000_000  # a call of DALI holds all its pixels, 3 bytes each, in every thread
_LARGE_PX = 50_000_000  # beyond this one image at a time: Pillow holds up to three copies

# What DALI decodes. Of TIFF only the plain modes: it shows the others otherwise than Pillow does, or with complaints
# on stderr (two grey samples as a colour, Lab and premultiplied pixels as they lie).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
_TIFF_MODES = ("1", "L", "P", "RGB", "RGBA", "I;16", "I;16B")
_SYCC = b"colr\x01\x00\x00\x00\x00\x00\x12"  # JPEG 2000 in luma and chroma, which DALI takes for red, green and blue

_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WEBP",
    b"\0\0\0\x0cjP": "JPEG2000",
}

_quiet, _large = threading.Lock(), threading.Lock()


@dataclass(slots=True)
class _Check:
    """A row of `CHECKS` and `MASK_CHECKS`; what could not be found out is None."""

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
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Decode every file and return `CHECKS`, a row a path; with `masks`, one for each path, `MASK_CHECKS` as well.

    Width and height are in px and upright, `orientation` is the EXIF one (1 to 8; 1 when there is none to be read),
    `hash` the xxh3_64 of the file's bytes, `format` Pillow's name, `codec` who can decode it later: 'dali' (as well as
    Pillow) or 'pillow' alone. `status` is 'ok' or the reason in a few words. `mask_values` are those that occur,
    `mask_pixels` how often.
    `threads` is by default one a core that this process may use; `progress` gets (files done, files in all).
    """
    schema = CHECKS if masks is None else pa.schema([*CHECKS, *MASK_CHECKS])
    pairs = list(zip(paths, [None] * len(paths) if masks is None else masks, strict=True))
    groups = (pairs[start : start + _GROUP] for start in range(0, len(pairs), _GROUP))
    threads, stop = threads or usable_cores(), threading.Event()
    checks: list[_Check] = []
    tables = [schema.empty_table()]
    # the filters of warnings belong to the process, so a worker must not restore them: one change around all
    with _quiet, warnings.catch_warnings():
        try:
            done = 0
            for group in read_ahead(partial(_check_group, str(root), stop), groups, ahead=2 * threads, threads=threads):
                for check in group:
                    checks.append(check)
                    done += 1
                    if progress is not None:
                        progress(done, len(pairs))
                if len(checks) >= _ROWS:
                    tables.append(_table(checks, schema))
                    checks.clear()
        finally:
            stop.set()  # interrupted: the threads end with the file they are at
    return pa.concat_tables([*tables, _table(checks, schema)]).combine_chunks()


def _table(checks: list[_Check], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array([getattr(check, f.name) for check in checks], f.type) for f in schema], schema)


def _check_group(root: str, stop: threading.Event, pairs: list[tuple[str, str | None]]) -> list[_Check]:
    checks: list[_Check] = []
    waiting: list[tuple[_Check, bytes]] = []
    for path, mask in pairs:
        if stop.is_set():
            break
        check, data = _check(root, path)
        checks.append(check)
        if mask is not None:
            _check_mask(root, mask, check)
        if check.status == "ok" and check.codec == "dali":
            waiting.append((check, data))
        if _pixels(waiting) > _DALI_PX:
            _ask_dali(waiting)
            waiting.clear()
    _ask_dali(waiting)
    return checks


def _check(root: str, path: str) -> tuple[_Check, bytes]:
    data = _read(root, path)
    if isinstance(data, str):
        return _Check(status=data), b""
    check = _Check(bytes=len(data), hash=xxhash.xxh3_64_intdigest(data))
    try:
        _decode(data, check)
    except Exception as error:  # see reference.decode
        check.status = _reason(error, data)
    return check, data


def _read(root: str, path: str) -> bytes | str:
    """The file's bytes, or why there are none."""
    try:
        if not files.is_remote(root):
            mode = Path(files.below(root, path)).stat().st_mode
            if not stat.S_ISREG(mode):  # a pipe would block for ever
                return "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file"
        return files.read(root, path)
    except OSError as error:
        return files.why_unreadable(error)


def _decode(data: bytes, check: _Check) -> None:
    """Decode with Pillow and fill in what that tells. Raises whatever Pillow raises."""
    hush_pillow()
    with Image.open(io.BytesIO(data)) as image:
        check.format = image.format
        with _large if image.width * image.height > _LARGE_PX else nullcontext():
            if image.format != "TIFF":  # which is turned, and its tag dropped, by loading
                load(image)
            orientation = _orientation(image)
            alike = _alike(image, data, orientation)
            height, width = to_rgb(image).shape[:2]
    check.width, check.height, check.orientation = width, height, orientation
    check.codec = "dali" if alike else "pillow"


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # malformed EXIF: decoders show such an image as it lies
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _alike(image: Image.Image, data: bytes, orientation: int) -> bool:
    """Whether DALI, if it can decode the file, shows what Pillow shows; seen by comparing their pixels."""
    if image.format not in _FORMATS:
        return False
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        return (
            image.mode in _TIFF_MODES
            and _BITS_PER_SAMPLE in tags
            and tags.get(_SAMPLES, 1) == len(image.getbands())
            and tags.get(_PLANAR, 1) == 1
            and tags.get(_EXTRA) != (1,)  # colours multiplied by their alpha
            and tags.get(_ORIENTATION, 1) == orientation
        )
    if image.format == "JPEG2000" and _SYCC in data[:1024]:
        return False
    if image.mode == "CMYK" and "adobe" not in image.info:  # not inverted; DALI takes all for inverted
        return False
    if image.format == "PNG" and b"IEND" not in data:  # all pixels are there, and DALI wants the end
        return False
    # Pillow also obeys XMP, several EXIF blocks and ImageMagick's profiles: a mirror image would go unnoticed.
    once = data.count(b"Exif\0\0", 0, max(data.find(b"\xff\xda"), 0)) < 2
    return once and _exif_orientation(image.info.get("exif", b"")) == orientation


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation as a strict reader finds it, 1 if there is none; None if the EXIF is not as it should be."""
    body = exif.removeprefix(b"Exif\0\0")
    if not body:
        return 1
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(body[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", body, 4)
        (count,) = struct.unpack_from(f"{order}H", body, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", body, at)
            if tag == _ORIENTATION:
                return None if (kind, values) != (3, 1) else value if 1 <= value <= 8 else 1
    except struct.error:
        return None
    return 1


def _pixels(waiting: list[tuple[_Check, bytes]]) -> int:
    return sum((check.width or 0) * (check.height or 0) for check, _ in waiting)


def _ask_dali(waiting: list[tuple[_Check, bytes]]) -> None:
    """Leave to Pillow what DALI cannot decode, or turns otherwise: Pillow's size is the manifest's."""
    decodable = _decodable()
    if not waiting or decodable is None:
        return
    with _large if _pixels(waiting) > _LARGE_PX else nullcontext():
        found = decodable([files.as_array(data) for _, data in waiting])
    for (check, _), size in zip(waiting, found, strict=True):
        if size != (check.height, check.width):
            check.codec = "pillow"


@cache
def _decodable() -> Callable[..., Sequence[tuple[int, int] | str]] | None:
    try:
        from dataio.dali import decodable
    except ImportError:  # a machine without DALI goes by the formats; loaders mend what a later DALI cannot decode
        return None
    return decodable


def _check_mask(root: str, name: str, check: _Check) -> None:
    """Fill in what the mask tells; the image cannot be used without it."""
    data = _read(root, name)
    why: str | None = None
    if isinstance(data, str):
        why = data
    else:
        check.mask_hash = xxhash.xxh3_64_intdigest(data)
        why = why_lossy(data)
        try:
            mask = decode_mask(files.as_array(data))
            check.mask_values, check.mask_pixels = count_values(mask)
            if why is None and check.width and check.height and not _fits(mask.shape, (check.height, check.width)):
                sizes = f"{mask.shape[1]} x {mask.shape[0]} px", f"{check.width} x {check.height}"
                why = f"its shape, {sizes[0]}, is not that of the upright image, {sizes[1]}"
        except EngineError as error:
            why = why or _reason(error.__cause__ or error, data)
    if why is not None and check.status == "ok":
        check.status = f"its mask {name}: {why}"


def _fits(mask: tuple[int, ...], image: tuple[int, int]) -> bool:
    """Whether (height, width) are one shape at two scales, within a pixel of the smaller."""
    small, large = sorted((mask, image), key=max)
    longer = int(large[1] > large[0])
    return abs(large[1 - longer] * small[longer] / large[longer] - small[1 - longer]) <= 1


def _reason(error: BaseException, data: bytes) -> str:
    why = why_undecodable(error)
    if why.startswith("too large"):
        return why
    kind = next((name for magic, name in _BEGINNINGS.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        kind = data[8:12].decode("ascii", "replace").strip().upper()
        if kind != "AVIF" or not features.check("avif"):  # HEIC, videos
            return f"{kind}: Pillow cannot decode this format here"
    if kind == "WEBP" and len(data) < (whole := 8 + int.from_bytes(data[4:8], "little")):  # Pillow gives no cause
        return f"truncated: {len(data):,} bytes of {whole:,}"
    if not isinstance(error, UnidentifiedImageError):
        return f"{'truncated' if 'truncated' in why.lower() else 'cannot be decoded'}: {why}"
    if not data:
        return "empty file"
    return f"cannot be decoded: a broken {kind}, or a rare kind of it" if kind else "not an image"
