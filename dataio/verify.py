"""Which files cannot be decoded, and why?

Every file is read once, hashed and decoded in full: one bad file would otherwise stop the whole pipeline in
the middle of a run. Nothing is deleted or changed; the reason goes into `status`.
"""

from __future__ import annotations

import io
import stat
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import xxhash
from PIL import Image, UnidentifiedImageError

from dataio.cores import usable_cores

DECODABLE = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF")  # an MPO is a JPEG followed by others

CHECKS = pa.schema(
    {
        "width": pa.int32(),
        "height": pa.int32(),
        "bytes": pa.int64(),
        "hash": pa.string(),
        "status": pa.string(),
    }
)

_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258
_WINDOW = 4096  # files in flight: a future each for millions of files would fill the memory

_quiet = threading.Lock()

# width, height, bytes, hash, status
Check = tuple[int | None, int | None, int | None, str | None, str]


def check_files(
    root: Path,
    paths: Sequence[str],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pa.Table:
    """Decode every file and return `CHECKS`, a row a path.

    Width and height are in px after EXIF orientation; `hash` is the xxh3_64 of the file's bytes in
    hexadecimal; `status` is 'ok' or the reason in a few words; what could not be found out is null.
    `threads` is by default one a core that this process may use (Pillow decodes without the GIL);
    `progress(done, total)` is called in the caller's thread.
    """
    checks: list[Check] = []
    # the filters of warnings belong to the process, so a worker must not touch them: one change around the
    # whole pool, of Pillow's warnings alone, and one pool at a time
    with _quiet, warnings.catch_warnings(), ThreadPoolExecutor(threads or usable_cores()) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for start in range(0, len(paths), _WINDOW):
            for check in pool.map(lambda path: _check(root / path), paths[start : start + _WINDOW]):
                checks.append(check)
                if progress is not None:
                    progress(len(checks), len(paths))
    columns = zip(*checks, strict=True) if checks else ([] for _ in CHECKS)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, CHECKS, strict=True)], CHECKS)


def _check(path: Path) -> Check:
    try:
        data, reason = _read(path)
    except OSError as error:
        return None, None, None, None, f"cannot be read: {error.strerror or error}"
    if data is None:
        return None, None, None, None, reason
    width, height, status = _decode(data)
    return width, height, len(data), xxhash.xxh3_64_hexdigest(data), status


def _read(path: Path) -> tuple[bytes | None, str]:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would block for ever
            return None, "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file"
        return path.read_bytes(), ""
    except (FileNotFoundError, NotADirectoryError):
        return None, "missing"
    except PermissionError:
        return None, "permission denied"


def _decode(data: bytes) -> tuple[int | None, int | None, str]:
    """Return (width, height, status) of a file's bytes."""
    if not data:
        return None, None, "empty file"
    if data[4:8] == b"ftyp":  # AVIF, HEIC, videos: Pillow knows them only with the right libraries
        return None, None, _foreign(data[8:12].decode("ascii", "replace").strip().upper())
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in DECODABLE:
                return None, None, _foreign(str(image.format))
            image.load()
            return *_upright(image), _quirk(image, data) or "ok"
    except UnidentifiedImageError:
        return None, None, "not an image"
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return None, None, f"too large: decompression bomb, more than {limit:,} pixels"
    except MemoryError:
        return None, None, "too large: not enough memory to decode it"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        message = " ".join(str(error).split()) or type(error).__name__
        return None, None, f"{'truncated' if 'truncated' in message else 'cannot be decoded'}: {message}"


def _upright(image: Image.Image) -> tuple[int, int]:
    """Return width and height after EXIF orientation; Pillow turns a TIFF while loading, and no other."""
    try:
        turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # malformed EXIF: decoders show such an image as it lies
        turned = False
    return (image.height, image.width) if turned else (image.width, image.height)


def _quirk(image: Image.Image, data: bytes) -> str | None:
    """Return why DALI 2.4 cannot decode what Pillow can; one such file would break its pipeline."""
    if image.format == "PNG" and b"IEND" not in data:
        return "truncated: PNG without its end (IEND)"
    if image.format == "TIFF" and _BITS_PER_SAMPLE not in getattr(image, "tag_v2", {_BITS_PER_SAMPLE: 1}):
        return "TIFF without BitsPerSample: the engine cannot decode it"
    return None


def _foreign(name: str) -> str:
    return f"{name}: the engine cannot decode this format"
