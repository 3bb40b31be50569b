"""Where do real images to try things on come from? Small ones out of a package, large ones over the network.

scikit-learn carries 1,797 handwritten digits of UCI's optical recognition set (Alpaydin and Kaynak, 1998).
torchvision knows where the Oxford-IIIT Pet photos lie: cats and dogs of 37 breeds (Parkhi et al., 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from thawline.dataio.errors import SourceError
from thawline.dataio.store.downloads import Progress, Resource, fetch


def write_digits(
    folder: str | Path,
    *,
    size_px: int = 96,
    quality: int = 92,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the digits as grey JPEGs, size_px x size_px, named DIGIT_INDEX.jpg; return how many there are.

    The 8 x 8 originals, 0 to 16, are scaled to 0 to 255 and enlarged bicubically. Each file appears whole or
    not at all; a folder that has all of them at this size is left as it is. `progress(done, total)` counts
    files.

    Raises: SourceError when scikit-learn is not installed, or the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    if size_px < 1:
        raise SourceError(f"size_px={size_px} leaves no pixels: give 1 or more")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SourceError(
            "scikit-learn, which carries the digits, is not installed: pip install 'thawline[samples]'"
        ) from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    names = [f"{digit}_{index:04d}.jpg" for index, digit in enumerate(digits.target)]
    try:
        if _complete(folder, names, size_px):
            return len(names)
        folder.mkdir(parents=True, exist_ok=True)
        for done, (name, small) in enumerate(zip(names, pixels, strict=True), start=1):
            image = Image.fromarray(small).resize((size_px, size_px), Image.Resampling.BICUBIC)
            _save(image, folder / name, quality)
            if progress is not None:
                progress(done, len(names))
    except OSError as error:
        raise SourceError(
            f"digits cannot go to {folder} ({error.strerror or error}): give one that you can write to"
        ) from error
    return len(names)


def _save(image: Image.Image, file: Path, quality: int) -> None:
    temporary = file.with_name(f".{file.name}.tmp")  # hidden: from_folder never sees it
    try:
        image.save(temporary, format="JPEG", quality=quality)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _complete(folder: Path, names: list[str], size_px: int) -> bool:
    if not folder.is_dir() or not {path.name for path in folder.iterdir()}.issuperset(names):
        return False
    with Image.open(folder / names[-1]) as last:  # written last: an earlier size would show here
        return last.size == (size_px, size_px)


def fetch_pets(folder: str | Path, *, progress: Progress | None = None) -> Path:
    """Fetch the Oxford-IIIT Pet photos, and return the folder they are in: `folder`/oxford-iiit-pet/images.

    Its files are called BREED_NUMBER.jpg. Whatever was interrupted is continued: a download where it broke off, an
    unpacking from its start. Photos that are all there are left as they are. The archives stay; archives that were
    put into `folder`/oxford-iiit-pet by hand are checked and used.

    Raises: SourceError when an archive cannot be had or has the wrong checksum, or the folder cannot be written.
    """
    from torchvision.datasets import OxfordIIITPet
    from torchvision.datasets.utils import extract_archive

    base = Path(folder).expanduser() / "oxford-iiit-pet"
    resources = [Resource(url, md5) for url, md5 in OxfordIIITPet._RESOURCES]
    # torchvision takes two folders for a whole data set; a kill while it unpacks the second leaves both. So a file
    # that is written last tells which archives were unpacked to their ends.
    marker, unpacked = base / ".unpacked", "".join(f"{each.md5}  {each.name}\n" for each in resources)
    try:
        if not (
            marker.is_file()
            and marker.read_text(encoding="utf-8") == unpacked
            and all((base / name).is_dir() for name in ("images", "annotations"))
        ):
            base.mkdir(parents=True, exist_ok=True)
            fetch(resources, base, progress=progress)
            marker.unlink(missing_ok=True)
            for each in resources:
                extract_archive(str(base / each.name), str(base))  # writes anew what lies there half-written
            OxfordIIITPet(base.parent)
            marker.write_text(unpacked, encoding="utf-8")
    except OSError as error:
        raise SourceError(
            f"pets cannot go to {base} ({error.strerror or error}): give a folder that you can write to, with about "
            "1.7 GB free; what has come is kept"
        ) from error
    return base / "images"
