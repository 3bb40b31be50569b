"""Where does each output pixel come from, and how bright? One homography and one colour map a sample.

A homography maps output pixel coordinates to source pixel coordinates, both with the origin at the image's
corner (pixel centres at .5), x before y. Everything geometric of a sample is multiplied into that one 3x3, and
everything photometric but saturation, which mixes the channels, into one scale and shift per channel, so that engines
resample once and normalise once. Between the two coordinate systems lies the unit square [-1, 1]^2:
source <- presize <- perspective <- affine <- output.

Everything is vectorised over a batch, in float64. No pixel is touched here.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from thawline.dataio.hashing import uniforms
from thawline.dataio.pixels.spec import ImageSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A bilinear warp reads 2x2 source pixels: the more it shrinks, the more pixels it skips, and the result aliases. So
# where it shrinks, each output pixel is the mean of three samples on this circle (x and y in output pixels), rotated so
# that no two share a row or column of an upright image. At the shrink of ordinary photos this is 11 to 14 dB closer to
# the ideal than one sample. The radius is the best of those measured (benchmarks/LOG.md, "three samples").
SAMPLES = 0.38 * np.stack([f(np.deg2rad([15.0, 135.0, 255.0])) for f in (np.cos, np.sin)], axis=1)
# Range of shrinks over which the three samples move from the centre of the pixel out to the circle.
SPREAD_SHRINK = (1.0, 1.2)
# Where a warp would shrink more than this, the source is filtered down first, until exactly this much is left.
MAX_SHRINK = 2.5

_MARGIN_PX = 8  # what interpolation, and smoothing of a JPEG's halved chroma, read beside a pixel

# The streams of random numbers. Append only: a number's place decides what every run with its seed sees.
_DRAWS = (
    *("crop_x", "crop_y", "flip", "p_rotate", "rotate", "p_zoom", "zoom", "zoom_x", "zoom_y"),
    *("p_warp", "warp_x", "warp_y", "p_brightness", "brightness", "p_contrast", "contrast"),
    *("scale", "ratio", "scale_x", "scale_y"),
    *("dihedral", "p_saturation", "saturation"),
)


@dataclass(frozen=True)
class Geometry:
    """What the engines need to render a batch of n samples."""

    homographies: Floats
    """(n, 3, 3): output pixel -> pixel of the (prefiltered) source."""
    prefilter_px: Ints
    """(n, 2): height and width that the source is filtered down to first; 0, 0 where it is not."""
    scale: Floats
    """(n, 3): colour map y = scale * x + shift per channel, x in [0, 1]."""
    shift: Floats
    """(n, 3)."""
    source_px: Ints
    """(n, 2): height and width of the source, decoded and upright."""
    saturation: Floats
    """(n,): before the colour map each channel x becomes grey + saturation (x - grey); 1 changes nothing.

    grey = .299 R + .587 G + .114 B, as in JPEG.
    """
    sampling: Floats
    """(n,): how far SAMPLES are spread, from 0 (all at the centre, so one is enough) to 1."""

    @property
    def mirrored(self) -> NDArray[np.bool_]:
        """(n,): which samples are mirror images of their source, however they are rotated."""
        return np.asarray(np.linalg.det(self.homographies) < 0)

    def sampled(self, k: int) -> Floats:
        """The homographies through sample k of each output pixel, (n, 3, 3); an image is the mean over all SAMPLES."""
        dx, dy = SAMPLES[k][:, None] * self.sampling
        return self.homographies @ _scaling(np.ones_like(dx), np.ones_like(dy), dx, dy)

    def folded(self, spec: ImageSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Colour map and normalisation in one: (mean, std), (n, 3) float32, for y = (x - mean) / std, x in 0..255."""
        mean = 255 * (np.array(spec.mean) - self.shift) / self.scale
        std = 255 * np.array(spec.std) / self.scale
        return mean.astype(np.float32), std.astype(np.float32)

    def windows(self, size_px: int) -> tuple[Ints, Ints]:
        """The region of each source that an output of this side needs: (starts, shapes), (n, 2) height and width.

        It includes reflected borders and a margin for interpolation and chroma. A source that is filtered first is
        needed whole.
        """
        edge = np.array([-1.0, size_px + 1.0])
        corners = np.stack(np.meshgrid(edge, edge), axis=-1).reshape(1, 4, 2)
        reached = project(self.homographies, np.tile(corners, (len(self.homographies), 1, 1)))[..., ::-1]
        low, high = reached.min(axis=1), reached.max(axis=1)
        size = self.source_px.astype(np.float64)
        before, beyond = np.maximum(-low, 0), np.maximum(high - size, 0)
        starts = np.floor(np.minimum(low, size - beyond) - _MARGIN_PX).clip(0, size - 1)
        ends = np.ceil(np.maximum(high, before) + _MARGIN_PX).clip(starts + 1, size)
        whole = (self.prefilter_px > 0) | (np.maximum(before, beyond).max(axis=1, keepdims=True) >= size)
        starts, ends = np.where(whole, 0, starts), np.where(whole, size, ends)
        return starts.astype(np.int64), (ends - starts).astype(np.int64)

    def onto(self, sizes: Ints) -> Floats:
        """The homographies for another picture of the same scene, such as a mask: (n, 3, 3).

        sizes: (n, 2), its height and width. `source_px` gives the map onto the unfiltered source.
        """
        warped_px = np.where(self.prefilter_px > 0, self.prefilter_px, self.source_px)
        y, x = (sizes.astype(np.float64) / warped_px.astype(np.float64)).T
        return _scaling(x, y, np.zeros_like(x), np.zeros_like(y)) @ self.homographies

    def place(self, points: Floats, *, size_px: int) -> Floats:
        """Where keypoints of the source lie in the output: (n, k, 2) x, y in source pixels -> (n, k, 2) x, y.

        -1 is the outer edge of the output's first pixel, +1 that of its last; points that were cropped away lie beyond.
        NaN stays NaN, and a point that the perspective puts behind the viewer becomes NaN. size_px: the output's side.
        """
        h = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)
        h = h @ np.linalg.inv(self.onto(self.source_px)).transpose(0, 2, 1)
        ahead = np.where(h[..., 2:] > 0, h[..., 2:], np.nan)
        placed: Floats = h[..., :2] / ahead * (2 / size_px) - 1
        return placed

    def taken_back(self, points: Floats, *, size_px: int) -> Floats:
        """Where points of the output, as `place` has them, lie in the source: (n, k, 2) x, y in its pixels."""
        return project(self.onto(self.source_px), (points + 1) * (size_px / 2))

    def chosen(self, kept: NDArray[Any]) -> Self:
        """Of these samples alone: kept, their indices, or booleans."""
        return replace(self, **{each.name: getattr(self, each.name)[kept] for each in fields(self)})


def draw(
    spec: ImageSpec,
    *,
    seed: int,
    epochs: Ints,
    ids: Ints,
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
    size_px: int | None = None,
) -> Geometry:
    """The training geometry of n samples: a function of (seed, epoch, id) and the source's size alone.

    size_px: side of the output, if it is not the spec's; at any side a sample shows the same region of its source.
    """
    which = np.arange(len(_DRAWS))
    table = uniforms(seed, epochs[:, None], ids[:, None], which)
    u = {name: table[:, i] for i, name in enumerate(_DRAWS)}
    unit = _perspective(spec, u) @ _affine(spec, u)
    if spec.min_scale < 1:
        unit = _resized_crop(spec, u) @ unit
    scale, shift = _lighting(spec, u)
    sizes = np.stack([heights, widths], axis=1).astype(np.int64)
    maps = _finish(spec, unit, sizes, u["crop_x"], u["crop_y"], size_px or spec.size_px)
    return Geometry(**maps, scale=scale, shift=shift, source_px=sizes, saturation=_saturation(spec, u))


def centred(
    spec: ImageSpec, *, widths: NDArray[np.int32], heights: NDArray[np.int32], size_px: int | None = None
) -> Geometry:
    """The validation geometry: the centre crop (or squish, or pad), no augmentation. size_px: as for `draw`."""
    n = len(widths)
    half = np.full(n, 0.5)
    sizes = np.stack([heights, widths], axis=1).astype(np.int64)
    maps = _finish(spec, _eye(n), sizes, half, half, size_px or spec.size_px)
    same: dict[str, Any] = {"scale": np.ones((n, 3)), "shift": np.zeros((n, 3)), "saturation": np.ones(n)}
    return Geometry(**maps, **same, source_px=sizes)


def project(matrices: Floats, points: Floats) -> Floats:
    """Map points through homographies: (n, 3, 3) and (n, k, 2) x, y -> (n, k, 2); `Geometry.place` is the inverse."""
    h = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1) @ matrices.transpose(0, 2, 1)
    return h[..., :2] / h[..., 2:]


def _eye(n: int) -> Floats:
    return np.tile(np.eye(3), (n, 1, 1))


def _scaling(sx: Floats, sy: Floats, tx: Floats, ty: Floats) -> Floats:
    m = _eye(len(sx))
    m[:, 0, 0], m[:, 1, 1], m[:, 0, 2], m[:, 1, 2] = sx, sy, tx, ty
    return m


def _affine(spec: ImageSpec, u: dict[str, Floats]) -> Floats:
    """Flip (or apply a symmetry), then rotate, then zoom about a random point; in unit coordinates, (n, 3, 3).

    Source: fastai's aug_transforms (the zoom is a window of side 1/zoom, its centre uniform where the window fits).
    """
    n = len(u["flip"])
    zero = np.zeros(n)
    mirrored = np.where(spec.flips & (u["flip"] < 0.5), -1.0, 1.0)
    flip = _symmetry(u["dihedral"]) if spec.dihedral else _scaling(mirrored, np.ones(n), zero, zero)
    angle = np.deg2rad(spec.rotate_deg) * (2 * u["rotate"] - 1) * (u["p_rotate"] < spec.p_affine)
    turn = _eye(n)
    turn[:, 0, 0] = turn[:, 1, 1] = np.cos(angle)
    turn[:, 0, 1], turn[:, 1, 0] = np.sin(angle), -np.sin(angle)
    zoom = spec.min_zoom + (spec.max_zoom - spec.min_zoom) * u["zoom"]
    zoom = np.where(u["p_zoom"] < spec.p_affine, zoom, 1.0)
    s = 1 / zoom
    window = _scaling(s, s, (1 - s) * (2 * u["zoom_x"] - 1), (1 - s) * (2 * u["zoom_y"] - 1))
    return window @ turn @ flip


def _symmetry(u: Floats) -> Floats:
    """One of the eight symmetries of the square, each for an eighth of [0, 1): mirror x, mirror y, swap them."""
    which = (8 * u).astype(np.int64)
    zero, swapped = np.zeros(len(u)), which >= 4
    m = _scaling(np.where(which & 1, -1.0, 1.0), np.where(which & 2, -1.0, 1.0), zero, zero)
    m[swapped] = m[swapped][:, [1, 0, 2]]
    return m


def _perspective(spec: ImageSpec, u: dict[str, Floats]) -> Floats:
    """The projective map that takes the unit square's corners to a trapezium's: (n, 3, 3).

    With tilts x and y the corner (-1, -1) samples from (-1 - y, -1 - x), and so on round the square.
    Source: fastai's warp; the four-point solution is the textbook's eight linear equations.
    """
    on = u["p_warp"] < spec.p_affine
    x = spec.max_warp * (2 * u["warp_x"] - 1) * on
    y = spec.max_warp * (2 * u["warp_y"] - 1) * on
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float64)
    targets = np.stack(
        [np.stack([px * (1 - py * y), py * (1 - px * x)], -1) for px, py in corners], axis=1
    )  # (n, 4, 2)
    n = len(x)
    lhs, rhs = np.zeros((n, 8, 8)), np.zeros((n, 8))
    for i, (px, py) in enumerate(corners):
        tx, ty = targets[:, i, 0], targets[:, i, 1]
        lhs[:, 2 * i, :3] = lhs[:, 2 * i + 1, 3:6] = (px, py, 1)
        lhs[:, 2 * i, 6], lhs[:, 2 * i, 7] = -tx * px, -tx * py
        lhs[:, 2 * i + 1, 6], lhs[:, 2 * i + 1, 7] = -ty * px, -ty * py
        rhs[:, 2 * i], rhs[:, 2 * i + 1] = tx, ty
    solved = np.linalg.solve(lhs, rhs[..., None])[..., 0]
    return np.concatenate([solved, np.ones((n, 1))], axis=1).reshape(n, 3, 3)


def _resized_crop(spec: ImageSpec, u: dict[str, Floats]) -> Floats:
    """A window of random area and aspect, placed at random within the unit square: (n, 3, 3).

    Source: the random resized crop of Szegedy et al. (2015); area uniform, aspect uniform in its logarithm.
    """
    area = spec.min_scale + (1 - spec.min_scale) * u["scale"]
    low, high = np.log(spec.ratio)
    aspect = np.exp(low + (high - low) * u["ratio"])
    w, h = np.minimum(1, np.sqrt(area * aspect)), np.minimum(1, np.sqrt(area / aspect))
    return _scaling(w, h, (1 - w) * (2 * u["scale_x"] - 1), (1 - h) * (2 * u["scale_y"] - 1))


def _lighting(spec: ImageSpec, u: dict[str, Floats]) -> tuple[Floats, Floats]:
    """Brightness and contrast as scale and shift, (n, 3) each, equal over channels.

    fastai moves pixels in logit space; an affine map is needed here, so this is its tangent at mid-grey, where
    the two agree: brightness b ~ U(.5 -+ max/2) shifts by b - .5, contrast e^(+-|ln(1 - max)|) scales about .5.
    """
    change = spec.max_lighting * (u["brightness"] - 0.5) * (u["p_brightness"] < spec.p_lighting)
    log_contrast = -np.log(1 - spec.max_lighting) * (2 * u["contrast"] - 1)
    contrast = np.exp(log_contrast * (u["p_contrast"] < spec.p_lighting))
    shift = change + 0.5 * (1 - contrast)
    return np.repeat(contrast[:, None], 3, 1), np.repeat(shift[:, None], 3, 1)


def _saturation(spec: ImageSpec, u: dict[str, Floats]) -> Floats:
    """The factor of each colour's distance from grey, (n,): e^(+-|ln(1 - max)|), as contrast is that from mid-grey."""
    log_saturation = -np.log(1 - spec.max_saturation) * (2 * u["saturation"] - 1)
    factor: Floats = np.exp(log_saturation * (u["p_saturation"] < spec.p_lighting))
    return factor


def _finish(spec: ImageSpec, unit: Floats, sizes: Ints, crop_x: Floats, crop_y: Floats, size_px: int) -> dict[str, Any]:
    """Complete the unit-square map to one from output pixels to source pixels, and choose the prefilter.

    sizes: (n, 2), the sources' heights and widths. Returns Geometry's homographies, prefilter_px and sampling.
    """
    h, w = sizes.T.astype(np.float64)
    side = np.minimum(w, h) if spec.presize == "crop" else np.maximum(w, h)
    sx, sy = (w, h) if spec.presize == "squish" else (side, side)
    free_x, free_y = np.maximum(w - sx, 0), np.maximum(h - sy, 0)
    if spec.presize == "pad":
        free_x, free_y, crop_x, crop_y = w - sx, h - sy, np.full_like(w, 0.5), np.full_like(w, 0.5)
    to_source = _scaling(sx / 2, sy / 2, free_x * crop_x + sx / 2, free_y * crop_y + sy / 2)
    one = np.ones(len(w))
    from_output = _scaling(one * 2 / size_px, one * 2 / size_px, -one, -one)
    homographies = to_source @ unit @ from_output
    shrink = _shrink(homographies, size_px)
    # Filtered down only until the warp may do the rest: more would blur twice.
    factor = np.where(shrink > MAX_SHRINK, MAX_SHRINK / shrink, 1.0)
    low, high = SPREAD_SHRINK
    filtered = np.maximum(1, np.round(np.stack([h, w], 1) * factor[:, None]))
    prefilter_px = np.where(factor[:, None] < 1, filtered, 0).astype(np.int64)
    shrunk = np.where(factor[:, None] < 1, filtered / np.stack([h, w], 1), 1.0)
    zero = np.zeros_like(w)
    homographies = _scaling(shrunk[:, 1], shrunk[:, 0], zero, zero) @ homographies
    return {
        "homographies": homographies / homographies[:, 2:, 2:],
        "prefilter_px": prefilter_px,
        "sampling": np.clip((shrink * factor - low) / (high - low), 0.0, 1.0),
    }


def _shrink(homographies: Floats, size_px: int) -> Floats:
    """The larger singular value of each map's Jacobian at the output's centre, (n,): source pixels per output pixel."""
    centre = np.array([size_px / 2, size_px / 2, 1.0])
    x, y, z = np.moveaxis(homographies @ centre, -1, 0)
    g, h = homographies[:, 2, 0], homographies[:, 2, 1]
    a = (homographies[:, 0, 0] - g * x / z) / z
    b = (homographies[:, 0, 1] - h * x / z) / z
    c = (homographies[:, 1, 0] - g * y / z) / z
    d = (homographies[:, 1, 1] - h * y / z) / z
    total, det = a * a + b * b + c * c + d * d, a * d - b * c
    largest: Floats = np.sqrt((total + np.sqrt(np.maximum(total**2 - 4 * det**2, 0))) / 2)
    return largest
