"""What can be typed about images? sample, index, pack: pictures to try things with, manifests, shards."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from thawline.cluster.cli.index_options import IndexOptions
from thawline.cluster.cli.verbs import Verb
from thawline.cluster.words import say


@dataclass(frozen=True, kw_only=True)
class Sample(Verb):
    """Write sample images to train on, or trained weights."""

    what: Positional[Literal["digits", "pets", "shapes", "weights"]]
    """digits: scikit-learn's 1,797 handwritten digits, 96 px. pets: the Oxford-IIIT Pet photos, 0.8 GB to download; an
    interrupted download goes on. shapes: drawn here, 64 px, their truth known, for --task. weights: ImageNet's of
    timm/tf_efficientnet_lite0, as FILE.safetensors, without a network."""
    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Where to write them: digits as 7_0123.jpg and so on, pets below oxford-iiit-pet, shapes below images with their
    labels in shapes.csv."""
    task: Literal["single_label", "multi_label", "number", "points", "mask"] = "single_label"
    """Of shapes: what is to be learned of them."""
    count: int = 6000
    """Of shapes: how many pictures."""
    seed: int = 0
    """Of shapes: which ones."""

    def run(self) -> int:
        """Print the folder of pets, or the list of shapes."""
        from thawline.dataio.samples import fetch_pets, write_digits

        if self.what == "digits":
            count = write_digits(self.folder)
            say(f"{count} images in {self.folder}")
            return 0
        if self.what in ("shapes", "weights"):
            print(self._shapes() if self.what == "shapes" else self._weights())
            return 0
        with _transfer() as progress:
            images = fetch_pets(self.folder, progress=progress)
        label = r"--label 'regex:(.+)_\d+\.jpg$'"
        say(f"next: thawline index {shlex.quote(str(images))} {label} --out pets.parquet")
        print(images)
        return 0

    def _weights(self) -> Path:
        """Write them, and say what to type next. Returns their file."""
        from thawline.dataio.store.atomic import atomic_write
        from thawline.dataio.store.root import Root
        from thawline.models.weights.samples import MODEL, efficientnet_lite0

        file = self.folder if self.folder.suffix == ".safetensors" else self.folder.with_suffix(".safetensors")
        data = efficientnet_lite0()
        with atomic_write(Root.of(file.parent), file.name) as sink:
            sink.write(data)
        say(f"next: thawline train JOB --model.name {MODEL} --model.weights {shlex.quote(str(file))}")
        return file

    def _shapes(self) -> Path:
        """Write them, and say what to type next. Returns their list."""
        from thawline.dataio.shapes import CSV, write_shapes

        index, train = write_shapes(self.folder, self.task, count=self.count, seed=self.seed)
        listed, manifest = self.folder / CSV, f"{self.folder.name or 'shapes'}.parquet"
        say(f"next: thawline index {shlex.quote(str(listed))} {index} --out {shlex.quote(manifest)}")
        say(f"then: thawline train {shlex.quote(manifest)} {train}")
        return listed


@contextmanager
def _transfer() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show how far files have come: a bar on a terminal, a line every tenth elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    known: dict[str, Any] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:

        def show(name: str, done: int, total: int | None) -> None:
            if console.is_terminal:
                if name not in known:
                    known[name] = bar.add_task(name)
                bar.update(known[name], completed=done, total=total)
            elif total and (tenth := 10 * done // total) != known.get(name):
                known[name] = tenth
                say(f"{name}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

        yield show


@dataclass(frozen=True, kw_only=True)
class Index(Verb):
    """Make a manifest: which images there are, their labels, and which are for validation and test."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder of images, or a CSV, TSV, JSON-lines, Parquet or Arrow file with a column of paths, also gzipped; or the
    URI of one (s3://, gs://, hdfs://)."""
    out: Annotated[str, arg(metavar="FILE")]
    """The manifest to write: .parquet, or .arrow, which opens at once however large."""
    options: Annotated[IndexOptions, arg(name="")] = field(default_factory=IndexOptions)

    def run(self) -> int:
        """Print the manifest's path."""
        from thawline.cluster.cli.index import described, make_manifest
        from thawline.dataio.store.outputs import check_output

        classes = self.options.classes
        check_output(self.out, read=[self.source, *([classes] if classes else [])])  # before minutes of decoding
        manifest = make_manifest(self.source, **vars(self.options))
        manifest.save(self.out)
        say(described(manifest))
        print(self.out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Pack(Verb):
    """Pack a manifest's images into shards: Arrow files that training maps into memory, or downloads once a machine
    from an object store. The same command continues an interrupted pack."""

    manifest: Annotated[Positional[str], arg(metavar="MANIFEST")]
    """A manifest, as `thawline index` made it."""
    dest: Annotated[Positional[str], arg(metavar="DEST")]
    """A folder, or a URI such as s3://bucket/photos; train on the manifest.arrow in it."""
    max_side_px: Annotated[int | None, arg(metavar="INT")] = None
    """Longer side, in pixels, to which larger images are scaled down."""
    quality: int = 92
    """JPEG quality of images that are scaled down, 1 to 100."""
    shard_mib: int = 512
    """Approximate size of a shard in MiB."""
    max_bad: float = 0.01
    """Share of the images that may be missing or changed since they were indexed."""
    check: bool = False
    """Only check what was packed there, and report damage (exit status 1)."""

    def run(self) -> int:
        """Print the path of the shards' manifest."""
        from thawline.cluster.cli.pack import MANIFEST, check_shards, pack_shards
        from thawline.dataio.store.root import Root

        if self.check:
            damages = check_shards(self.manifest, self.dest)
            say("\n".join([*damages, f"{len(damages)} damages" if damages else "whole"]))
            return 1 if damages else 0
        packed = pack_shards(
            self.manifest,
            self.dest,
            max_side_px=self.max_side_px,
            quality=self.quality,
            shard_mib=self.shard_mib,
            max_bad=self.max_bad,
        )
        say(packed.summary())
        print(Root.of(packed.home).full(MANIFEST))
        return 0
