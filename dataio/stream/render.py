"""What does a model see of images? The pixels of validation, from encoded files wherever they lie: no manifest.

A file is accepted, and decoded by the same library, as in a run; one that cannot be used is told and passed over.
`render` is for one image; whoever has many keeps a Renderer, whose engine takes longer to make than an image to render.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from thawline.dataio.ahead import READERS, read_ahead
from thawline.dataio.checks.verify import GROUP, Check, checking
from thawline.dataio.cores import usable_cores
from thawline.dataio.errors import EngineError
from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.pictures import MAX_PIXELS, as_file
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.reading.readers import Reason, for_engines
from thawline.dataio.store import files
from thawline.dataio.stream.renderer import EngineName, Renderer, choose_engine

T = TypeVar("T")
_SEED = 0  # of augmented views, which are a function of an image's bytes and the view's number


@dataclass(frozen=True)
class Sound:
    """A file that every engine decodes, and the size of its picture, upright."""

    encoded: NDArray[np.uint8]
    """(bytes,) uint8"""
    width: int
    height: int
    key: int
    """The hash of its bytes, by which augmented views are drawn."""


Content = bytes | NDArray[np.uint8] | Sound
"""An encoded file, pixels (H, W, 3) uint8, or a file that was checked already."""


@dataclass(frozen=True)
class Item:
    """An image to render."""

    name: str
    """For messages."""
    content: Content | Callable[[], Content | Reason]
    """Or what reads it, in a thread: it returns why it cannot, or raises OSError."""


@dataclass(frozen=True)
class Rendered:
    """A batch of images as a model sees them."""

    numbers: list[int]
    """n places among all images, counted from 0, rising."""
    inputs: Tensor
    """(n, 3, size_px, size_px), normalised."""
    geometry: geometry.Geometry
    """How validation sees these n images, whatever the view."""
    view: int
    """0: as validation does. 1, 2, ...: augmented, the images of the last view 0."""


Tell = Callable[[int, Reason], None]
"""(an image's place among all, why it cannot be used)."""


class _Found(NamedTuple):
    """An image between the steps on its way to an engine."""

    number: int
    name: str
    content: Content | Reason


def rendered(
    items: Iterable[Item], renderer: Renderer, *, views: int = 0, tell: Tell, reading: int = READERS
) -> Iterator[Rendered]:
    """The images that can be used, in order, in batches of `renderer.local_batch`, each followed by its augmented
    `views`.

    No more than a few batches are read ahead. tell: called for an image that cannot be used, before the batch after it
    is yielded, from the thread that asks for batches. reading: images that are read at the same time.
    """
    sizes, broken, threads = dict[int, tuple[int, int]](), set[int](), usable_cores()

    def tell_once(number: int, reason: Reason) -> None:
        if number not in broken:
            broken.add(number)
            tell(number, reason)

    def mend(work: Work, reasons: Mapping[int, Reason]) -> Work:
        for i, reason in reasons.items():
            tell_once(int(work.ids[i]), reason)
        return _without(work, reasons)

    def works() -> Iterator[Work]:
        read = read_ahead(_read, enumerate(items), ahead=2 * reading, threads=reading)
        checked = read_ahead(partial(_checked, check), _grouped(read, GROUP), ahead=2 * threads, threads=threads)
        for group in _grouped(_sound(checked, tell_once), renderer.local_batch):
            sizes.update({number: (sound.height, sound.width) for number, _, sound in group})
            yield from (_work(group, renderer.spec, view) for view in range(views + 1))

    with checking(compare=renderer.choice.engine == "dali") as check:
        for batch in renderer.batches(works(), mend):
            numbers, view = batch.ids.tolist(), int(batch.targets[0])
            take = sizes.pop if view == views else sizes.__getitem__
            heights, widths = np.array([take(number) for number in numbers], np.int32).T
            yield Rendered(numbers, batch.inputs, geometry.centred(renderer.spec, widths=widths, heights=heights), view)


def render(
    encoded: bytes,
    spec: ImageSpec,
    *,
    engine: EngineName = "auto",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "the image",
) -> Tensor:
    """An encoded image as a model that was validated with `spec` sees it: (1, 3, size_px, size_px), normalised.

    engine: the one that validation ran with gives the same pixels, bit by bit. name: of the image, in errors.
    Raises: EngineError for a file that cannot be used, or an engine that is not installed.
    """

    def refuse(number: int, reason: Reason) -> None:
        raise EngineError(f"{name} cannot be used ({reason}): a model sees nothing of it; give another image")

    with Renderer(
        spec=spec, local_batch=1, device=device or torch.device("cpu"), dtype=dtype, choice=choose_engine(engine)
    ) as renderer:
        (batch,) = rendered([Item(name, encoded)], renderer, tell=refuse)
    return batch.inputs


@contextmanager
def accepting(*, max_pixels: int = MAX_PIXELS, compare: bool) -> Iterator[Callable[[bytes], Sound | Reason]]:
    """Within: (an encoded file) -> what an Item may hold, or why it cannot be used; from any thread. For whoever has
    images come one by one, and decodes them before their batch is made.

    max_pixels: of an image, which is not decoded beyond. compare: whether DALI will render them, see `checking`.
    """
    with checking(max_pixels=max_pixels, compare=compare) as check:

        def accepted(encoded: bytes) -> Sound | Reason:
            return _as_sound(encoded, iter(check([encoded])))

        yield accepted


def _read(numbered: tuple[int, Item]) -> _Found:
    number, item = numbered
    try:
        return _Found(number, item.name, item.content() if callable(item.content) else item.content)
    except OSError as error:
        return _Found(number, item.name, files.why_unreadable(error))


def _checked(check: Callable[[list[bytes]], list[Check]], group: list[_Found]) -> list[_Found]:
    """The same, each `Sound` or the reason why it is not."""
    checks = iter(check([found.content for found in group if isinstance(found.content, bytes)]))
    return [found._replace(content=_as_sound(found.content, checks)) for found in group]


def _as_sound(content: Content | Reason, checks: Iterator[Check]) -> Sound | Reason:
    if isinstance(content, np.ndarray):
        height, width = content.shape[:2]
        made = as_file(content)
        return Sound(made, width, height, xxhash.xxh3_64_intdigest(made.data))
    if not isinstance(content, bytes):
        return content
    check = next(checks)
    if check.status != "ok":
        return check.status
    file = for_engines(files.as_array(content), pillow=check.codec == "pillow")
    assert check.width is not None
    assert check.height is not None
    return file if isinstance(file, str) else Sound(file, check.width, check.height, check.hash or 0)


def _sound(groups: Iterable[list[_Found]], tell: Tell) -> Iterator[tuple[int, str, Sound]]:
    for number, name, content in (found for group in groups for found in group):
        if isinstance(content, Sound):
            yield number, name, content
        else:
            tell(number, str(content))


def _work(group: list[tuple[int, str, Sound]], spec: ImageSpec, view: int) -> Work:
    numbers, names, sound = zip(*group, strict=True)
    heights, widths = np.array([(each.height, each.width) for each in sound], np.int32).T
    if view:
        keys = np.array([each.key for each in sound], np.uint64).astype(np.int64)
        epochs = np.full(len(group), view - 1)
        drawn = geometry.draw(spec, seed=_SEED, epochs=epochs, ids=keys, widths=widths, heights=heights)
    else:
        drawn = geometry.centred(spec, widths=widths, heights=heights)
    return Work(
        encoded=[each.encoded for each in sound],
        paths=list(names),
        geometry=drawn,
        ids=np.array(numbers, np.int64),
        targets=np.full(len(group), view),
        size_px=spec.size_px,
        positions=np.array(numbers, np.int64),
    )


def _without(work: Work, broken: Mapping[int, Reason]) -> Work:
    """The work without the files at these indices."""
    kept = [i for i in range(len(work.ids)) if i not in broken]
    return replace(
        work,
        encoded=[work.encoded[i] for i in kept],
        paths=[work.paths[i] for i in kept],
        geometry=work.geometry.chosen(np.array(kept, np.int64)),
        ids=work.ids[kept],
        targets=work.targets[kept],
        positions=work.positions[kept],
    )


def _grouped(items: Iterable[T], most: int) -> Iterator[list[T]]:
    """Lists of as many items, the last one shorter."""
    rest = iter(items)
    while group := list(islice(rest, most)):
        yield group
