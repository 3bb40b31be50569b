"""How is a time measured so that it can be compared next year? One clock, one way to report, for every benchmark.

Warm up, synchronise the device, repeat; keep every repeat, report the median and the spread. Wall time says how fast,
CPU time (over all threads of the process) what it cost: on a shared machine the second is the steadier one.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from thawline.cluster.machine import provenance

DeviceName = Literal["cpu", "cuda"]
MIN_REPEATS = 5
"""Fewer have no spread worth reporting."""


class BenchmarkError(Exception):
    """A benchmark cannot run as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Timing:
    """Repeats of one measurement: seconds of wall and of CPU time (all threads) for `images_per_call` images."""

    images_per_call: int
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]

    @property
    def images_per_s(self) -> float:
        """Median over the repeats."""
        return float(np.median(self.images_per_call / np.array(self.wall_s)))

    def summary(self) -> dict[str, Any]:
        """images_per_s, ms_per_image and cpu_ms_per_image, each with its `spread`."""
        wall, cpu = np.array(self.wall_s), np.array(self.cpu_s)
        return {
            "images_per_s": spread(self.images_per_call / wall),
            "ms_per_image": spread(1000 * wall / self.images_per_call),
            "cpu_ms_per_image": spread(1000 * cpu / self.images_per_call),
        }


def spread(values: Any) -> dict[str, float]:
    """Median, min, max and mad (the median absolute deviation from the median) of (n,) numbers."""
    values = np.asarray(values, np.float64)
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    return {"median": float(median), "min": float(values.min()), "max": float(values.max()), "mad": float(mad)}


def measure(
    fn: Callable[[], object],
    *,
    images_per_call: int,
    device: torch.device,
    warmup: int = 2,
    repeats: int = MIN_REPEATS,
    wall: Callable[[], float] = time.perf_counter,
    cpu: Callable[[], float] = time.process_time,
) -> Timing:
    """Call `fn` `warmup` times unmeasured, then `repeats` times on both clocks, the device idle at either end.

    Raises: BenchmarkError for fewer than MIN_REPEATS repeats.
    """
    if repeats < MIN_REPEATS:
        raise BenchmarkError(f"repeats={repeats} gives no spread to judge by: give {MIN_REPEATS} or more")
    for _ in range(warmup):
        fn()
    walls, cpus = [], []
    for _ in range(repeats):
        synchronise(device)
        wall_began, cpu_began = wall(), cpu()
        fn()
        synchronise(device)
        walls.append(wall() - wall_began)
        cpus.append(cpu() - cpu_began)
    return Timing(images_per_call, tuple(walls), tuple(cpus))


def repeat(fn: Callable[[], object], times: int) -> None:
    """Call `fn` that often."""
    for _ in range(times):
        fn()


def open_device(name: DeviceName) -> torch.device:
    """The device of that name. Raises BenchmarkError for a GPU that is not there."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BenchmarkError("device='cuda', but torch sees no GPU here: nothing can be measured; give --device cpu")
    return torch.device("cuda", 0)


def check_positive(**values: float) -> None:
    """Raises BenchmarkError naming the first flag below 1."""
    for name, value in values.items():
        if value < 1:
            raise BenchmarkError(f"{name}={value} leaves nothing to measure: give 1 or more")


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within, torch's operators on the CPU use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def say(text: str) -> None:
    """Talk goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def report(
    name: str, question: str, settings: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], *, out: Path | None
) -> dict[str, Any]:
    """Print the results, one row each, then everything as one line of JSON; write that to `out` too.

    A result's values are numbers, or spreads as `spread` makes them. Returns what the JSON holds: name, question,
    date_utc, settings, results, hardware, load (the machine's, per minute), versions, commit.
    Raises: BenchmarkError when `out` cannot be written; the results have then been printed.
    """
    found: dict[str, Any] = {
        "name": name,
        "question": question,
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": dict(settings),
        "results": {row: dict(values) for row, values in results.items()},
        "hardware": provenance.hardware(),
        "load": os.getloadavg()[0],
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    line = json.dumps(found)
    print(f"{name}: {question}\n{_table(results)}\n{line}", flush=True)
    if out is not None:
        _write(out, line + "\n")
        say(f"written to {out}")
    return found


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Medians with their deviations, columns aligned."""
    columns = list(dict.fromkeys(key for values in results.values() for key in values))
    lines = [["", *columns]]
    lines += [[row, *(_cell(values.get(key)) for key in columns)] for row, values in results.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return f"{_number(value['median'])} ±{_number(value['mad'])}"
    return _number(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _write(out: Path, text: str) -> None:
    """Replace `out` as a whole."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise BenchmarkError(
            f"{out} cannot be written ({error.strerror}): the results stand above only; give --out another place"
        ) from error
