"""What becomes of files that were damaged or tampered with at random? Told in a sentence, or read as they were written.

    python -m tests.campaigns.fuzz 300 [--seed S] [--only manifest.parquet manifest.arrow shard job.toml csv checkpoint]

Each kind of file is written once and then mutated N times: bits, bytes and blocks changed, zeroed, moved, cut off, put
in; in texts, also what parsers stumble over. The mutated file is read as the product reads it. The outcome is `same`
(what was read is what was written), or `told` (one of the product's errors, or a checkpoint that was passed over).
Anything else fails the campaign: `other` (something else was read, silently), `traceback` (an error that is nobody's
sentence, or a sentence without end), `signal`, `hang`, `memory` (2 GB more than before).

A job and a CSV may be edited, and a changed letter is then a changed letter: there, what was read is held against
another reading of the mutated file, by tomllib and by Python's csv.

Reading goes on in a process of its own, which says what it is at, so that what kills it, or never ends, is known; the
next process goes on behind it. The same seed gives the same mutations.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.mutations import KINDS, _planted, mutated

ROOT = Path(__file__).parents[2]
GOOD = ("same", "told")
_LIMIT_S, _START_S = 60, 300
_MEMORY_KB = 2 << 20
_LONGEST = 2000
"""Characters of a sentence: what is quoted in it is cut."""


# One process of readings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What became of a mutation."""

    kind: str
    number: int
    outcome: str
    said: str = ""


def outcomes(
    kind: str, folder: Path, *, seed: int, first: int, count: int, begins: Callable[[int], None] = lambda k: None
) -> Iterator[Found]:
    """What becomes of mutations `first` to `count` - 1 of a kind, in this process; `begins` hears of each before."""
    from thawline.cluster.errors import ClusterError
    from thawline.dataio.errors import DataError
    from thawline.trainer.errors import TrainError

    cases = list({**KINDS, "planted": _planted}[kind](folder))
    whole = [case.file.read_bytes() for case in cases]
    for case in cases:
        if (found := case.read(case.file)) != "same":
            raise RuntimeError(f"{case.file} is not read as it was written: {found}")
    ignored = list[str]()
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraised: ignored.append(repr(unraised.exc_value))
    for k in range(first, count):
        rng = random.Random(f"{seed} {kind} {k}")
        i = rng.randrange(len(cases))
        file, said = cases[i].file, cases[i].file.name
        begins(k)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        file.write_bytes(mutated(whole[i], rng, text=cases[i].text))
        try:
            outcome = cases[i].read(file)
        except (DataError, ClusterError, TrainError) as error:
            said = str(error)
            outcome = "told" if len(said) <= _LONGEST else "traceback"
        except Exception as error:  # whatever it is, it is what is looked for
            outcome, said = "traceback", f"{type(error).__name__}: {error}"
        if ignored:  # printed with its traceback, and passed over
            outcome, said = "traceback", ignored.pop()
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > _MEMORY_KB:
            outcome = "memory"
        file.write_bytes(whole[i])
        yield Found(kind, k, outcome, said[:300])
    sys.unraisablehook = hook


def child(kind: str, seed: int, first: int, count: int, folder: Path) -> None:
    """`outcomes` as lines of JSON: one when a mutation begins, and one when it has ended."""

    def say(**words: Any) -> None:
        print(json.dumps(words), flush=True)

    for found in outcomes(kind, folder, seed=seed, first=first, count=count, begins=lambda k: say(begins=k)):
        say(ended=found.number, outcome=found.outcome, said=found.said)


# The campaign ---------------------------------------------------------------------------------------------


def campaign(kind: str, count: int, *, seed: int = 0) -> Iterator[Found]:
    """What became of each mutation of a kind, in their order."""
    first = 0
    while first < count:
        for found in _process(kind, seed, first, count):
            yield found
            first = found.number + 1


def _process(kind: str, seed: int, first: int, count: int) -> Iterator[Found]:
    """Until all are read, or the process is gone, which is then the outcome of the mutation that it was at."""
    folder = Path(tempfile.mkdtemp(prefix="thawline-fuzz-"))
    words = [
        sys.executable,
        "-m",
        "tests.campaigns.fuzz",
        "--child",
        kind,
        str(seed),
        str(first),
        str(count),
        str(folder),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    at, begun, hung = first, False, False
    with subprocess.Popen(words, cwd=ROOT, env=env, **pipes) as process:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_tell, args=(process, lines), daemon=True).start()
        try:
            while line := lines.get(timeout=_LIMIT_S if begun else _START_S):
                said, begun = json.loads(line), True
                at = said.get("begins", at)
                if "ended" in said:
                    yield Found(kind, at, said["outcome"], said["said"])
                    at += 1
        except queue.Empty:
            hung = True
        finally:
            process.kill()
            shutil.rmtree(folder, ignore_errors=True)
        errors = process.stderr.read() if process.stderr else ""
    if not begun:
        raise RuntimeError(f"{kind} cannot be fuzzed: {errors}")
    if at < count:
        end = "hang" if hung else "signal" if process.returncode < 0 else "traceback"
        yield Found(kind, at, end, f"status {process.returncode}: {errors[-300:]}")


def _tell(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """Every line that it prints, and an empty one when it has ended."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    process.wait()
    lines.put("")


def main(words: Sequence[str] | None = None) -> int:
    """Print a line a kind, every failure, and the counts as JSON; 0 when nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    asked = parser.parse_args(words)
    counts: dict[str, dict[str, int]] = {}
    failed = 0
    for kind in asked.only:
        began, seen = time.monotonic(), Counter[str]()
        for found in campaign(kind, asked.count, seed=asked.seed):
            seen[found.outcome] += 1
            if found.outcome not in GOOD:
                failed += 1
                print(f"{kind} {found.number}: {found.outcome}: {found.said}", flush=True)
        counts[kind] = dict(seen)
        print(f"{kind}: {dict(seen)} in {time.monotonic() - began:.0f} s", flush=True)
    print(json.dumps({"seed": asked.seed, "counts": counts, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        seed, first, count = map(int, sys.argv[3:6])
        child(sys.argv[2], seed, first, count, Path(sys.argv[6]))
    else:
        sys.exit(main())
