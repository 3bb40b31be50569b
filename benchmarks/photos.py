"""What can be decoded where there are no photographs? Seeded pictures that cost a decoder what photographs do.

Colour noise with the 1/f spectrum of natural scenes over flat shapes with clean edges: detail at every scale, most of
the power in luma, and JPEG files of the size that cameras write. They stand for speed; a network learns nothing from
them. For quality there are cuts of the two photographs that scikit-learn carries, which are rougher (LOG.md).
"""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from thawline.benchmarks.harness import BenchmarkError
from thawline.dataio.cores import usable_cores

_SHAPES = 14
_POWER = 1.2  # of natural scenes: 1.0 to 1.3
_TEXTURE = 36.0  # grey levels of luma noise (standard deviation): 500 x 375 at quality 90 is then about 83 kB
_CHROMA = 9.0


def write_photos(count: int, *, width: int, height: int, seed: int, quality: int = 90) -> list[NDArray[np.uint8]]:
    """Make `count` RGB JPEGs of width x height in memory; each (bytes,) uint8, a function of (seed, its index)."""

    def made(i: int) -> NDArray[np.uint8]:
        return _encode(_pixels(np.random.default_rng([seed, i]), width, height), quality)

    with ThreadPoolExecutor(usable_cores()) as pool:  # most of it is FFT and JPEG, without Python's lock
        return list(pool.map(made, range(count)))


def real_photos(count: int, *, width: int, height: int, seed: int, quality: int = 90) -> list[NDArray[np.uint8]]:
    """Cut `count` RGB JPEGs of width x height at random, unscaled, from scikit-learn's two photographs in turn.

    They are `china.jpg` and `flower.jpg`, 640 x 427, CC BY. Each (bytes,) uint8, a function of (seed, its index).
    Raises: BenchmarkError without scikit-learn, and for cuts larger than the photographs.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise BenchmarkError(
            "scikit-learn is not installed: there is no photograph to judge quality by; pip install 'thawline[samples]'"
        ) from error
    sources = load_sample_images().images
    full_height, full_width = sources[0].shape[:2]
    if width > full_width or height > full_height:
        raise BenchmarkError(
            f"a cut of {width} x {height} is larger than the photographs of {full_width} x {full_height}: "
            "nothing can be cut; ask for less"
        )
    cuts = []
    for i in range(count):
        random = np.random.default_rng([seed, i])
        left, top = random.integers(0, (full_width - width + 1, full_height - height + 1))
        cuts.append(_encode(sources[i % 2][top : top + height, left : left + width], quality))
    return cuts


def _pixels(random: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 RGB."""
    luma, blue, red = (_noise(random, width, height, power) for power in (_POWER, 1.6, 1.6))
    texture = _TEXTURE * luma[..., None] + _CHROMA * np.stack([1.4 * red, -0.34 * blue - 0.71 * red, 1.77 * blue], -1)
    return np.clip(np.rint(_shapes(random, width, height) + texture), 0, 255).astype(np.uint8)


def _noise(random: np.random.Generator, width: int, height: int, power: float) -> NDArray[np.float64]:
    """(height, width) noise of mean 0 and deviation 1 whose amplitude falls as frequency ** -power.

    Source: D. J. Field, "Relations between the statistics of natural images..." (1987).
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    white = random.normal(size=(2, *frequency.shape))
    noise = np.fft.irfft2((white[0] + 1j * white[1]) * frequency**-power, s=(height, width))
    return noise / noise.std()


def _shapes(random: np.random.Generator, width: int, height: int) -> NDArray[np.float64]:
    """(height, width, 3) flat ellipses and triangles over one another, their edges antialiased."""
    image = Image.new("RGB", (2 * width, 2 * height), _colour(random))
    pen = ImageDraw.Draw(image)
    for i in range(_SHAPES):
        points = random.uniform(-0.1, 1.1, (3, 2)) * image.size
        if i % 2:
            pen.polygon([(float(x), float(y)) for x, y in points], fill=_colour(random))
        else:
            (left, top), (right, bottom) = points[:2].min(axis=0), points[:2].max(axis=0)
            pen.ellipse((float(left), float(top), float(right), float(bottom)), fill=_colour(random))
    return np.asarray(image.reduce(2), np.float64)


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(random.uniform(60, 200) + random.uniform(-35, 35, 3), 0, 255).astype(int).tolist()
    return red, green, blue


def _encode(pixels: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return np.frombuffer(file.getvalue(), np.uint8)
