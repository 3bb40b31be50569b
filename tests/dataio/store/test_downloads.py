"""Does a download that breaks go on where it broke, and is it given up when it must be?"""

from pathlib import Path

import pytest

from tests.kit.download_site import (
    HALF,
    IMAGES,
    LogLine,
    Site,
    assert_complete,
    contents,
    expect,
    interrupt_after,
    interrupted_download,
    packed,
)
from thawline.dataio.errors import SourceError
from thawline.dataio.samples import fetch_pets


def test_a_cut_connection_is_continued_and_no_byte_comes_twice(site: Site, tmp_path: Path) -> None:
    site.cuts = [HALF, 1000]
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    images = [answer for answer in site.log if answer.name == "images.tar.gz"]
    assert [(answer.range, answer.status) for answer in images] == [
        (None, 200),
        (f"bytes={HALF}-", 206),
        (f"bytes={HALF + 1000}-", 206),
    ]
    assert site.sent("images.tar.gz") == len(IMAGES)


def test_a_reset_connection_is_continued(site: Site, tmp_path: Path) -> None:
    site.reset, site.cuts = True, [HALF, 1000]
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert [answer.status for answer in site.log[1:3]] == [206, 206]  # what had been read before the reset was kept


def test_a_line_that_breaks_more_often_than_five_times_still_gets_there(site: Site, tmp_path: Path) -> None:
    site.cuts = [2000] * 12
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.sent("images.tar.gz") == len(IMAGES)


def test_an_interrupted_command_continues_where_it_broke_off(site: Site, tmp_path: Path) -> None:
    here = interrupted_download(site, tmp_path)
    seen: list[tuple[str, int, int | None]] = []
    fetch_pets(tmp_path, progress=lambda *row: seen.append(row))
    assert_complete(tmp_path)
    assert (site.log[0].range, site.log[0].status, site.log[0].sent) == (f"bytes={here}-", 206, len(IMAGES) - here)
    assert seen[0] == ("images.tar.gz", here, len(IMAGES))


def test_an_interruption_after_the_last_byte_fetches_nothing_again(site: Site, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch_pets(tmp_path, progress=interrupt_after(len(IMAGES)))
    site.log.clear()
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.log[0] == LogLine("images.tar.gz", f"bytes={len(IMAGES)}-", 416)
    assert site.sent("images.tar.gz") == 0


def test_a_redirect_keeps_the_range(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = interrupted_download(site, tmp_path)
    expect(monkeypatch, f"{site.url}/old")
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert site.sent("images.tar.gz") == len(IMAGES) - here


def test_a_file_that_changed_at_the_server_starts_over(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = interrupted_download(site, tmp_path)
    newer = {name: packed(files) for name, files in contents(seed=1).items()}
    assert len(newer["images.tar.gz"]) > here
    site.files = newer
    expect(monkeypatch, site.url, newer)
    fetch_pets(tmp_path)
    assert (site.log[0].range, site.log[0].status) == (f"bytes={here}-", 200)
    assert (tmp_path / "oxford-iiit-pet" / "images.tar.gz").read_bytes() == newer["images.tar.gz"]
    assert (tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg").read_bytes() == (
        contents(seed=1)["images.tar.gz"]["images/Abyssinian_1.jpg"]
    )


def test_a_part_longer_than_the_file_starts_over(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "oxford-iiit-pet" / "images.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(IMAGES + b"more")
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert [answer.status for answer in site.log] == [416, 200, 200]


def test_a_server_that_cannot_continue_starts_over(site: Site, tmp_path: Path) -> None:
    interrupted_download(site, tmp_path)
    site.ranges = False
    fetch_pets(tmp_path)
    assert_complete(tmp_path)
    assert (site.log[0].status, site.log[0].sent) == (200, len(IMAGES))


def test_a_server_that_never_gets_further_is_given_up(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cuts = False, [HALF] * 20
    with pytest.raises(SourceError, match=rf"ended after {HALF:,} of {len(IMAGES):,} bytes\).*repeat the command"):
        fetch_pets(tmp_path)
    assert len(site.log) == 5


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.statuses = [0, 503, 429, 500]
    fetch_pets(tmp_path)
    assert_complete(tmp_path)


def test_a_file_that_is_gone_is_not_asked_for_again(site: Site, tmp_path: Path) -> None:
    del site.files["images.tar.gz"]
    with pytest.raises(SourceError, match=r"images\.tar\.gz cannot be fetched \(404 Not Found\)"):
        fetch_pets(tmp_path)
    assert len(site.log) == 1
