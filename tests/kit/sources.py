"""Which files do several tests of sources share?"""

from __future__ import annotations

from pathlib import Path

from thawline.dataio.table.sources import Table


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def paths(table: Table) -> list[str]:
    return table.rows["path"].to_pylist()


def _csv(folder: Path, names: list[str]) -> Path:
    (folder / "list.csv").write_text("\n".join(["file", *names]))
    return folder / "list.csv"
