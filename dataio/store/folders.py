"""Which files lie below a folder or a URI, and which were passed over?

What is hidden or a system's own (thumbnails, bins, resource forks) is nobody's picture; links are followed.
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
"""Names of folders and files that systems make beside pictures, in small letters."""


@dataclass
class Found:
    """What lies below a root: the names of its files, relative and posix, in no promised order."""

    names: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Folders that were not looked into, by their last names."""
    hidden: int = 0
    """Images of such names, in folders that were; what else is hidden (.DS_Store, ...) is not worth a word."""

    def note(self) -> str:
        """A line on what was skipped; '' if nothing was."""
        parts = []
        if folders := self.skipped.total():
            named = ", ".join(f"{count:,} {quoted(name)}" for name, count in self.skipped.most_common(5))
            parts.append(f"{folders:,} hidden or system folders ({named}{', ...' if len(self.skipped) > 5 else ''})")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden images")
        return f"WARNING: skipped {' and '.join(parts)}: nothing in them is indexed" if parts else ""


def look(root: Root, *, endings: tuple[str, ...], recursive: bool) -> Found:
    """All files below a root; `endings` are those of images.

    A folder that two names lead to is listed once, under its own name if that is below the root.

    Raises: SourceError for a root that is missing, is a file, or cannot be listed.
    """
    return _remote(root, endings) if root.remote else _local(root.folder, endings, recursive=recursive)


def _remote(root: Root, endings: tuple[str, ...]) -> Found:
    found, folders = Found(), set[str]()
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
        at = next((i for i, part in enumerate(above) if _passed_over(part)), None)
        if at is not None:
            folders.add("/".join(above[: at + 1]))
        elif _passed_over(last):
            found.hidden += last.lower().endswith(endings)
        else:
            found.names.append(name)
    found.skipped.update(PurePosixPath(folder).name for folder in folders)
    return found


def _local(root: Path, endings: tuple[str, ...], *, recursive: bool) -> Found:
    found = Found()
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    try:
        if not root.exists():
            raise SourceError(f"folder {root} does not exist: there is nothing to list; check the path")
        if not root.is_dir():
            raise SourceError(
                f"{root} is a file, not a folder: give the folder with the images, or use from_csv or from_file"
            )
        while folders or links:  # real folders first: a link never takes the place of the name it leads to
            folder = folders.pop() if folders else links.pop(0)
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            below = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
            for entry in sorted(folder.iterdir()):
                if _passed_over(entry.name):
                    if entry.is_dir():
                        found.skipped[entry.name] += 1
                    else:
                        found.hidden += entry.name.lower().endswith(endings)
                elif entry.is_dir():
                    if recursive:
                        (links if entry.is_symlink() else folders).append(entry)
                else:  # a broken link too: verify.py reports it, rather than nobody
                    found.names.append(below + entry.name)
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be listed ({error.strerror}): allow reading, or move it") from error
    return found


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEMS
