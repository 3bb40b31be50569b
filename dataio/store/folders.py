"""Which files lie below a folder or a URI, and which were skipped?

Hidden files and a system's own (thumbnails, bins, resource forks) are not pictures; links are followed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from thawline.dataio.errors import SourceError, quoted
from thawline.dataio.store.root import Root

_SYSTEMS = frozenset(
    (
        *("@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot"),  # Synology, QNAP
        *("__macosx", "$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "desktop.ini"),  # Windows
    )
)
"""Lower-case names of folders and files that operating systems make beside pictures."""


@dataclass
class Listing:
    """Relative posix names of the files below a root, in no particular order."""

    names: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Last components of skipped folders."""
    hidden: int = 0
    """Hidden images in the other folders; other hidden files (.DS_Store, ...) are not counted."""

    def note(self) -> str:
        """A sentence on what was skipped; '' if nothing was."""
        parts = []
        if folders := self.skipped.total():
            named = ", ".join(f"{count:,} {quoted(name)}" for name, count in self.skipped.most_common(5))
            parts.append(f"{folders:,} hidden or system folders ({named}{', ...' if len(self.skipped) > 5 else ''})")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden images")
        return f"WARNING: skipped {' and '.join(parts)}: nothing in them is indexed" if parts else ""


def list_files(root: Root, *, endings: tuple[str, ...], recursive: bool) -> Listing:
    """All files below a root; `endings` are those of images.

    A folder with two names is listed once, under its real name if that is below the root.

    Raises: SourceError for a root that is missing, is a file, or cannot be listed.
    """
    return _remote(root, endings) if root.remote else _local(root.folder, endings, recursive=recursive)


def _remote(root: Root, endings: tuple[str, ...]) -> Listing:
    listing, folders = Listing(), set[str]()
    try:
        names = [name for name, _ in root.walk()]
    except FileNotFoundError as error:
        raise SourceError(f"{root} does not exist: there is nothing to list; check the URI") from error
    except OSError as error:
        raise SourceError(
            f"{root} cannot be listed ({quoted(str(error))}): check the URI, the network, and that you may read there"
        ) from error
    for name in names:
        *above, last = name.split("/")
        at = next((i for i, part in enumerate(above) if _is_skipped(part)), None)
        if at is not None:
            folders.add("/".join(above[: at + 1]))
        elif _is_skipped(last):
            listing.hidden += last.lower().endswith(endings)
        else:
            listing.names.append(name)
    listing.skipped.update(PurePosixPath(folder).name for folder in folders)
    return listing


def _local(root: Path, endings: tuple[str, ...], *, recursive: bool) -> Listing:
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    try:
        if not root.exists():
            raise SourceError(f"folder {root} does not exist: there is nothing to list; check the path")
        if not root.is_dir():
            raise SourceError(
                f"{root} is a file, not a folder: give the folder with the images, or use from_csv or from_file"
            )
        while folders or links:  # real folders first: a link never replaces the folder that it points to
            folder = folders.pop() if folders else links.pop(0)
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            below = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
            for entry in sorted(folder.iterdir()):
                if _is_skipped(entry.name):
                    if entry.is_dir():
                        listing.skipped[entry.name] += 1
                    else:
                        listing.hidden += entry.name.lower().endswith(endings)
                elif entry.is_dir():
                    if recursive:
                        (links if entry.is_symlink() else folders).append(entry)
                else:  # a broken link too: verify.py reports it
                    listing.names.append(below + entry.name)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be listed ({error.strerror}): allow reading, or move it") from error
    return listing


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEMS
