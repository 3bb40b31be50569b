"""What happens to one sample, and what do batches look like? For people: text and pictures, no training."""

from itertools import islice

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dataio.geometry import project
from dataio.loader import ImageLoader
from dataio.reference import decode
from dataio.spec import ImageSpec


def explain(loader: ImageLoader, *, position: int = 0) -> str:
    """One sample through every step, with shapes, then the batch it travels in. Returns lines of text.

    position: in the stream (training) or the row (validation).
    """
    work = loader.work(np.array([position], np.int64))
    spec, geometry = loader.spec, work.geometry
    height, width = decode(work.encoded[0], path=work.paths[0]).shape[:2]
    filter_h, filter_w = (int(v) for v in geometry.prefilter_px[0])
    matrix = geometry.homographies[0]
    scale, shift = geometry.scale[0, 0], geometry.shift[0, 0]
    size = float(spec.size_px)
    corners = np.array([[[0, 0], [size, 0], [size, size], [0, size]]], np.float64)
    seen = project(matrix[None], corners)[0]
    batch = next(iter(islice(loader.stream(), 1)))
    epoch = f"epoch {position // loader.samples}, " if loader.train else ""
    lines = [
        f"{'training' if loader.train else 'validation'} sample: {epoch}position {position}, id {work.ids[0]}",
        f"  file       {work.paths[0]}  {len(work.encoded[0]):,} bytes",
        f"  target     {_target_words(work.targets[0], loader.classes)}",
        f"  decoded    ({height}, {width}, 3) uint8 RGB, upright",
        f"  prefilter  {f'({filter_h}, {filter_w}, 3): the warp alone would alias' if filter_h else 'not needed'}",
        f"  warp       ({spec.size_px}, {spec.size_px}, 3) uint8, one bilinear interpolation, {spec.border} border",
        "             the model's corners see x,y = " + "  ".join(f"{x:.1f},{y:.1f}" for x, y in seen),
        *(f"             [{row[0]:9.4f} {row[1]:9.4f} {row[2]:9.4f}]" for row in matrix),
        f"  lighting   y = {scale:.3f} x {'+' if shift >= 0 else '-'} {abs(shift):.3f}, then (y - mean) / std",
        f"engine: {loader.engine} on {loader.device} ({loader.choice.reason})",
        f"batch: images {_shape(batch.images)} channels_last, mean {batch.images.float().mean():.3f}, "
        f"std {batch.images.float().std():.3f}",
        f"       targets {_shape(batch.targets)}, ids {_shape(batch.ids)}",
        f"split: {loader.samples:,} samples, {len(loader.classes)} classes; global batch {loader.global_batch}"
        + (f", {loader.steps(1)} steps an epoch" if loader.train else ""),
    ]
    return "\n".join(lines)


def denormalise(images: torch.Tensor, spec: ImageSpec) -> NDArray[np.float32]:
    """(N, 3, H, W) as the model sees them -> (N, H, W, 3) float32 in [0, 1] as people do."""
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    return np.clip(pixels * np.array(spec.std, np.float32) + np.array(spec.mean, np.float32), 0, 1)


def show_batch(loader: ImageLoader, *, rows: int = 3, cols: int = 4) -> Figure:
    """A grid of samples as the model sees them, with their targets."""
    wanted = rows * cols
    images: list[NDArray[np.float32]] = []
    titles: list[str] = []
    for batch in loader.stream():
        images.extend(denormalise(batch.images, loader.spec))
        titles.extend(_target_words(target, loader.classes) for target in batch.targets.cpu().numpy())
        if len(images) >= wanted:
            break
    return grid(images[:wanted], titles[:wanted], cols=cols)


def grid(
    images: list[NDArray[np.float32]], titles: list[str], *, cols: int, colours: list[str] | None = None
) -> Figure:
    """Images, (H, W, 3) float in [0, 1], in rows of `cols`, each under its title."""
    rows = max(1, -(-len(images) // cols))
    figure = Figure(figsize=(cols * 1.5, rows * 1.75), layout="constrained")
    for axes in (cells := np.atleast_1d(figure.subplots(rows, cols)).ravel()):
        axes.set_axis_off()
    for i, (axes, image, title) in enumerate(zip(cells, images, titles, strict=False)):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(title, fontsize=9, color=colours[i] if colours else "black")
    return figure


def _target_words(target: NDArray[np.float32] | np.int64, classes: tuple[str, ...]) -> str:
    if np.ndim(target) == 0:
        return classes[int(target)]
    return ", ".join(name for name, on in zip(classes, np.asarray(target), strict=True) if on) or "(none)"


def _shape(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
