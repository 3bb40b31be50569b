"""What is mutated, how, and how is it read? One kind of file each, with its own well-formed examples."""

from __future__ import annotations

import csv
import io
import os
import random
import re
import signal
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Read = Callable[[Path], str]
"""A mutated file, in place, to `same`, `told` or `other`; raises what the product raises."""


@dataclass(frozen=True)
class Case:
    """A file that was written, and how it is read. text: its mutations are also those of texts."""

    file: Path
    read: Read
    text: bool = False


# Mutations ------------------------------------------------------------------------------------------------

_WORDS = [*"\"'[]{}()=,;:\n\r\t\\#$%&. -+\0\x1b", "[" * 900, "{a=" * 900, "\ufeff", "\u0301", "\u202e", '"""', "\r\n"]
_WORDS += ["nan", "inf", "-1", "0", "9" * 40, "1e999", "true", "null", "../" * 9, "/dev/zero", "x" * 70_000, "[[", "]]"]
_INTS = [0, -1, 1, 2**7, 2**15 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]


def mutated(data: bytes, rng: random.Random, *, text: bool) -> bytes:
    """One to three changes; never the same bytes."""
    while True:
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if text and rng.random() < 0.6:
                out = bytearray(_reworded(out, rng))
            else:
                _change(out, rng)
        if out != data:
            return bytes(out)


def _reworded(out: bytearray, rng: random.Random) -> bytes:
    """A token or a line changed, moved, doubled or left out."""
    parts = re.split(rb"(\n)" if rng.random() < 0.3 else rb"(\W)", out)
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    kind = rng.choice("wwwsdrj")
    if kind == "s":
        parts[i], parts[j] = parts[j], parts[i]
    elif kind == "d":
        del parts[i]
    elif kind == "r":
        parts[j:j] = [parts[i]]
    else:
        parts[i] = parts[j] if kind == "j" else rng.choice(_WORDS).encode()
    return b"".join(parts)


def _change(out: bytearray, rng: random.Random) -> None:
    size = max(1, len(out))
    # the beginnings and the ends are where formats say what they are, and most of a file is not
    at, end = rng.randrange(size), rng.randrange(min(size, 2048))
    at = rng.choice((at, at, end % 512, size - 1 - end))
    run = min(rng.choice((1, 2, 4, 8, 16, 64, 512, 4096)), size)
    kind = rng.choice("bbbbyzfcdrims")
    if kind == "c":
        del out[at:]
    elif kind == "d":
        del out[at : at + run]
    elif kind == "r":
        out[at:at] = out[at : at + run]
    elif kind == "i":
        out[at:at] = rng.randbytes(run)
    elif kind == "m":
        number = rng.choice(_INTS)
        width = rng.choice((1, 2, 4, 8))
        out[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    elif kind == "s":
        to = rng.randrange(size)
        out[at : at + run], out[to : to + run] = out[to : to + run], out[at : at + run]
    elif kind in "zf":
        out[at : at + run] = (b"\0" if kind == "z" else b"\xff") * len(out[at : at + run])
    elif out and kind == "b":
        out[at % len(out)] ^= 1 << rng.randrange(8)
    elif out:
        out[at % len(out)] = rng.randrange(256)


# Manifests and shards -------------------------------------------------------------------------------------


def _manifest(folder: Path, kind: str) -> Iterator[Case]:
    from thawline.dataio.table.manifest import Manifest, Shard, build

    labels: dict[str, Callable[[int], Any]] = {
        "single_label": lambda i: "abc"[i % 3],
        "multi_label": lambda i: ["abc"[j] for j in range(i % 4)],
        "points": lambda i: [i + 0.5, float("nan") if i == 4 else 2.0] * (i % 2 + 1),
        "mask": lambda i: f"masks/{i}.png",
    }
    count = 40
    for task, label in labels.items():
        known: dict[str, Any] = {"width": 9, "height": 8, "bytes": 77, "orientation": 1}
        known |= {"format": "JPEG", "codec": "dali"}
        columns: dict[str, Any] = {name: [known[name] if i % 9 else None for i in range(count)] for name in known}
        columns |= {"id": range(count), "path": [f"photos/{i:03}.jpg" for i in range(count)]}
        columns |= {"hash": range(count), "mask_hash": range(count), "label": [label(i) for i in range(count)]}
        columns |= {"split": [("train", "valid")[i % 2] if i % 9 else None for i in range(count)]}
        columns |= {"status": ["ok" if i % 9 else "truncated" for i in range(count)]}
        names = ("nose", "tail") if task == "points" else ("a", "b", "c")
        values = (0, 1, 7) if task == "mask" else ()
        written = build(columns, root="/photos", task=task, classes=names, values=values)
        shards = (Shard("a.arrow", 0, 30, 10, "ff", "ee"), Shard("b.arrow", 30, 10, 10, "ff", "ee"))
        written = Manifest(written.rows, written.root, task, names, values, shards)
        file = folder / f"{task}.{kind}"
        written.save(file)
        yield Case(file, _manifest_read(_of(written)))


def _of(manifest: Any) -> str:
    """All that a manifest says, as text, so that NaN equals NaN."""
    about = (manifest.root, manifest.task, manifest.classes, manifest.values, manifest.shards, manifest.swap)
    return repr((about, manifest.fingerprint(), manifest.rows.to_pylist()))


def _manifest_read(written: str) -> Read:
    from thawline.dataio.table.manifest import Manifest

    def read(file: Path) -> str:
        import numpy as np

        loaded = Manifest.load(file)
        for split in ("train", "valid"):
            part = loaded.subset(split)
            part.take(np.arange(len(part)))
        return "same" if _of(loaded) == written else "other"

    return read


def _shard(folder: Path) -> Iterator[Case]:
    from tests.kit.packs import every, photos
    from thawline.dataio.reading.packing import pack
    from thawline.dataio.reading.readers import Encoded

    for task in ("single_label", "mask"):
        packed = pack(photos(folder / task, task=task), folder / f"{task}-packed", shard_bytes=12_000)
        written = {path: _bytes(sample) for path, sample in every(packed)}

        def read(file: Path, packed: Any = packed, written: Any = written) -> str:
            reasons = 0
            for path, sample in every(packed):
                reasons += not isinstance(sample, Encoded)
                if isinstance(sample, Encoded) and _bytes(sample) != written[path]:
                    return "other"
            return "told" if reasons else "same"

        for shard in packed.shards:
            yield Case(Path(packed.home, shard.name), read)


def _bytes(sample: Any) -> tuple[bytes, bytes | None]:
    return sample.image.tobytes(), None if sample.mask is None else sample.mask.tobytes()


# Jobs and CSVs --------------------------------------------------------------------------------------------

_JOBS = {
    "fit.toml": """
name = "pets"
manifest = "pets.parquet"
workers = [1, 4]
seed = 7

[data]
size_px = 128
stages = [[0, 96], [3.5, 128]]
engine = "reference"
mean = [0.5, 0.4, 0.3]

[augment]
preset = "digits"
max_zoom = 1.2

[fit]
epochs = 3
lr = [1e-5, 1e-3]
clip = 1.0
metrics = ["f_beta(beta=2)"]

[cluster]
resources = { spot = 1.0, "my disk" = 2 }
""",
    "phases.toml": """
name = "pets"
manifest = "pets.parquet"

[model]
name = "resnet18"

[[phases]]
recipe = "one_cycle"
epochs = 2
freeze_to = -1
lr = 1e-3

[[phases]]
name = "all"
recipe = "one_cycle"
steps = 300
lr = 1e-4
momenta = [0.95, 0.85, 0.95]
""",
}


def _job(folder: Path) -> Iterator[Case]:
    from thawline.cluster.job import job as jobs
    from thawline.cluster.job.checks import check
    from thawline.cluster.job.tables import flat

    def read(file: Path) -> str:
        job = check(jobs.load(file))
        document = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        said = [(_at(document, name), value) for name, value in flat(job).items()]
        same = all(plain is None or _plain(plain) == _plain(value) for plain, value in said)
        again = jobs.from_dict(tomllib.loads(jobs.to_toml(job)))
        return "same" if same and repr(again) == repr(job) else "other"

    for name, text in _JOBS.items():
        file = folder / name
        file.write_text(text)
        yield Case(file, read, text=True)


def _at(document: Any, name: str) -> Any:
    """What stands at "phases[0].lr"; None where nothing does."""
    for part in name.replace("[", ".[").split("."):
        key: Any = int(part[1:-1]) if part.startswith("[") else part
        try:
            document = document[key]
        except (LookupError, TypeError):
            return None
    return document


def _plain(value: Any) -> str:
    """Numbers by their value, lists and tuples alike; NaN is NaN."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return str({name: _plain(inner) for name, inner in value.items()})
    return repr(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)


def _csv(folder: Path) -> Iterator[Case]:
    from thawline.dataio.labels.labels import by_column, label
    from thawline.dataio.table.sources import from_csv

    def read(file: Path) -> str:
        rows = label(from_csv(file), by_column("label")).rows
        loaded = list(zip(rows["path"].to_pylist(), rows["label"].to_pylist(), strict=True))
        if any("\n" in text or "\r" in text for pair in loaded for text in pair):
            return "other"
        text = file.read_bytes().decode("utf-8-sig")
        names, *expected = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        place = [name.strip() for name in names].index("label")
        pairs = [_pair(folder, row[0], row[place]) for row in expected]
        return "same" if [_pair(folder, *pair) for pair in loaded] == pairs else "other"

    for name, quote in (("plain.csv", ""), ("quoted.csv", '"')):
        file = folder / name
        lines = [f"{quote}photos/{i:02}.jpg{quote},{quote}{['cat', 'dog'][i % 2]}{quote},{i}" for i in range(60)]
        file.write_text("\n".join(["path,label,note", *lines]) + "\n")
        yield Case(file, read, text=True)


def _pair(folder: Path, path: str, name: str) -> tuple[str, str]:
    """As far as index may mend it, and says so: spaces, Unicode's form and case of a class, slashes of a path."""
    plain = unicodedata.normalize("NFC", " ".join(name.split())).casefold()
    return os.path.normpath(folder / path.strip().replace("\\", "/")), plain


# Checkpoints ----------------------------------------------------------------------------------------------


def _checkpoint(folder: Path) -> Iterator[Case]:
    import torch

    from thawline.trainer.checkpoints import checkpoint
    from thawline.trainer.checkpoints.format import name_of

    def content(step: int) -> dict[str, dict[str, Any]]:
        torch.manual_seed(step)
        return {"model": {"w": torch.randn(30, 7), "n": torch.arange(5)}, "state": {"step": step, "names": ["a", "b"]}}

    def read(file: Path) -> str:
        saved, skipped = checkpoint.newest(folder)
        if saved is None:
            return "other"
        loaded = {part: saved.load(part) for part in saved.parts}
        if repr(loaded) != repr(content(saved.step)) or saved.metrics != {"loss": saved.step / 8}:
            return "other"
        return "same" if saved.step == 2 else "told" if skipped else "other"

    for step in (1, 2):
        checkpoint.save(folder, step, content(step), keep=2, metrics={"loss": step / 8})
    for file in sorted(Path(folder, name_of(2)).iterdir()):
        yield Case(file, read, text=file.suffix == ".json")


KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "manifest.parquet": lambda folder: _manifest(folder, "parquet"),
    "manifest.arrow": lambda folder: _manifest(folder, "arrow"),
    "shard": _shard,
    "job.toml": _job,
    "csv": _csv,
    "checkpoint": _checkpoint,
}


def _planted(folder: Path) -> Iterator[Case]:
    """What the campaign must see: in turn, by the bytes, all is well, a death, an error of nobody's, other content."""

    def read(file: Path) -> str:
        kind = file.stat().st_size and sum(file.read_bytes()) % 4
        if kind == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == 2:
            raise ValueError("nobody's")
        return "other" if kind == 3 else "same"

    (folder / "planted").write_bytes(bytes(200))
    yield Case(folder / "planted", read)
