"""How would others render the same view? fastai's two stages and torchvision's sequential operators, step by step.

Both presize first and resample again for each group of augmentations: fastai two or three times (Pillow's resize of the
crop to presize_px, one grid_sample for flip, rotation, zoom and perspective, with min_scale < 1 one more for the random
resized crop), torchvision four (resize, perspective, affine, resized crop). Here they get the very view that `geometry`
drew: crop and window move to whole pixels, as they do there, and what that changes is put back into the map between, so
that the product of their stages is our homography. They differ in what they resample with and in what lies outside the
crop (fastai reflects there, torchvision paints it black, ours sees the rest of the photo), see `interior`.

Written anew from fastai 2.8.12's behaviour. Its random draws and its tensor subclasses are left out, in its favour;
`fastai_itself` has them, but shows what it draws.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from thawline.dataio.pixels import geometry
from thawline.dataio.pixels.geometry import Floats, Geometry, Ints
from thawline.dataio.pixels.spec import ImageSpec

Encoded = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Views:
    """What n images shall show, as stages: source <- crop <- (anything) <- window <- output."""

    totals: Floats
    """(n, 3, 3): output pixel -> pixel of the decoded source."""
    crops: Ints
    """(n, 3): left, top and side of the square that is presized, source pixels."""
    windows: Ints
    """(n, 4): left, top, width and height of the random resized crop, pixels of the presized square."""
    turns: Floats
    """(n, 3, 3): flip, rotation and zoom alone, in the unit square [-1, 1]^2."""
    brightness: Floats
    """(n,): .5 is neutral."""
    contrast: Floats
    """(n,): 1 is neutral."""

    def __getitem__(self, rows: slice) -> "Views":
        """Some of them."""
        return Views(**{name: value[rows] for name, value in vars(self).items()})


def draw(spec: ImageSpec, *, width: int, height: int, **who: Any) -> Views:
    """The stages of `geometry.draw` for sources of width x height; `who` are its seed, epochs and ids.

    Each factor is found by drawing again without the others: a number's place in the stream, not its use, decides it.
    Only for presize="crop" without dihedral.
    """
    n = len(who["ids"])
    who |= {"widths": np.full(n, width, np.int32), "heights": np.full(n, height, np.int32)}
    drawn = geometry.draw(spec, **who)
    still = replace(spec, flip=False, p_affine=0.0)
    bare, window, turned = (
        from_source(geometry.draw(other, **who))
        for other in (replace(still, min_scale=1.0), still, replace(spec, max_warp=0.0, min_scale=1.0))
    )
    side = min(width, height)
    to_unit = _scaling(2 / spec.size_px, -1.0)
    crops = np.concatenate([np.rint(bare[:, :2, 2]), np.full((n, 1), side)], axis=1).astype(np.int64)
    placed = np.linalg.inv(bare) @ window * (spec.presize_px / spec.size_px)
    sizes = np.rint(spec.size_px * np.stack([placed[:, 0, 0], placed[:, 1, 1]], axis=1))
    corners = np.clip(np.rint(placed[:, :2, 2]), 0, spec.presize_px - sizes)
    contrast = drawn.scale[:, 0]
    return Views(
        totals=from_source(drawn),
        crops=crops,
        windows=np.concatenate([corners, sizes], axis=1).astype(np.int64),
        turns=to_unit @ np.linalg.inv(bare) @ turned @ np.linalg.inv(to_unit),
        brightness=0.5 + drawn.shift[:, 0] - 0.5 * (1 - contrast),
        contrast=contrast,
    )


def resized(spec: ImageSpec, size_px: int) -> ImageSpec:
    """The same view, seen by the model at another size."""
    return replace(spec, size_px=size_px, presize_px=max(spec.presize_px, size_px))


def from_source(drawn: Geometry) -> Floats:
    """The homographies with any prefilter taken out: output pixel -> pixel of the decoded source, (n, 3, 3)."""
    return drawn.onto(drawn.source_px)


def interior(views: Views, spec: ImageSpec, *, margin_px: float = 3.0) -> NDArray[np.bool_]:
    """Which output pixels (n, size_px, size_px) lie, at every stage of every way, within its picture: there all agree.

    `margin_px` from each picture's edge is left out too, which resampling with a wider reach would touch.
    """
    grid = np.stack(np.meshgrid(*(np.arange(spec.size_px + 1.0),) * 2), axis=-1).reshape(1, -1, 2)
    grid = np.repeat(grid, len(views.totals), axis=0)
    _, _, turn, window = torchvision_maps(views, spec)
    source = geometry.project(views.totals, grid) - views.crops[:, None, :2]
    between = geometry.project(turn @ window, grid)
    inside = (
        ((source > margin_px) & (source < views.crops[:, None, 2:] - margin_px))
        & ((between > margin_px) & (between < spec.presize_px - margin_px))
    ).all(axis=-1)
    corner = inside.reshape(-1, spec.size_px + 1, spec.size_px + 1)
    found: NDArray[np.bool_] = corner[:, 1:, 1:] & corner[:, :-1, 1:] & corner[:, 1:, :-1] & corner[:, :-1, :-1]
    return found


def fastai_maps(views: Views, spec: ImageSpec) -> tuple[Floats, Floats, Floats]:
    """Presized -> source, warped -> presized, output -> warped, all pixels from the corner: (n, 3, 3) each.

    The last resamples with align_corners=True, as fastai does: centres of edge pixels on centres of edge pixels.
    """
    crop = _placed(views.crops[:, [2, 2]] / spec.presize_px, views.crops[:, :2])
    scale = (views.windows[:, 2:] - 1) / (spec.size_px - 1)
    window = _placed(scale, views.windows[:, :2] + 0.5 - 0.5 * scale)
    return crop, np.linalg.inv(crop) @ views.totals @ np.linalg.inv(window), window


def fastai_pixels(encoded: Encoded, views: Views, spec: ImageSpec) -> torch.Tensor:
    """The geometry: Resize(presize_px), then aug_transforms(size=size_px, min_scale=...): (n, 3, size, size), 0..1."""
    items = [
        _fastai_item(file, crop, spec.presize_px) for file, crop in zip(encoded, views.crops.tolist(), strict=True)
    ]
    batch = torch.stack(items).float().div_(255.0)
    theta, tilt = (torch.from_numpy(m).float() for m in _two_steps(fastai_maps(views, spec)[1], spec.presize_px))
    side = spec.size_px if spec.min_scale == 1 else spec.presize_px
    coords = F.affine_grid(theta[:, :2], [len(items), 3, side, side], align_corners=True)
    flat = coords.view(len(items), -1, 2) @ tilt[:, :, :2].transpose(1, 2) + tilt[:, None, :, 2]
    batch = _fastai_sample(batch, (flat[..., :2] / flat[..., 2:]).view_as(coords))
    if spec.min_scale == 1:
        return batch
    # fastai takes one window for the batch, in one call: the work for each image is the same.
    out = [_fastai_window(batch[i : i + 1], window, spec.size_px) for i, window in enumerate(views.windows.tolist())]
    return torch.cat(out)


def fastai(works: Iterable[tuple[Encoded, Views]], spec: ImageSpec) -> Iterator[torch.Tensor]:
    """Everything: the geometry, lighting in logit space, normalisation. Yields (n, 3, size, size) float32 a work."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    for encoded, views in works:
        brightness, contrast = (
            torch.from_numpy(v).float().view(-1, 1, 1, 1) for v in (views.brightness, views.contrast)
        )
        logits = _logit(fastai_pixels(encoded, views, spec)).add_(_logit(brightness)).mul_(contrast)
        yield (torch.sigmoid(logits) - mean) / std


def fastai_itself(spec: ImageSpec) -> Callable[[Iterable[Encoded]], Iterator[torch.Tensor]]:
    """The package's own Resize and aug_transforms, from encoded batches to normalised ones, at its own random draws.

    Raises: ImportError where fastai is not installed. It is no dependency, since its pins exclude the torch used here;
    it works with it all the same, put on PYTHONPATH (`pip install --no-deps --target FOLDER fastai fastcore ...`).
    """
    from fastai.data.load import fa_collate
    from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
    from fastai.vision.augment import Resize, aug_transforms
    from fastai.vision.core import PILImage, imagenet_stats
    from fasttransform import Pipeline

    resize, to_tensor = Resize(spec.presize_px), ToTensor()
    augment = aug_transforms(
        do_flip=spec.flips,
        max_rotate=spec.rotate_deg,
        min_zoom=spec.min_zoom,
        max_zoom=spec.max_zoom,
        max_lighting=spec.max_lighting,
        max_warp=spec.max_warp,
        p_affine=spec.p_affine,
        p_lighting=spec.p_lighting,
        size=spec.size_px,
        min_scale=spec.min_scale,
    )
    normalise = Normalize.from_stats(*imagenet_stats, cuda=False)
    on_batch = Pipeline([IntToFloatTensor(), *augment, normalise], split_idx=0)

    def run(batches: Iterable[Encoded]) -> Iterator[torch.Tensor]:
        for encoded in batches:
            items = [to_tensor(resize(PILImage.create(io.BytesIO(file.tobytes())), split_idx=0)) for file in encoded]
            yield on_batch(fa_collate([(item,) for item in items])[0])

    return run


def _logit(x: torch.Tensor) -> torch.Tensor:
    return -(1 / x.clamp(1e-7, 1 - 1e-7) - 1).log()


def _fastai_item(encoded: NDArray[np.uint8], crop: list[int], presize_px: int) -> torch.Tensor:
    """Pillow crops, then resizes with the filter it calls bilinear, a triangle: (3, P, P) uint8."""
    left, top, side = crop
    image = _open(encoded).crop((left, top, left + side, top + side))
    resized = image.resize((presize_px, presize_px), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _fastai_window(image: torch.Tensor, window: list[int], size_px: int) -> torch.Tensor:
    left, top, width, height = window
    coords = F.affine_grid(torch.eye(3)[None, :2], [1, 3, size_px, size_px], align_corners=True)
    return _fastai_sample(image[..., top : top + height, left : left + width], coords)


def _fastai_sample(batch: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    """Resample (n, 3, h, w) at (n, H, W, 2); where that shrinks more than twice, average areas first down to twice."""
    zoom = 2 / float(coords.max() - coords.min())
    excess = min(batch.shape[2] / coords.shape[1], batch.shape[3] / coords.shape[2]) / 2
    if excess > max(1, zoom):
        batch = F.interpolate(batch, scale_factor=1 / excess, mode="area", recompute_scale_factor=True)
    return F.grid_sample(batch, coords, mode="bilinear", padding_mode="reflection", align_corners=True)


def _two_steps(pixel_maps: Floats, side_px: int) -> tuple[Floats, Floats]:
    """Maps of a square of pixels to itself -> (affine, tilt), (n, 3, 3) each, map = tilt @ affine.

    Both in fastai's unit square, whose edge is the centre of the edge pixels; a tilt's upper rows are the identity's.
    """
    unit = np.array([[2.0, 0.0, -side_px], [0.0, 2.0, -side_px], [0.0, 0.0, side_px - 1.0]]) / (side_px - 1)
    maps = unit @ pixel_maps @ np.linalg.inv(unit)
    maps = maps / maps[:, 2:, 2:]
    # (g, h, 1) = p row_0 + q row_1 + (0, 0, 1 / s): the tilt is p and q, the affine map s times the upper rows.
    rows = np.concatenate([maps[:, :2], np.broadcast_to([[0.0, 0.0, 1.0]], (len(maps), 1, 3))], axis=1)
    solved = np.linalg.solve(rows.transpose(0, 2, 1), maps[:, 2, :, None])[..., 0]
    affine, tilt = rows.copy(), np.tile(np.eye(3), (len(maps), 1, 1))
    affine[:, :2] /= solved[:, 2, None, None]
    tilt[:, 2, :2] = solved[:, :2]
    return affine, tilt


def torchvision_maps(views: Views, spec: ImageSpec) -> tuple[Floats, Floats, Floats, Floats]:
    """Presized -> source, turned -> presized, windowed -> turned, output -> windowed, in pixels: (n, 3, 3).

    The last holds the flip too. Whatever of the map is no rotation and zoom becomes the perspective's coefficients.
    """
    crop = _placed(views.crops[:, [2, 2]] / spec.presize_px, views.crops[:, :2])
    flip = np.where(_flipped(views), -1.0, 1.0)[:, None] * [[1.0, 0.0]] + [[0.0, 1.0]]
    scale = views.windows[:, 2:] / spec.size_px
    start = views.windows[:, :2] + np.where(flip < 0, views.windows[:, 2:], 0)
    window = _placed(scale * flip, start)
    turn = np.stack([_turn_map(**_turn(views, i)) for i in range(len(flip))])
    return crop, np.linalg.inv(crop) @ views.totals @ np.linalg.inv(turn @ window), turn, window


def torchvision_pixels(encoded: Encoded, views: Views, spec: ImageSpec) -> list[torch.Tensor]:
    """resized_crop to presize_px, perspective, affine, resized_crop, flip: n times (3, size, size) uint8."""
    size, presize = [spec.size_px] * 2, [spec.presize_px] * 2
    tilts = torchvision_maps(views, spec)[1]
    tilts = (tilts / tilts[:, 2:, 2:]).reshape(-1, 9)[:, :8]
    out = []
    for i, (file, flip) in enumerate(zip(encoded, _flipped(views), strict=True)):
        left, top, side = views.crops[i].tolist()
        image = v2.resized_crop(v2.pil_to_tensor(_open(file)), top, left, side, side, presize, antialias=True)
        image = v2.perspective(image, None, None, coefficients=tilts[i].tolist())
        image = v2.affine(image, **_turn(views, i), shear=[0.0, 0.0], interpolation=v2.InterpolationMode.BILINEAR)
        left, top, width, height = views.windows[i].tolist()
        image = v2.resized_crop(image, top, left, height, width, size, antialias=True)
        out.append(v2.horizontal_flip(image) if flip else image)
    return out


def torchvision(works: Iterable[tuple[Encoded, Views]], spec: ImageSpec) -> Iterator[torch.Tensor]:
    """Everything: the geometry, brightness and contrast, normalisation. Yields (n, 3, size, size) float32 a work."""
    for encoded, views in works:
        done = []
        for i, image in enumerate(torchvision_pixels(encoded, views, spec)):
            image = v2.adjust_brightness(image, 2 * float(views.brightness[i]))
            image = v2.adjust_contrast(image, float(views.contrast[i]))
            done.append(v2.normalize(v2.to_dtype(image, torch.float32, scale=True), spec.mean, spec.std))
        yield torch.stack(done)


def _flipped(views: Views) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.linalg.det(views.turns) < 0
    return found


def _turn(views: Views, i: int) -> dict[str, Any]:
    """Rotation and zoom of image i about the middle of its window, as torchvision's affine takes them."""
    linear = views.turns[i, :2, :2] * [np.sign(np.linalg.det(views.turns[i])), 1.0]
    half = views.windows[i, 2:] / 2
    angle_deg = math.degrees(math.atan2(linear[0, 1], linear[0, 0]))
    return {
        "angle": angle_deg,
        "translate": (-np.linalg.inv(linear) @ (views.turns[i, :2, 2] * half)).tolist(),
        "scale": 1 / math.hypot(*linear[0]),
        "center": (views.windows[i, :2] + half).tolist(),
    }


def _turn_map(angle: float, translate: list[float], scale: float, center: list[float]) -> Floats:
    """What torchvision's affine does with these: output pixel -> input pixel, (3, 3)."""
    c, s = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    found = np.array([[c, s, 0.0], [-s, c, 0.0], [0.0, 0.0, 1.0]])
    found[:2, 2] = np.array(center) - found[:2, :2] @ (np.array(center) + translate)
    return found


def _open(encoded: NDArray[np.uint8]) -> Image.Image:
    return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


def _scaling(scale: float, shift: float) -> Floats:
    return np.array([[scale, 0.0, shift], [0.0, scale, shift], [0.0, 0.0, 1.0]])


def _placed(scale: Floats, corner: NDArray[Any]) -> Floats:
    """(n, 2) scale and (n, 2) corner, x before y -> (n, 3, 3)."""
    maps = np.tile(np.eye(3), (len(scale), 1, 1))
    maps[:, 0, 0], maps[:, 1, 1] = scale[:, 0], scale[:, 1]
    maps[:, :2, 2] = corner
    return maps
