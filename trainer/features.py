"""What does a frozen body say of each image? Computed once in a phase, and kept in memory for its further epochs.

It pays where the head alone trains for several epochs. The body is in evaluation mode, so that what it says depends on
the image alone; which of its augmentations an image comes in repeats after as many epochs as views are kept. A step
that has all of its features takes them from memory, and no image is read; another takes its batch from the loader, and
keeps what it computes. What ranks have computed they give one another at the end of each window, so each rank keeps
images x views features. Whether they fit is checked before training (see cluster.machine.memory).

Nothing is kept beyond the phase, or in a checkpoint: a run that goes on computes anew what it needs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from thawline.dataio.batch import Batch, Loader, Repeatable
from thawline.models.folding import folded, in_two
from thawline.trainer.errors import RecipeError
from thawline.trainer.step import world
from thawline.trainer.step.precision import autocast, cast_inputs
from thawline.trainer.step.step import StepSettings

Key = tuple[int, ...]


class Features:
    """The features of a phase in which the head alone trains, and the batches made of them."""

    def __init__(self, model: nn.Module, loader: Loader, settings: StepSettings, *, views: int) -> None:
        """model: frozen to its head, its BatchNorm frozen. views: in how many augmentations each image comes."""
        assert isinstance(loader, Repeatable), "see `check`"
        self._front, self.head = in_two(folded(model, -1))
        self._loader, self._settings = loader.repeated(views), settings
        self._stream: Iterator[Batch] | None = None
        self._next = -1
        self._rows = views * loader.samples
        self._places: dict[Key, int] = {}
        self._kept: tuple[Tensor, ...] = ()
        self._own: list[tuple[list[Key], Tensor, Tensor]] = []

    def batch(self, step: int) -> Batch:
        """This rank's local batch of a step, its inputs the features: (N, ...) on the device."""
        keys = self._loader.planned(step)
        if all(key in self._places for key in keys):
            self._stream = None  # its images are not wanted
            return self._remembered(keys)
        if self._stream is None or self._next != step:
            self._stream = self._loader.stream(step)
        batch, self._next = next(self._stream), step + 1
        precision, device = self._settings.precision, self._settings.device
        with torch.no_grad(), autocast(precision, device):
            features = self._front(*cast_inputs(batch.arguments, precision))
        keys = self._loader.planned(step)  # a file may have turned out unusable meanwhile
        if [key[-1] for key in keys] == batch.ids.tolist():
            self._keep(keys, features, batch.targets)
            self._own.append((keys, features, batch.targets))
        return Batch(features, batch.targets, batch.ids)

    def share(self) -> None:
        """Give the other ranks what this one has computed since, and take theirs. Collective."""
        own, self._own = self._own, []
        if world.world_size() == 1:
            return
        mine = [torch.cat(column) for column in list(zip(*own, strict=True))[1:]] if own else []
        device = self._settings.device
        for named, tensors in world.gather_tensors(mine, [key for keys, _, _ in own for key in keys]):
            if tensors:
                features, targets = (each.to(device) for each in tensors)
                self._keep([tuple(key) for key in named], features, targets)

    def _keep(self, keys: list[Key], features: Tensor, targets: Tensor) -> None:
        new = {key: i for i, key in reversed([*enumerate(keys)]) if key not in self._places}
        if not new:
            return
        rows = torch.tensor([*new.values()], device=features.device)
        first = len(self._places)
        self._places |= {key: first + i for i, key in enumerate(new)}
        self._reserve(features, targets)
        for kept, given in zip(self._kept, (features, targets), strict=True):
            kept[first : len(self._places)] = given[rows]

    def _reserve(self, features: Tensor, targets: Tensor) -> None:
        """Allocate rows for all images at once: no copy is made later. On a CPU, pages are used only when filled."""
        reserved, needed = len(self._kept[0]) if self._kept else 0, len(self._places)
        if needed <= reserved:
            return
        rows = max(self._rows, 2 * reserved, needed)  # a phase with several image sizes needs more
        larger = tuple(tensor.new_empty((rows, *tensor.shape[1:])) for tensor in (features, targets))
        for new, kept in zip(larger, self._kept, strict=False):
            new[:reserved] = kept
        self._kept = larger

    def _remembered(self, keys: list[Key]) -> Batch:
        features, targets = self._kept
        rows = torch.tensor([self._places[key] for key in keys])
        if features.device.type == "cuda":  # from pageable memory the copy would wait for the stream
            rows = rows.pin_memory().to(features.device, non_blocking=True)
        return Batch(features[rows], targets[rows], torch.tensor([key[-1] for key in keys]))


def check(views: int, model: nn.Module, train: Loader, *, frozen_norms: bool, mixes: bool) -> None:
    """Raises RecipeError where features cannot be kept: what is before the head must depend on the image alone."""
    if not views:
        return
    asked = f"cache_features={views}"
    if not frozen_norms:
        raise RecipeError(
            f"{asked} while BatchNorm trains: what the body says of an image would change from step to step; give "
            "batch_norm = 'frozen', or cache_features = 0"
        )
    if mixes:
        raise RecipeError(
            f"{asked} with mixed batches (MixUp, CutMix): no image comes twice as it was; give mixup = 0 and "
            "cutmix = 0, or cache_features = 0"
        )
    if not isinstance(train, Repeatable):
        raise RecipeError(
            f"{asked} for {type(train).__name__}, which does not tell its samples before it loads them: nothing could "
            "be looked up; give 0"
        )
    in_two(model)
