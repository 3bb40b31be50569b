"""What does DALI's decoder make of a file? Without a warp: rendering is dali.py's question.

It is asked about few files at once, and never about what begins like no format of its own: a larger batch with a file
that no codec knows ends the process (DALI 2.4: SIGSEGV, seen from 32 files on). A child of asking.py runs this file as
a script, so nothing of the house is imported here.
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
"""Files in a batch: with 15 of them broken no process ended, in any way of breaking them."""

_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
)
_UNKNOWN = "it begins like no format that DALI knows"


def known(encoded: NDArray[np.uint8]) -> bool:
    """Whether a file (bytes,) uint8 begins like one of DALI's formats: no other may be given to it."""
    head = encoded[:12].tobytes()
    return head.startswith(_BEGINNINGS) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def decoded(encoded: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8] | str]:
    """For each file (bytes,) uint8: its pixels by the CPU's decoder, (H, W, 3) uint8, upright; or why it has none.

    Give no more than fit into memory.
    """
    return _asked(encoded, None, lambda images: [np.array(images.at(i)) for i in range(len(images))])


def decodable(encoded: Sequence[NDArray[np.uint8]], *, device_id: int | None = None) -> list[tuple[int, int] | str]:
    """For each file (bytes,) uint8: its height and width as DALI's decoder turns it out, or why it cannot.

    The CPU's decoder, or with a device_id that GPU's.
    """
    return _asked(encoded, device_id, lambda images: [shape[:2] for shape in images.shape()])


def _asked(
    encoded: Sequence[NDArray[np.uint8]], device_id: int | None, take: Callable[[Any], Sequence[T]]
) -> list[T | str]:
    found: list[T | str] = [_UNKNOWN] * len(encoded)
    sound = [i for i, file in enumerate(encoded) if known(file)]
    for start in range(0, len(sound), AT_ONCE):
        part = sound[start : start + AT_ONCE]
        for i, answer in zip(part, _together([encoded[i] for i in part], device_id, take), strict=True):
            found[i] = answer
    return found


def _together(
    encoded: Sequence[NDArray[np.uint8]], device_id: int | None, take: Callable[[Any], Sequence[T]]
) -> list[T | str]:
    """One call of DALI where all can be decoded, else halves of it."""
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
        return [*take(images)]
    except RuntimeError as error:
        if len(encoded) == 1:
            return [cause(error)]
    half = len(encoded) // 2
    return [*_together(encoded[:half], device_id, take), *_together(encoded[half:], device_id, take)]


def cause(error: RuntimeError) -> str:
    """DALI's reason, without the operator that gives it."""
    said, _, why = str(error).partition("encountered:")
    return (why or said).strip().splitlines()[0]


# As a process of its own -------------------------------------------------------------------------------------

READY = b"ready\n"
QUESTION = struct.Struct("<qqq16s")
"""Bytes of the file, which follows; height, width and xxh3_128 of the pixels that it should show."""
ANSWER = struct.Struct("<qq")
"""Height and width of the pixels that follow; or SAME, 0; or TEXT and the bytes of the text that follows."""
SAME, TEXT = -1, -2


def _serve() -> None:
    """Answer on stdout what stdin asks, a number of questions at a time, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its children
    with open(os.dup(1), "wb") as answers, open(0, "rb") as asked, tempfile.TemporaryFile() as said:  # noqa: PTH123
        for number in (1, 2):  # alone in this process, so that nobody else's words are lost
            os.dup2(said.fileno(), number)
        import nvidia.dali.fn  # noqa: F401

        answers.write(READY)
        answers.flush()
        while count := asked.read(8):
            files, wanted = list[NDArray[np.uint8]](), list[tuple[tuple[int, int], bytes]]()
            for _ in range(int.from_bytes(count, "little")):
                size, height, width, digest = QUESTION.unpack(asked.read(QUESTION.size))
                files.append(np.frombuffer(asked.read(size), np.uint8))
                wanted.append(((height, width), digest))
            for found, (shape, digest) in zip(_silent(files, said.fileno()), wanted, strict=True):
                if isinstance(found, str):
                    text = found.encode()
                    answers.write(ANSWER.pack(TEXT, len(text)) + text)
                elif found.shape[:2] == shape and xxhash.xxh3_128_digest(found.data) == digest:
                    answers.write(ANSWER.pack(SAME, 0))
                else:
                    answers.write(ANSWER.pack(*found.shape[:2]))
                    answers.write(found.data)
            answers.flush()


def _silent(files: Sequence[NDArray[np.uint8]], said: int) -> list[NDArray[np.uint8] | str]:
    """What is decoded without a word; asked again in halves where somebody talked."""
    before = os.fstat(said).st_size
    found = decoded(files)
    if os.fstat(said).st_size == before:
        return found
    if len(files) == 1:
        return ["DALI talks about it on stderr"]
    half = len(files) // 2
    return [*_silent(files[:half], said), *_silent(files[half:], said)]


if __name__ == "__main__":
    _serve()
