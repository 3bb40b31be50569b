"""Folders that are this user's alone: made anew, never a stranger's, and gone once their process is."""

import os
import tempfile
from pathlib import Path

import pytest

from thawline.dataio.errors import PlaceError
from thawline.dataio.store import private
from thawline.dataio.store.private import cache_home, check_own, compile_cache, scratch, scratch_path, use_compile_cache


@pytest.fixture(autouse=True)
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR, taken to be short enough."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(private, "_LONGEST", 1000)
    return tmp_path


def test_a_scratch_folder_lives_as_long_as_its_process_and_is_nobody_elses(tmp: Path) -> None:
    killed = tmp / "thawline_killed"
    (killed / "ray" / "session").mkdir(parents=True)
    killed.chmod(0o700)
    foreign = tmp / "thawline_foreign"  # others can write to it: not of this making
    foreign.mkdir()
    foreign.chmod(0o777)
    (tmp / "elsewhere").mkdir(mode=0o700)
    (tmp / "thawline_link").symlink_to(tmp / "elsewhere")
    with scratch() as mine:
        assert mine.stat().st_mode & 0o777 == 0o700
        assert not killed.exists(), "the next start clears what belongs to nobody alive"
        with scratch(scratch_path("known")) as other:
            assert other == tmp / "thawline_known"
            assert mine.exists(), "a living one's"
        assert not other.exists()
    assert sorted(path.name for path in tmp.iterdir()) == ["elsewhere", "thawline_foreign", "thawline_link"]


def test_a_scratch_folder_that_stands_already_is_not_used(tmp: Path) -> None:
    (tmp / "thawline_known").mkdir(mode=0o700)
    (tmp / "thawline_known" / "planted").touch()
    (tmp / "thawline_known").chmod(0o777)
    with pytest.raises(PlaceError, match="cannot be made"), scratch(scratch_path("known")):
        pass


def test_a_path_too_long_for_sockets_is_left_for_a_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_LONGEST", 20)
    assert scratch_path("x") == Path("/tmp/thawline_x")


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_what_others_could_have_made_is_refused(kind: str, tmp: Path) -> None:
    folder = tmp / "it"
    if kind == "link":
        folder.symlink_to(tmp)
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o770)
    with pytest.raises(PlaceError, match="cannot be trusted"):
        check_own(folder)


@pytest.mark.parametrize("home", ["of mine", "open to others", "that cannot be written", "none"])
def test_compiled_code_is_kept_where_nobody_else_can_put_it(
    home: str, tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    at_home = tmp / "home" / ".cache" / "thawline"
    monkeypatch.setenv("HOME", str(tmp / "home"))
    if home == "open to others":
        at_home.mkdir(parents=True)
        at_home.chmod(0o777)
    elif home == "that cannot be written":
        (tmp / "home").touch()
    elif home == "none":

        def nameless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", nameless)
        assert cache_home() == tmp / f"thawline-{os.getuid()}"
    found = compile_cache()
    assert found.is_relative_to(at_home) is (home == "of mine")
    assert found.is_dir()
    assert {each.stat().st_mode & 0o077 for each in (found, found.parent)} == {0}


@pytest.mark.parametrize("given", ["", "torch's own", "the user's"])
def test_torch_is_told_unless_the_user_has(given: str, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp / "cache"))
    places = {"": "", "torch's own": str(tmp / "torchinductor_me"), "the user's": "/mine/torchinductor_me"}
    monkeypatch.setenv(name, places[given])  # torch sets it when it is imported
    use_compile_cache()
    assert os.environ[name] == ("/mine/torchinductor_me" if given == "the user's" else str(compile_cache()))
