"""Does a batch fit into memory? Estimated from the manifest before anything is decoded.

On a GPU, running out of memory is an error, and the step is repeated in smaller micro-batches (see step.recovery). On a
CPU the kernel kills the process. So a step's need is estimated: decoded images, by their sizes in the manifest; the
batches ahead of the step; and what the forward pass keeps for the backward pass, measured on two images. The memory for
the features of a frozen body (see trainer.features) is estimated on both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import nn

from thawline.cluster.errors import LaunchError
from thawline.dataio.stream.loader import ImageLoader
from thawline.models.folding import in_two

_CGROUP = Path("/sys/fs/cgroup")
_LARGE_PX = 89_478_485
"""Images of this size are worth a note: Pillow calls them decompression bombs; decoded, one has 256 MiB."""
_SPREAD = 6.0
"""Standard deviations that a batch's sum may lie above its mean."""
_COPIES = 7
"""Copies of an image while the reference engine decodes and warps it; measured on 6000 x 6000."""
_BATCHES = 10
"""Bytes for each value of the model's input: float32 in the step and ahead of it, bytes in DALI's queue."""
_KEY_BYTES = 250
"""For the table that finds an image's features; 170 measured on a million, and room to grow."""
_FOR_FEATURES = 0.5
"""Share of the free memory: a step, the batches ahead of it and other processes need some, too."""


def check_memory(
    loaders: Sequence[ImageLoader],
    *,
    ranks_here: int,
    tell: Callable[[str], None] = lambda text: None,
    kept_bytes: float = 0.0,
) -> None:
    """Raises LaunchError where a step of these loaders' batches does not fit into the memory of their device.

    ranks_here: ranks on this machine. kept_bytes: what the forward pass keeps for a training image (see
    `kept_by_forward`). tell: takes a sentence on images that are large for any machine.
    """
    free, ranks_here, owner = _free(loaders[0].renderer.device, ranks_here)
    kept_by_loader = [kept_bytes if loader.order.endless else 0.0 for loader in loaders]
    if all(_roomy(*each, free / ranks_here) for each in zip(loaders, kept_by_loader, strict=True)):
        return
    needs = [_Needs(*each) for each in zip(loaders, kept_by_loader, strict=True)]
    worst = max(needs, key=lambda need: need.step_bytes(need.batch))
    total = ranks_here * worst.step_bytes(worst.batch)
    pictures = f"the largest, {worst.largest}, has {worst.pixels:,} pixels"
    if total <= free:
        if worst.pixels >= _LARGE_PX:
            tell(
                f"a batch of {worst.batch} images may hold {_gb(worst.decoded_bytes(worst.batch))} of decoded pixels: "
                f"{pictures}; `thawline index --max-pixels` leaves such images out"
            )
        return
    fits = worst.largest_batch(free / ranks_here)
    share = (
        ""
        if worst.decoded_bytes(worst.batch) < 0.5 * worst.step_bytes(worst.batch)
        else f", most of it decoded pixels: {pictures}"
    )
    remedy = f"give --data.global-batch {fits * worst.loader.order.world_size} or less"
    if fits < 2:
        remedy = "leave the largest out with `thawline index --max-pixels`, or train where there is more"
    raise LaunchError(
        f"a step of {worst.batch} images a worker needs about {_gb(total)} of memory, and this {owner} has {_gb(free)} "
        f"left for {ranks_here} worker(s){share}: the run would be killed; {remedy}"
    )


def check_features(model: nn.Module, train: ImageLoader, *, views: int, ranks_here: int) -> str:
    """Raises LaunchError where the features of `views` views of all images do not fit; see trainer.features.

    Each rank keeps the features of all images. Returns a sentence with the memory that they need.
    """
    free, ranks_here, owner = _free(train.renderer.device, ranks_here)
    each = _features_bytes(model, train.spec.size_px) + _KEY_BYTES
    total = ranks_here * views * train.samples * each
    if total <= _FOR_FEATURES * free:
        return (
            f"fit.cache_features={views}: features of {train.samples:,} images will take up to {_gb(total)} of memory"
        )
    fits = int(_FOR_FEATURES * free / (total / views))
    raise LaunchError(
        f"fit.cache_features={views} keeps {each / 1e3:,.1f} kB of each of {train.samples:,} images, {_gb(total)} for "
        f"{ranks_here} worker(s), and may take half of the {_gb(free)} that this {owner} has left: the run would be "
        f"killed; give fit.cache_features={fits}, or train where there is more"
    )


def _free(device: torch.device, ranks_here: int) -> tuple[float, int, str]:
    """(free bytes, ranks that share them, whose they are) for training on a device."""
    if device.type == "cpu":
        return available_bytes(), ranks_here, "machine"
    return torch.cuda.mem_get_info(device)[0], 1, "GPU"


def _roomy(loader: ImageLoader, kept_bytes: float, free: float) -> bool:
    """Whether even a batch of the widest and highest image fits: a closer look at ten million rows takes seconds."""
    table = loader.subset.table
    width, height = (float(pc.max(table[name]).as_py() or 0) for name in ("width", "height"))
    batch, copies = (loader.order.local_batch, 1) if loader.engine == "dali" else (loader.renderer.threads, _COPIES)
    image_bytes = _image_bytes(loader, kept_bytes)
    return (
        width * height < _LARGE_PX
        and 3 * width * height * batch * copies + loader.order.local_batch * image_bytes <= free
    )


def _image_bytes(loader: ImageLoader, kept_bytes: float) -> float:
    """Bytes that an image of a batch needs in addition to its decoded pixels."""
    return 3 * _BATCHES * float(max(loader.size_px(0), loader.spec.size_px)) ** 2 + kept_bytes


class _Needs:
    """What one rank's batches of a loader need, in bytes, by the images in them."""

    def __init__(self, loader: ImageLoader, kept_bytes: float) -> None:
        self.loader, self.batch = loader, loader.order.local_batch
        table, rows = loader.subset.table, loader.subset.rows
        sides = [table[name].fill_null(0).to_numpy()[rows].astype(np.float64) for name in ("width", "height")]
        area: NDArray[np.float64] = sides[0] * sides[1]
        first = int(area.argmax())
        self.pixels = int(area[first])
        self.largest = loader.source.reader.where(loader.subset.take(np.array([first])), 0)
        self._mean, self._std = 3 * float(area.mean()), 3 * float(area.std())
        largest_batch = min(self.batch, len(area))
        self._sums = np.cumsum(3 * np.sort(np.partition(area, len(area) - largest_batch)[-largest_batch:])[::-1])
        self._image_bytes = _image_bytes(loader, kept_bytes)

    def decoded_bytes(self, batch: int) -> float:
        """Bytes of decoded source images in memory at the same time: a likely upper limit."""
        if self.loader.engine == "reference":  # one after another, in each of its threads
            return _COPIES * 3.0 * self.pixels * min(batch, max(1, self.loader.renderer.threads))
        likely = batch * self._mean + _SPREAD * self._std * batch**0.5 + 3.0 * self.pixels
        return float(min(likely, self._sums[min(batch, len(self._sums)) - 1])) if batch else 0.0

    def step_bytes(self, batch: int) -> float:
        """Bytes that a step of this many images needs."""
        return self.decoded_bytes(batch) + batch * self._image_bytes

    def largest_batch(self, free: float) -> int:
        """The largest batch that needs no more than `free`; 0 where none does."""
        low, high = 0, self.batch
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.step_bytes(middle) <= free else (low, middle - 1)
        return low


def kept_by_forward(model: nn.Module, size_px: int, *, micro_batches: int = 1) -> float:
    """Bytes that the forward pass of `model` keeps for the backward pass of each image, on the CPU.

    micro_batches: of a step. The model and the random state stay as they are.
    """
    sizes: dict[int, int] = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    device = next(model.parameters()).device
    with _evaluating(model):  # the same tensors as in training, except dropout's
        images = torch.zeros(2, 3, size_px, size_px, device=device)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(images)
            del output
    return sum(sizes.values()) / 2 / micro_batches


def _features_bytes(model: nn.Module, size_px: int) -> int:
    """Bytes of an image's features, in float32. Raises ModelError for a model whose features cannot be kept."""
    front, _ = in_two(model)
    with _evaluating(model), torch.inference_mode():
        features = front(torch.zeros(1, 3, size_px, size_px, device=next(model.parameters()).device))
    return int(features.nbytes)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which statistics stay as they are; the modes of before at the end."""
    modes: list[tuple[Any, bool]] = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def available_bytes() -> int:
    """Memory that this process may still allocate: the machine's, or what is left of its control group's."""
    free = int(psutil.virtual_memory().available)
    for limit, usage, cache in _limits():
        try:
            stat = dict(line.split() for line in (cache.read_text().splitlines()))
            reclaimable = int(stat.get("inactive_file", 0))
            free = min(free, int(limit.read_text()) - int(usage.read_text()) + reclaimable)
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return max(0, free)


def _limits() -> list[tuple[Path, Path, Path]]:
    """(limit, usage, statistics) of this process's control group and those above it, versions 2 and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    group = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    folders = [_CGROUP / group, *(_CGROUP / group).parents]
    groups = [folder for folder in folders if folder == _CGROUP or _CGROUP in folder.parents]
    old = _CGROUP / "memory"
    return [
        *((folder / "memory.max", folder / "memory.current", folder / "memory.stat") for folder in groups),
        (old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat"),
    ]


def _gb(amount: float) -> str:
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e8 else f"{amount / 1e6:,.1f} MB"
