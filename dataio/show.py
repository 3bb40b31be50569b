"""What happens to one sample, and what do batches look like? For people: text and pictures, no training."""

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from thawline.dataio.errors import ManifestError
from thawline.dataio.pixels.geometry import Geometry, project
from thawline.dataio.pixels.pictures import VOID, decode
from thawline.dataio.pixels.reference import render_mask
from thawline.dataio.pixels.spec import ImageSpec
from thawline.dataio.pixels.work import Work
from thawline.dataio.stream.loader import ImageLoader
from thawline.dataio.table.tasks import TASKS

_CELL_IN, _TITLE_LETTERS = 1.5, 20  # as many letters of 9 points as are about as wide as a cell
_SPLITS = {"train": "training", "valid": "validation", "test": "test"}


def explain(loader: ImageLoader, *, position: int = 0) -> str:
    """One sample through every step, with shapes, then the batch it travels in. Returns lines of text.

    position: in the stream (training) or the row (validation).
    Raises: ManifestError for a position that is not there, or an image that cannot be used any more.
    """
    split = _SPLITS[loader.subset.table["split"][int(loader.subset.rows[0])].as_py()]
    work = _work(loader, position, split)
    spec, geometry = loader.spec, work.geometry
    height, width = decode(work.encoded[0], path=work.paths[0]).shape[:2]
    filter_h, filter_w = (int(v) for v in geometry.prefilter_px[0])
    matrix = geometry.homographies[0]
    scale, shift, saturation = geometry.scale[0, 0], geometry.shift[0, 0], geometry.saturation[0]
    size = float(work.size_px)
    corners = np.array([[[0, 0], [size, 0], [size, size], [0, size]]], np.float64)
    seen = project(matrix[None], corners)[0]
    batch = next(loader.stream())
    epoch = f"epoch {position // loader.samples}, " if loader.order.endless else ""
    lines = [
        f"{split} sample: {epoch}position {position}, id {work.ids[0]}",
        f"  file       {work.paths[0]}  {len(work.encoded[0]):,} bytes",
        f"  target     {DRAWINGS[loader.task].words(_target(work, spec), loader.classes, work.size_px)}",
        f"  decoded    ({height}, {width}, 3) uint8 RGB, upright",
        f"  prefilter  {f'({filter_h}, {filter_w}, 3): the warp alone would alias' if filter_h else 'not needed'}",
        f"  warp       ({work.size_px}, {work.size_px}, 3) uint8, one bilinear interpolation, {spec.border} border",
        "             the model's corners see x,y = " + "  ".join(f"{x:.1f},{y:.1f}" for x, y in seen),
        *(f"             [{row[0]:9.4f} {row[1]:9.4f} {row[2]:9.4f}]" for row in matrix),
        *([f"  mirrored   {_mirror_words(loader, geometry)}"] if TASKS[loader.task].sided else []),
        *([f"  saturation {saturation:.3f}"] if spec.max_saturation else []),
        f"  lighting   y = {scale:.3f} x {'+' if shift >= 0 else '-'} {abs(shift):.3f}, then (y - mean) / std",
        f"engine: {loader.engine} on {loader.renderer.device} ({loader.renderer.choice.reason})",
        f"batch: images {_shape(batch.inputs)} channels_last, mean {batch.inputs.float().mean():.3f}, "
        f"std {batch.inputs.float().std():.3f}",
        f"       targets {_shape(batch.targets)}, ids {_shape(batch.ids)}",
        f"split: {loader.samples:,} samples, {len(loader.classes)} classes; global batch {loader.global_batch}"
        + (f", {loader.steps(1)} steps an epoch" if loader.order.endless else ""),
    ]
    return "\n".join(lines)


def _work(loader: ImageLoader, position: int, split: str) -> Work:
    """What is rendered at a position. Raises ManifestError."""
    if position < 0 or (position >= loader.samples and not loader.order.endless):
        most = "" if loader.order.endless else f" to {loader.samples - 1:,}"
        raise ManifestError(
            f"position {position:,} is not in the {split} split of {loader.samples:,} images, so there is nothing to "
            f"explain: give 0{most or ' or more'}"
        )
    work = loader.source.work(np.array([position], np.int64), size_px=loader.size_px(position // loader.global_batch))
    if not len(work.ids):
        lost = loader.quarantined[int(loader.subset.ids[position])]
        raise ManifestError(
            f"the {split} image at position {position:,} cannot be used ({lost}), so there is nothing to explain: "
            "bring the file back, index again, or give another position"
        )
    return work


def denormalise(images: torch.Tensor, spec: ImageSpec) -> NDArray[np.float32]:
    """(N, 3, H, W) as the model sees them -> (N, H, W, 3) float32 in [0, 1] as people do."""
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    return np.clip(pixels * np.array(spec.std, np.float32) + np.array(spec.mean, np.float32), 0, 1)


def show_batch(loader: ImageLoader, *, rows: int = 3, cols: int = 4) -> Figure:
    """A grid of samples as the model sees them, with their targets: names, points, or the mask over the image."""
    wanted = rows * cols
    images: list[NDArray[np.float32]] = []
    targets: list[Any] = []
    for batch in loader.stream():
        images.extend(denormalise(batch.inputs, loader.spec))
        targets.extend(batch.targets.cpu().numpy())
        if len(images) >= wanted:
            break
    images, targets = images[:wanted], targets[:wanted]
    drawing = DRAWINGS[loader.task]
    titles = ["" if drawing.over else drawing.words(it, loader.classes, loader.spec.size_px) for it in targets]
    figure = grid(images, titles, cols=cols)
    if drawing.over:
        for axes, target in zip(figure.axes, targets, strict=False):
            drawing.over(axes, target, len(loader.classes))
    return figure


def grid(
    images: list[NDArray[np.float32]], titles: list[str], *, cols: int, colours: list[str] | None = None
) -> Figure:
    """Images, (H, W, 3) float in [0, 1], in rows of `cols`, each under its title, which has four lines at most."""
    rows = max(1, -(-len(images) // cols))
    words = ["\n".join(wrap(title, _TITLE_LETTERS, max_lines=4, placeholder=" ...")) for title in titles]
    title_in = 0.15 * max((text.count("\n") + 1 for text in words), default=1) + 0.1
    figure = Figure(figsize=(cols * _CELL_IN, rows * (_CELL_IN + title_in)))
    # Margins are set by hand: a layout engine measures every letter twice, which was most of the time of a report.
    margin, top = 0.05 / figure.get_figwidth(), 1 - title_in / figure.get_figheight()
    places = {
        "left": margin,
        "right": 1 - margin,
        "bottom": 0.0,
        "top": top,
        "wspace": 0.05,
        "hspace": title_in / _CELL_IN,
    }
    cells = figure.subplots(rows, cols, squeeze=False, gridspec_kw=places, subplot_kw={"xticks": [], "yticks": []})
    for axes in cells.flat:
        axes.set_axis_off()
    for i, (axes, image, title) in enumerate(zip(cells.flat, images, words, strict=False)):
        axes.imshow(image, interpolation="nearest")
        # A class may be called under_$50: that is no formula.
        axes.set_title(title, fontsize=9, pad=3, color=colours[i] if colours else "black", parse_math=False)
    return figure


def _target(work: Work, spec: ImageSpec) -> Any:
    """The first sample's target as the model gets it."""
    return work.targets[0] if work.masks is None else render_mask(work, 0, spec).numpy()


def _mirror_words(loader: ImageLoader, geometry: Geometry) -> str:
    """Whether the first sample is a mirror image, and whose names that changes."""
    if not geometry.mirrored[0]:
        return "no"
    pairs = [f"{one} and {other}" for one, other in loader.source.manifest.swap or ()]
    return f"yes: {', '.join(pairs)} change places" if pairs else "yes"


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


# What targets look like -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """How people are shown a target of one task."""

    words: Callable[[Any, tuple[str, ...], int], str]
    """(target as the model gets it, classes, size_px) -> in one line."""
    over: Callable[[Axes, Any, int], None] | None = None
    """(axes that show the image, target, number of classes): draws it there; None for what is words alone."""
    predicted: Callable[[Any], Any] | None = None
    """(prediction as tables of predictions have it) -> as a target; None where they do not have all of it."""
    decided: Callable[[NDArray[np.float32]], Any] | None = None
    """(outputs of the model for one image) -> as a target, where tables of predictions do not have all of it."""
    true_over: Callable[[Axes, Any, int], None] | None = None
    """As `over`, for a true target beside a predicted one: told from it by its form, not by its colour."""
    legend: str = ""
    """How the two differ, in words."""


def _class_words(target: Any, classes: tuple[str, ...], size_px: int) -> str:
    return classes[int(target)]


def _classes_words(target: Any, classes: tuple[str, ...], size_px: int) -> str:
    return ", ".join(name for name, yes in zip(classes, target, strict=True) if yes) or "(none)"


def _number_words(target: Any, classes: tuple[str, ...], size_px: int) -> str:
    return ", ".join(f"{name} {number:.6g}" for name, number in zip(classes, target, strict=True))


def _points_words(target: Any, classes: tuple[str, ...], size_px: int) -> str:
    """Points in pixels of what the model sees."""
    placed = (target + 1) / 2 * size_px
    there = [f"{name} {x:.1f},{y:.1f}" for name, (x, y) in zip(classes, placed, strict=True) if not np.isnan(x)]
    return "; ".join(there) or "(none)"


def _placed(prediction: Any) -> NDArray[np.float32]:
    """Lists of [x, y], None for none."""
    return np.array([(np.nan, np.nan) if point is None else point for point in prediction], np.float32)


def _mask_words(target: Any, classes: tuple[str, ...], size_px: int) -> str:
    """A mask's share of each class."""
    shares = [(np.mean(target == i), name) for i, name in [*enumerate(classes), (VOID, "no class")]]
    return f"{target.shape} " + ", ".join(f"{name} {share:.0%}" for share, name in shares if share)


def _draw_points(axes: Axes, target: NDArray[np.float32], classes: int) -> None:
    """Points in the model's coordinates, a colour each; what lies outside the picture is not drawn."""
    height, width = axes.images[0].get_size()
    x, y = (target[:, 0] + 1) / 2 * width - 0.5, (target[:, 1] + 1) / 2 * height - 0.5
    axes.scatter(x, y, c=np.arange(classes), cmap="tab10", vmin=0, vmax=10, s=14, edgecolors="white", linewidths=0.6)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _cross_points(axes: Axes, target: NDArray[np.float32], classes: int) -> None:
    """As `_draw_points`, a cross each."""
    height, width = axes.images[0].get_size()
    x, y = (target[:, 0] + 1) / 2 * width - 0.5, (target[:, 1] + 1) / 2 * height - 0.5
    colours = matplotlib.colormaps["tab10"](np.arange(classes) % 10)
    axes.scatter(x, y, c="white", marker="x", s=34, linewidths=2.4)  # a rim: colours may be those of the image
    axes.scatter(x, y, c=colours, marker="x", s=26, linewidths=1.2)


def _outline_mask(axes: Axes, target: NDArray[np.int64], classes: int) -> None:
    """A line around each class in its colour on a dark rim, none around the first, which is the ground."""
    for index in range(1, classes):
        inside = np.pad(target == index, 1).astype(np.float32)  # or a line along the edge would be missing
        if not inside.any():
            continue
        places = [np.arange(side + 2) - 1 for side in target.shape]
        for colour, width in (("black", 1.8), (matplotlib.colormaps["tab10"](index % 10), 0.9)):
            axes.contour(places[1], places[0], inside, levels=[0.5], colors=[colour], linewidths=width)
    axes.set_xlim(-0.5, target.shape[1] - 0.5)
    axes.set_ylim(target.shape[0] - 0.5, -0.5)


def _draw_mask(axes: Axes, target: NDArray[np.int64], classes: int) -> None:
    """The mask half transparent over its image, a colour a class, nothing where there is none."""
    shown = np.ma.masked_equal(target, VOID)
    axes.imshow(shown, cmap="tab10", vmin=0, vmax=max(9, classes - 1), alpha=0.5, interpolation="nearest")


DRAWINGS: dict[str, Drawing] = {
    "single_label": Drawing(_class_words),
    "multi_label": Drawing(_classes_words),
    "number": Drawing(_number_words),
    "points": Drawing(
        _points_words,
        _draw_points,
        predicted=_placed,
        true_over=_cross_points,
        legend="discs are predicted, crosses are true",
    ),
    "mask": Drawing(
        _mask_words,
        _draw_mask,
        decided=lambda scores: scores.argmax(0),
        true_over=_outline_mask,
        legend="areas are predicted, lines are true",
    ),
}
"""By the tasks' names, see tasks.py."""
