"""How fast do packed bytes reach DALI's input on one core, and does the heap stay as it is?

Files of random bytes (nothing here decodes), in the page cache, read in a training plan's order: which samples make the
step, their rows of the manifest, their bytes, and these handed to a DALI pipeline that asks only for their sizes, or
reads every byte once. Loose files in the same order beside them. A disk's own speed is not here.
"""

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from thawline.benchmarks.harness import check_positive, measure, report, say, spread
from thawline.dataio.reading.packing import pack
from thawline.dataio.reading.shards import open_reader
from thawline.dataio.stream.plan import Training
from thawline.dataio.table.manifest import Manifest, build

QUESTION = "how fast do packed bytes reach DALI's input on one core, and does the heap stay as it is?"
SEED = 42
_ALIVE = 8  # batches: more than DALI's queues hold
_MIB = 1 << 20


def main(
    *,
    records: int = 4096,
    kib: int = 50,
    batch: int = 256,
    shard_mib: int = 64,
    epochs: int = 10,
    out: Path | None = None,
) -> dict[str, Any]:
    """Read every record once an epoch, from shards and from loose files.

    Args:
        records: Files.
        kib: Size of each.
        batch: Files in a step.
        shard_mib: Size of a shard.
        epochs: Measured passes; RssAnon is read after each.
        out: Also write the JSON here.
    """
    check_positive(records=records, kib=kib, batch=batch, shard_mib=shard_mib)
    results = {}
    with tempfile.TemporaryDirectory() as folder, one_core():
        say(f"making {records} files of {kib} KiB")
        loose = make_files(Path(folder) / "loose", records, kib << 10)
        packed = pack(loose, Path(folder) / "packed", shard_bytes=shard_mib << 20)
        for name, manifest in (("shards", packed), ("files", loose)):
            for how, touch in (("handed over", False), ("every byte read", True)):
                say(f"measuring {name}, {how}")
                results[f"{name}, {how}"] = _measured(manifest, batch=batch, touch=touch, epochs=epochs)
    settings = {"records": records, "kib": kib, "batch": batch, "shards": len(packed.shards), "epochs": epochs}
    return report("shards", QUESTION, settings, results, out=out)


def make_files(folder: Path, records: int, size: int) -> Manifest:
    """Files of random bytes and a manifest that takes them for photographs."""
    folder.mkdir()
    random = np.random.default_rng(SEED)
    names, hashes = [f"{i:06}.jpg" for i in range(records)], []
    for name in names:
        data = random.bytes(size)
        (folder / name).write_bytes(data)
        hashes.append(xxhash.xxh3_64_intdigest(data))
    same = {"split": "train", "width": 500, "height": 375, "bytes": size, "format": "JPEG", "orientation": 1}
    columns: dict[str, Any] = {name: [value] * records for name, value in same.items()}
    columns |= {"codec": ["dali"] * records, "status": ["ok"] * records, "hash": hashes, "path": names}
    columns |= {"id": range(records), "label": [f"class{i % 10}" for i in range(records)]}
    return build(columns, root=str(folder), task="single_label", classes=tuple(f"class{i}" for i in range(10)))


@contextmanager
def one_core() -> Iterator[None]:
    """Within, this thread and those that it starts run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def batches(manifest: Manifest, *, batch: int) -> Callable[[], list[NDArray[np.uint8]]]:
    """The encoded files of one step after the other, each kept alive for `_ALIVE` calls."""
    part, reader, steps = manifest.subset("train"), open_reader(manifest), count()
    plan = Training(n=len(part), global_batch=batch, seed=SEED)
    alive: deque[list[NDArray[np.uint8]]] = deque(maxlen=_ALIVE)

    def following() -> list[NDArray[np.uint8]]:
        rows = part.take(plan.at(plan.positions(next(steps)))[1])
        found = [reader.read(rows, i) for i in range(len(rows))]
        alive.append([encoded.image for encoded in found if not isinstance(encoded, str)])
        return alive[-1]

    return following


def sink(source: Callable[[], list[NDArray[np.uint8]]], *, batch: int, touch: bool) -> Callable[[], int]:
    """A call takes a batch of files from `source` into DALI as training does, decodes none, and counts them.

    With `touch`, DALI reads every byte. The arrays must live for `_ALIVE` calls.
    """
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def

    from thawline.dataio.pixels.dali import PREFETCH

    @pipeline_def
    def taking() -> Any:
        encoded = fn.external_source(source=source, dtype=types.UINT8, ndim=1, batch=True, no_copy=True)
        return fn.copy(encoded) if touch else encoded.shape()

    where: dict[str, Any] = {"num_threads": 1, "device_id": None, "set_affinity": False}
    pipe = taking(batch_size=batch, prefetch_queue_depth=PREFETCH, exec_dynamic=True, **where)
    return lambda: len(pipe.run()[0])


def rss_anon_bytes() -> int:
    """Memory of this process that no file backs: heap, stacks, buffers."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def _measured(manifest: Manifest, *, batch: int, touch: bool, epochs: int) -> dict[str, Any]:
    run = sink(batches(manifest, batch=batch), batch=batch, touch=touch)
    steps, heap = max(1, manifest.rows.num_rows // batch), list[int]()

    def epoch() -> None:
        for _ in range(steps):
            run()
        heap.append(rss_anon_bytes())

    timing = measure(epoch, images_per_call=steps * batch, device=torch.device("cpu"), warmup=2, repeats=epochs)
    measured = np.array(heap[-epochs:]) / _MIB
    return {
        **timing.summary(),
        "rss_anon_mib": spread(measured),
        "rss_anon_growth_mib": float(measured[-1] - measured[0]),
    }
