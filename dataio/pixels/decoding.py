"""What does DALI's decoder turn a file into? Decoding only: rendering is dali.py's question.

It is given few files at once, and none that begins like no format of its own: a larger batch with a file that no codec
knows crashes the process (DALI 2.4: SIGSEGV, seen from 32 files on). The child processes of probe.py run this file as a
script, so nothing else of thawline is imported here.
"""

from __future__ import annotations

import os
import signal
import struct
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

T = TypeVar("T")

AT_ONCE = 16
"""Files in a batch: with 15 of them broken, in whatever way, no process crashed."""

_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
)
_UNKNOWN = "it begins like no format that DALI knows"


def known(encoded: NDArray[np.uint8]) -> bool:
    """Whether a file, (bytes,) uint8, begins like one of DALI's formats: only such files may be given to DALI."""
    head = encoded[:12].tobytes()
    return head.startswith(_BEGINNINGS) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def decoded(encoded: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8] | str]:
    """Each file, (bytes,) uint8, decoded on the CPU: (H, W, 3) uint8, upright; or why it cannot be.

    All results are held in memory at once.
    """
    return _in_batches(encoded, None, lambda images: [np.array(images.at(i)) for i in range(len(images))])


def decodable(encoded: Sequence[NDArray[np.uint8]], *, device_id: int | None = None) -> list[tuple[int, int] | str]:
    """The height and width of each file, (bytes,) uint8, once DALI has decoded it; or why it cannot.

    On the CPU, or with a device_id on that GPU.
    """
    return _in_batches(encoded, device_id, lambda images: [shape[:2] for shape in images.shape()])


def _in_batches(
    encoded: Sequence[NDArray[np.uint8]], device_id: int | None, convert: Callable[[Any], Sequence[T]]
) -> list[T | str]:
    results: list[T | str] = [_UNKNOWN] * len(encoded)
    of_known_format = [i for i, file in enumerate(encoded) if known(file)]
    for start in range(0, len(of_known_format), AT_ONCE):
        batch = of_known_format[start : start + AT_ONCE]
        for i, result in zip(batch, _batch([encoded[i] for i in batch], device_id, convert), strict=True):
            results[i] = result
    return results


def _batch(
    encoded: Sequence[NDArray[np.uint8]], device_id: int | None, convert: Callable[[Any], Sequence[T]]
) -> list[T | str]:
    """One call of DALI if it can decode all files; otherwise a call for each half."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import Pipeline

    options: dict[str, Any] = {"num_threads": 1, "device_id": device_id, "set_affinity": False}
    options |= {"batch_size": len(encoded), "prefetch_queue_depth": 1}  # more would decode all twice
    pipe = Pipeline(**options)
    with pipe:
        files = fn.external_source(source=lambda: encoded, dtype=types.UINT8, ndim=1, batch=True)
        device = "cpu" if device_id is None else "mixed"
        pipe.set_outputs(fn.decoders.image(files, device=device, output_type=types.RGB))
    try:
        (images,) = pipe.run()
        return [*convert(images)]
    except RuntimeError as error:
        if len(encoded) == 1:
            return [cause(error)]
    half = len(encoded) // 2
    return [*_batch(encoded[:half], device_id, convert), *_batch(encoded[half:], device_id, convert)]


def cause(error: RuntimeError) -> str:
    """DALI's reason, without the name of the operator that failed."""
    message, _, reason = str(error).partition("encountered:")
    return (reason or message).strip().splitlines()[0]


# As a process of its own -------------------------------------------------------------------------------------

READY = b"ready\n"
REQUEST = struct.Struct("<qqq16s")
"""Size in bytes of the file, which follows; height, width and xxh3_128 of the expected pixels."""
RESPONSE = struct.Struct("<qq")
"""Height and width of the pixels, which follow; or SAME, 0; or TEXT and the size in bytes of the text to follow."""
SAME, TEXT = -1, -2


def _serve() -> None:
    """Read batches of requests from stdin and write the responses to stdout, until stdin is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its children
    with open(os.dup(1), "wb") as responses, open(0, "rb") as requests, tempfile.TemporaryFile() as log:  # noqa: PTH123
        for number in (1, 2):  # this process has nothing else to print
            os.dup2(log.fileno(), number)
        import nvidia.dali.fn  # noqa: F401

        responses.write(READY)
        responses.flush()
        while count := requests.read(8):
            files, expected = list[NDArray[np.uint8]](), list[tuple[tuple[int, int], bytes]]()
            for _ in range(int.from_bytes(count, "little")):
                size, height, width, digest = REQUEST.unpack(requests.read(REQUEST.size))
                files.append(np.frombuffer(requests.read(size), np.uint8))
                expected.append(((height, width), digest))
            for result, (shape, digest) in zip(_without_warnings(files, log.fileno()), expected, strict=True):
                if isinstance(result, str):
                    text = result.encode()
                    responses.write(RESPONSE.pack(TEXT, len(text)) + text)
                elif result.shape[:2] == shape and xxhash.xxh3_128_digest(result.data) == digest:
                    responses.write(RESPONSE.pack(SAME, 0))
                else:
                    responses.write(RESPONSE.pack(*result.shape[:2]))
                    responses.write(result.data)
            responses.flush()


def _without_warnings(files: Sequence[NDArray[np.uint8]], log: int) -> list[NDArray[np.uint8] | str]:
    """The files that DALI decodes without printing anything; if it prints, each half is tried again."""
    before = os.fstat(log).st_size
    results = decoded(files)
    if os.fstat(log).st_size == before:
        return results
    if len(files) == 1:
        return ["DALI warns about it on stderr"]
    half = len(files) // 2
    return [*_without_warnings(files[:half], log), *_without_warnings(files[half:], log)]


if __name__ == "__main__":
    _serve()
