"""Does a machine fetch each shard once, keep within its bounds, and take nothing from those who read?"""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thawline.cluster.machine import provenance
from thawline.dataio.errors import ShardError
from thawline.dataio.store import cache as caches
from thawline.dataio.store import root
from thawline.dataio.store.cache import Held, default_folder, hold
from thawline.dataio.store.root import Root
from thawline.dataio.table.manifest import Shard

GIB = 1 << 30
SIZE = 1000


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_WAITS_S", (0.0, 0.0, 0.0))


def make_set(folder: Path, *, count: int = 2, size: int = SIZE) -> tuple[str, list[Shard]]:
    """The URI of a store with so many shards, and these: bytes that differ by the folder's name."""
    import xxhash

    folder.mkdir()
    shards = []
    for k in range(count):
        data = f"{folder.name}{k}".encode().ljust(size, b".")
        (folder / f"shard-{k}.arrow").write_bytes(data)
        shards.append(Shard(f"shard-{k}.arrow", k, 1, size, xxhash.xxh3_128_hexdigest(data)))
    return f"file://{folder}", shards


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*.arrow*"))


def take(home: str, shards: list[Shard], cache: Path, *, sizes: float = 100, **options: Any) -> Held:
    """Hold them in a cache that has room for so many shards of SIZE."""
    return hold(Root(home), shards, folder=cache, limit_gib=sizes * SIZE / GIB, **options)


def same(held: Held, home: str, shards: list[Shard]) -> bool:
    originals = [(Path(home.removeprefix("file://")) / shard.name).read_bytes() for shard in shards]
    return [path.read_bytes() for path in held.paths] == originals


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each shard that is asked for over the network."""
    names, attempt = list[str](), caches._Fetching._attempt

    def watched(self: Any, k: int) -> None:
        names.append(self._shards[k].name)
        attempt(self, k)

    monkeypatch.setattr(caches._Fetching, "_attempt", watched)
    return names


def test_shards_come_once_and_progress_ends_at_the_whole(tmp_path: Path, fetched: list[str]) -> None:
    home, shards = make_set(tmp_path / "store", count=5)
    seen = list[tuple[int, int]]()
    held = take(home, shards, tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert same(held, home, shards)
    assert sorted(fetched) == [shard.name for shard in shards]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (5 * SIZE, 5 * SIZE)
    again = take(home, shards, tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert again.paths == held.paths
    assert len(fetched) == 5
    assert seen[-1] == (5 * SIZE, 5 * SIZE)


def test_the_usual_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "thawline" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "thawline" / "shards"


_RANK = """
import sys, time
from thawline.dataio.store import cache as caches
from thawline.dataio.table.manifest import Shard
from thawline.dataio.store.root import Root
attempt = caches._Fetching._attempt
def logged(self, k):
    with open(sys.argv[3], "a") as log:
        log.write(self._shards[k].name + "\\n")
    time.sleep(0.05)  # so that the others come while it is under way
    attempt(self, k)
caches._Fetching._attempt = logged
shards = [Shard(*fields) for fields in eval(sys.argv[4])]
print("ready", flush=True)
sys.stdin.readline()
held = caches.hold(Root(sys.argv[1]), shards, folder=sys.argv[2], limit_gib=1)
print(sum(len(path.read_bytes()) for path in held.paths), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    """Starts processes that hold shards in tmp_path/cache from "go" to "end"."""
    started = list[subprocess.Popen[str]]()

    def start(home: str, shards: list[Shard], count: int) -> list[subprocess.Popen[str]]:
        fields = repr([(s.name, s.first, s.rows, s.bytes, s.hash) for s in shards])
        command = [sys.executable, "-c", _RANK, home, str(tmp_path / "cache"), str(tmp_path / "log"), fields]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.extend(subprocess.Popen(command, cwd=provenance.HOME, **pipes) for _ in range(count))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def tell(processes: list[subprocess.Popen[str]], word: str) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{word}\n")
        process.stdin.flush()


def hear(processes: list[subprocess.Popen[str]]) -> list[str]:
    lines = []
    for process in processes:
        assert process.stdout is not None
        lines.append(process.stdout.readline().strip())
    return lines


Ranks = Callable[[str, list[Shard], int], list[subprocess.Popen[str]]]


def test_processes_of_a_machine_fetch_each_shard_once_between_them(tmp_path: Path, ranks: Ranks) -> None:
    home, shards = make_set(tmp_path / "store", count=6)
    processes = ranks(home, shards, 3)
    assert hear(processes) == ["ready"] * 3
    tell(processes, "go")
    assert hear(processes) == [str(6 * SIZE)] * 3
    assert sorted((tmp_path / "log").read_text().split()) == [shard.name for shard in shards]


def test_what_a_living_process_holds_is_not_evicted_and_what_a_dead_one_held_is(tmp_path: Path, ranks: Ranks) -> None:
    home, shards = make_set(tmp_path / "used")
    (process,) = ranks(home, shards, 1)
    tell([process], "go")
    assert hear([process]) == ["ready"]
    assert hear([process]) == [str(2 * SIZE)]
    before = kept(tmp_path / "cache")
    other = make_set(tmp_path / "other")
    with pytest.raises(ShardError, match=r"runs that go on now use .* GiB of the cache .* or wait until"):
        take(*other, tmp_path / "cache", sizes=3)
    assert kept(tmp_path / "cache") == before
    process.kill()
    process.wait()
    held = take(*other, tmp_path / "cache", sizes=3)
    assert same(held, *other)
    assert not set(before) <= set(kept(tmp_path / "cache"))


def test_the_least_recently_used_goes_first_and_only_as_much_as_must(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    sets = {name: make_set(tmp_path / name) for name in ("a", "b", "c", "d")}
    paths = dict[str, list[Path]]()
    for age, name in enumerate(("a", "b", "c")):
        held = take(*sets[name], cache, sizes=7)
        paths[name] = list(held.paths)
        held.release()
        for k, path in enumerate(held.paths):
            os.utime(path, (1e9 + 100 * age + k,) * 2)
    take(*sets["a"], cache, sizes=7).release()  # used again: b is now the oldest
    held = take(*sets["d"], cache, sizes=7)
    assert kept(cache) == sorted([*paths["a"], paths["b"][1], *paths["c"], *held.paths])
    held.release()
    take(*sets["d"], cache, sizes=4).release()
    assert kept(cache) == sorted([*paths["a"], *held.paths])
    assert not paths["b"][0].parent.exists()


def test_two_data_sets_in_use_share_the_room_that_there_is(tmp_path: Path) -> None:
    one, other = make_set(tmp_path / "one"), make_set(tmp_path / "other")
    first = take(*one, tmp_path / "cache", sizes=4)
    second = take(*other, tmp_path / "cache", sizes=4)
    assert same(first, *one)
    assert same(second, *other)
    third = make_set(tmp_path / "third", count=1)
    with pytest.raises(ShardError, match="runs that go on now use"):
        take(*third, tmp_path / "cache", sizes=4)
    second.release()
    second.release()
    assert same(take(*third, tmp_path / "cache", sizes=4), *third)
    assert same(first, *one)


def test_strangers_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "cache" / "photos"
    mine.mkdir(parents=True)
    (mine / "table.arrow").write_bytes(bytes(10 * SIZE))
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    take(*make_set(tmp_path / "a"), tmp_path / "cache", sizes=2).release()
    take(*make_set(tmp_path / "b"), tmp_path / "cache", sizes=2).release()
    assert (mine / "table.arrow").stat().st_size == 10 * SIZE
    assert (tmp_path / "cache" / "notes.txt").read_text() == "mine"


def test_more_than_the_limit_is_refused_before_anything_comes(tmp_path: Path, fetched: list[str]) -> None:
    home, shards = make_set(tmp_path / "store", count=3)
    words = (
        r"3 shards in file://.*/store have .* GiB, and the cache .* may hold .* GiB: .*raise data.cache_gib, or train"
    )
    with pytest.raises(ShardError, match=words):
        take(home, shards, tmp_path / "cache", sizes=2.9)
    assert fetched == []
    assert not (tmp_path / "cache").exists()


# What comes broken ------------------------------------------------------------------------------------------


def breaking(monkeypatch: pytest.MonkeyPatch, *, times: int, error: OSError | None = None, after: int = 300) -> None:
    """Connections that break after so many bytes (or, with no error, just end there), so many times."""
    left, opened = [times], root._open

    class Stream:
        def __init__(self, inner: Any) -> None:
            self.inner, self.bad = inner, left[0] > 0
            left[0] -= 1
            self.read = False

        def read_buffer(self, size: int) -> Any:
            if self.bad and self.read:
                if error is not None:
                    raise error
                return b""
            self.read = True
            return self.inner.read_buffer(after if self.bad else size)

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: object) -> None:
            self.inner.close()

    class Store:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def open_input_stream(self, path: str) -> Stream:
            return Stream(self.inner.open_input_stream(path))

    def spoiled(uri: str) -> tuple[Any, str]:
        filesystem, base = opened(uri)
        return Store(filesystem), base

    monkeypatch.setattr("thawline.dataio.store.root._open", spoiled)


@pytest.mark.parametrize("error", [OSError("connection reset"), None])
def test_a_connection_that_breaks_three_times_is_tried_a_fourth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None, fetched: list[str]
) -> None:
    home, shards = make_set(tmp_path / "store", count=1)
    breaking(monkeypatch, times=3, error=error)
    assert same(take(home, shards, tmp_path / "cache"), home, shards)
    assert len(fetched) == 4


@pytest.mark.parametrize(
    ("error", "words"), [(OSError("connection reset"), "connection reset"), (None, r"300 of 1,000 bytes came")]
)
def test_one_that_breaks_for_good_is_told_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None, words: str
) -> None:
    home, shards = make_set(tmp_path / "store")
    breaking(monkeypatch, times=1000, error=error)
    with pytest.raises(ShardError, match=rf"shard-\d.arrow cannot be fetched \({words}.*check the network.*pack again"):
        take(home, shards, tmp_path / "cache")
    assert kept(tmp_path / "cache") == []


def test_a_shard_that_is_damaged_in_the_store_is_not_kept(tmp_path: Path, fetched: list[str]) -> None:
    home, shards = make_set(tmp_path / "store", count=1)
    file = tmp_path / "store" / "shard-0.arrow"
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-0.arrow cannot be fetched \(1,000 of 1,000 bytes came, with xxh3_128"):
        take(home, shards, tmp_path / "cache")
    assert len(fetched) == 4
    assert kept(tmp_path / "cache") == []
    file.unlink()
    with pytest.raises(ShardError, match="cannot be fetched"):
        take(home, shards, tmp_path / "cache")
    assert len(fetched) == 5  # what is not there will not be there in a second


def test_a_full_disk_is_told_once_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[str]
) -> None:
    home, shards = make_set(tmp_path / "store", count=1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(caches.os, "fsync", full)  # type: ignore[attr-defined]
        with pytest.raises(ShardError, match=r"the cache .* cannot be written \(No space left on device\): .*room"):
            take(home, shards, tmp_path / "cache")
    assert len(fetched) == 1
    assert kept(tmp_path / "cache") == []
    assert same(take(home, shards, tmp_path / "cache"), home, shards)


def test_a_failure_gives_the_claim_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, shards = make_set(tmp_path / "store")
    with monkeypatch.context() as patch:
        breaking(patch, times=1000)
        with pytest.raises(ShardError):
            take(home, shards, tmp_path / "cache", sizes=2)
    other = make_set(tmp_path / "other")
    assert same(take(*other, tmp_path / "cache", sizes=2), *other)


def test_what_a_killed_download_left_is_overwritten_or_cleared(tmp_path: Path) -> None:
    home, shards = make_set(tmp_path / "store", count=1)
    held = take(home, shards, tmp_path / "cache")
    held.release()
    (path,) = held.paths
    part = path.with_suffix(".arrow.part")
    path.rename(part)
    assert same(take(home, shards, tmp_path / "cache"), home, shards)
    assert kept(tmp_path / "cache") == [path]
    part.write_bytes(bytes(10))
    other = make_set(tmp_path / "other", count=1)
    take(*other, tmp_path / "cache").release()
    assert not part.exists()
    assert path.exists()


def test_a_file_of_the_wrong_size_is_fetched_anew(tmp_path: Path, fetched: list[str]) -> None:
    home, shards = make_set(tmp_path / "store", count=1)
    held = take(home, shards, tmp_path / "cache")
    held.paths[0].write_bytes(b"short")
    assert same(take(home, shards, tmp_path / "cache"), home, shards)
    assert len(fetched) == 2


def test_locks_end_with_the_holder(tmp_path: Path) -> None:
    held = take(*make_set(tmp_path / "store", count=1), tmp_path / "cache")
    use = held.paths[0].parent / "use"

    def free() -> bool:
        with use.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    assert not free()
    del held  # nobody can read them any more
    assert free()
