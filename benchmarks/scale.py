"""What do ten million images cost before the first batch? Time to open, time to the first batch, memory a rank.

A manifest of that many rows over a few real files is written as Arrow; a fresh process then opens it as a training rank
does. Memory is what that process holds beyond its imports: its own (RssAnon), and with the mapped file's pages, which
the ranks of a machine share and the system may take back (Rss).
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from thawline.benchmarks.harness import check_positive, report, say, spread
from thawline.benchmarks.photos import write_photos
from thawline.dataio.checks.verify import check_files
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.stream.loader import split_loader
from thawline.dataio.table.manifest import Manifest, build

QUESTION = "what do ten million images cost before the first batch?"
_FILES, _CLASSES = 100, 1000
_BATCH = 64


def main(*, rows: int = 10_000_000, steps: int = 50, repeats: int = 3, out: Path | None = None) -> dict[str, Any]:
    """Open a large manifest in a fresh process, and read from it.

    Args:
        rows: Images in the manifest, a fifth of them for validation.
        steps: Batches to read after the first.
        repeats: Fresh processes.
        out: Also write the JSON here.
    """
    check_positive(rows=rows, steps=steps, repeats=repeats)
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing a manifest of {rows:,} rows")
        file = Path(folder) / "large.arrow"
        make(Path(folder), rows).save(file)
        found = [_fresh(file, steps) for _ in range(repeats)]
        size = file.stat().st_size
    results = {name: spread([run[name] for run in found]) for name in found[0]}
    settings = {"rows": rows, "batch": _BATCH, "steps": steps, "manifest_bytes": size, "files": _FILES}
    return report("scale", QUESTION, settings, {"rank": results}, out=out)


def make(folder: Path, rows: int) -> Manifest:
    """A manifest of `rows` rows over _FILES JPEGs in `folder`."""
    names = [f"{i:03}.jpg" for i in range(_FILES)]
    for name, jpeg in zip(names, write_photos(_FILES, width=96, height=72, seed=0), strict=True):
        (folder / name).write_bytes(jpeg.tobytes())
    checks = check_files(str(folder), names)
    chosen = np.arange(rows) % _FILES
    classes = [f"n{i:08}" for i in range(_CLASSES)]
    columns = {
        **{name: checks[name].take(chosen) for name in checks.column_names},
        "id": np.arange(rows),
        "path": pa.array(names).take(pa.array(chosen)),
        "label": pa.array(classes).take(pa.array(np.arange(rows) % _CLASSES)),
        "split": pa.array(["valid", "train"]).take(pa.array(np.minimum(np.arange(rows) % 5, 1))),
    }
    return build(columns, root=str(folder), task="single_label", classes=classes)


def _fresh(file: Path, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", str(file), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(file: str, steps: int) -> dict[str, float]:
    """What a rank does at its start, timed; memory beyond what the imports and a first decoded image took."""
    spec = ImageSpec(size_px=64, presize_px=64)
    small = Path(file).parent / "small.arrow"
    if not small.exists():
        make(small.parent, 1000).save(small)
    next(iter(split_loader(Manifest.load(small), spec, "train", global_batch=_BATCH, threads=1).stream()))
    before = _memory_mb()
    began = time.perf_counter()
    manifest = Manifest.load(file)
    opened_s = time.perf_counter() - began
    loader = split_loader(manifest, spec, "train", global_batch=_BATCH, threads=1)
    ready_s = time.perf_counter() - began
    stream = loader.stream()
    next(stream)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    for _ in islice(stream, steps):
        pass
    step_ms = (time.perf_counter() - began) / steps * 1e3
    after = _memory_mb()
    return {
        "open_s": opened_s,
        "loader_s": ready_s,
        "first_batch_s": first_s,
        "step_ms": step_ms,
        "own_memory_mb": after["RssAnon"] - before["RssAnon"],
        "with_shared_pages_mb": after["VmRSS"] - before["VmRSS"],
        "peak_mb": after["VmHWM"] - before["VmRSS"],
    }


def _memory_mb() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS", "VmHWM")}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
