"""What does the trainer cost beside a bare loop? The same model on the same batches, in turns, window by window.

The bare loop is what a notebook has: forward, backward, AdamW, a sum of losses. Against it stands `Learner` with
metrics, recorder and a worker's real exporter, once without checkpoints and once with one every window. Batches are
gathered from memory, for both alike. The learner is stopped where it asks for a batch, and there the bare loop takes
its turn, so that both meet the machine in the same mood. A validation takes place after the last window, and is in
none.

A turn is short, since a machine's mood changes within seconds, and there are many, since it still differs by percents
from one turn to the next: the standard error says whether the answer can be told from the noise.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from thawline.benchmarks.harness import (
    BenchmarkError,
    DeviceName,
    check_positive,
    measure,
    open_device,
    report,
    say,
    spread,
    synchronise,
    torch_threads,
)
from thawline.benchmarks.step import CLASSES, LR, defaults, noise, prepared, stepping
from thawline.cluster.observe.exporter import Exporter
from thawline.dataio.batch import Batch, ImageBatch
from thawline.dataio.hashing import hash64
from thawline.dataio.stream.arrays import ArrayLoader
from thawline.dataio.stream.plan import Once, Training
from thawline.dataio.stream.renderer import default_threads
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.saver import snapshot
from thawline.trainer.context import LocalContext
from thawline.trainer.learner import Learner
from thawline.trainer.optimisers import optim
from thawline.trainer.optimisers.settings import OptimSettings
from thawline.trainer.settings import PrecisionName
from thawline.trainer.step.precision import Precision, autocast, choose_precision, place
from thawline.trainer.step.window import Window

QUESTION = "what does the trainer cost beside a bare loop?"
KINDS = {"learner": inf, "learner, a checkpoint a window": 1e-9}
"""What stands against the bare loop -> the least seconds between its checkpoints, which are due at windows' ends."""
MINUTE = "learner, a checkpoint a minute"
"""What a job keeps unless it says otherwise; reckoned from the two above, since a turn is far shorter."""
_BATCHES = 4
_WARMUP = 1
_WRITE_S = 60.0
_CALLS = 20


def main(
    *,
    device: DeviceName = "cpu",
    model: str = "",
    batch: int = 0,
    size_px: int = 0,
    steps: int = 2,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    threads: int = 1,
    repeats: int = 60,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure a step of the bare loop and of the learner, what the second takes longer, and some of its parts.

    Args:
        device: Where to train.
        model: As in `step`; batch and size_px too.
        batch: Images a step.
        size_px: Side of the images.
        steps: Steps a window, the learner's log_every; a window is also a turn.
        precision: auto is fp32 on the CPU, bf16 on a GPU.
        threads: Of torch's operators on the CPU; 0 is one a core, at most 8. One is the steadiest.
        repeats: Measured turns of each.
        out: Also write the JSON here.
    """
    where = open_device(device)
    model, batch, size_px, _ = defaults(device, model, batch, size_px, 1)
    check_positive(steps=steps)
    if steps < 2 or repeats < 5:
        raise BenchmarkError(f"steps={steps} and repeats={repeats} leave nothing to compare: give 2 and 5, or more")
    threads = threads or default_threads(1)
    kind: PrecisionName = precision if precision != "auto" else "fp32" if device == "cpu" else "bf16"
    chosen = choose_precision(kind, where)
    results: dict[str, dict[str, Any]] = {}
    with torch_threads(threads):
        data = noise(_BATCHES * batch, size_px, CLASSES, device=where, dtype=chosen.input_dtype)
        turns = {}
        for name, every_s in KINDS.items():
            say(f"measuring {name} and the bare loop in turns: {model}, batch {batch} at {size_px} px")
            turns[name] = in_turns(model, data, precision=kind, steps=steps, repeats=repeats, every_s=every_s)
        results |= compared(turns, steps=steps)
        say("measuring parts of the trainer's step")
        one = noise(batch, size_px, CLASSES, device=where, dtype=chosen.input_dtype)
        step_ms = results["bare"]["cpu_ms_per_step"]["median"]
        results |= parts(prepared(model, CLASSES, device=where), one, precision=chosen, step_ms=step_ms)
    settings: dict[str, Any] = {"device": device, "model": model, "batch": batch, "size_px": size_px, "steps": steps}
    settings |= {"precision": chosen.name, "threads": threads, "optimizer": "adamw", "classes": CLASSES}
    return report("overhead", QUESTION, settings, results, out=out)


# Turns ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Turning(ArrayLoader):
    """Calls `before` with each training step that is asked for. An epoch has `epoch_steps`: none ends in between."""

    epoch_steps: int
    before: Callable[[int], object]

    def steps(self, epochs: float) -> int:
        """Steps of that many epochs."""
        return round(epochs * self.epoch_steps)

    def stream(self, first_step: int = 0) -> Iterator[Batch]:
        """Endless."""
        for step, batch in zip(count(first_step), super().stream(first_step), strict=False):
            self.before(step)
            yield batch


@dataclass
class Turns:
    """Whenever the learner is about to end a window, `bare` takes a turn of as many steps; both on both clocks.

    A turn of the learner reaches from before the last step of a window to before the last step of the next: it holds
    one window's end, and what that has begun in the background has all the other steps to come to its end.
    """

    bare: Callable[[], object]
    steps: int
    device: torch.device
    writes: Callable[[int], Path | None] = lambda step: None
    """The file that ends what the window that ended at `step` has begun to write."""
    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.process_time
    learner_s: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of wall and of CPU time of each turn."""
    bare_s: list[tuple[float, float]] = field(default_factory=list)
    _began: tuple[float, float] | None = None

    def __call__(self, step: int) -> None:
        if (step + 1) % self.steps:
            return
        synchronise(self.device)
        if self._began is not None:
            wall_s = self.wall() - self._began[0]
            self._settle(step + 1 - self.steps)
            self.learner_s.append((wall_s, self.cpu() - self._began[1]))
        wall, cpu = self.wall(), self.cpu()
        self.bare()
        synchronise(self.device)
        self.bare_s.append((self.wall() - wall, self.cpu() - cpu))
        self._began = self.wall(), self.cpu()

    def _settle(self, step: int) -> None:
        """What is still written belongs to the learner's CPU time, and must not disturb the other's turn."""
        file, deadline = self.writes(step), time.monotonic() + _WRITE_S
        while file is not None and not file.exists():
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{file} was not written within {_WRITE_S:g} s: look at the disk, or give TMPDIR")
            time.sleep(0.01)

    def extra(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What each turn of the learner took more than the bare turns before and after it, wall and CPU, as shares."""
        bare = np.array(self.bare_s)
        shares = np.array(self.learner_s) / ((bare[:-1] + bare[1:]) / 2) - 1
        return shares[:, 0], shares[:, 1]


def in_turns(
    model: str, data: ImageBatch, *, precision: PrecisionName, steps: int, repeats: int, every_s: float
) -> Turns:
    """Train a learner and a bare loop of their own, in turns of `steps`; `repeats` turns after those that warm up.

    data: _BATCHES batches in one; both gather theirs from it alike.
    """
    device = data.inputs.device
    chosen = choose_precision(precision, device)
    order = Training(n=len(data.ids), global_batch=len(data.ids) // _BATCHES, seed=0)
    names = tuple(map(str, range(CLASSES)))
    held: dict[str, Any] = {"inputs": data.inputs, "targets": data.targets, "ids": data.ids}
    held |= {"task": "single_label", "classes": names}
    batches = ArrayLoader(**held, order=order).stream()
    loop = bare_loop(prepared(model, CLASSES, device=device), batches, precision=chosen, steps=steps)
    loop()
    with tempfile.TemporaryDirectory() as folder, Exporter(run="overhead", rank=0, host="127.0.0.1", port=0) as sink:
        kept = Path(folder) / "checkpoints"
        turns = Turns(loop, steps, device)
        if every_s < inf:
            turns.writes = lambda step: kept / f"step_{step:08d}" / "manifest.json"
        learner = Learner(
            prepared(model, CLASSES, device=device),
            Turning(**held, order=order, before=turns, epoch_steps=steps * (_WARMUP + repeats + 1)),
            ArrayLoader(**held, order=Once(n=order.n, global_batch=order.global_batch)),
            precision=precision,
            context=LocalContext(run_dir=folder, device=device),
            sinks=[sink],
            log_every=steps,
            checkpoint_every_s=every_s,
        )
        learner.fit_one_cycle(1, LR)
        learner.close()
    del turns.learner_s[:_WARMUP], turns.bare_s[:_WARMUP]
    return turns


def bare_loop(network: nn.Module, batches: Iterator[Batch], *, precision: Precision, steps: int) -> Callable[[], float]:
    """A function that trains for `steps` steps as plainly as torch allows, and returns their mean loss."""
    device = next(network.parameters()).device
    place(network, precision, device)
    settings = OptimSettings()
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=LR,
        betas=(settings.momentum, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )

    def loop() -> float:
        total = torch.zeros((), device=device)
        for batch in islice(batches, steps):
            with autocast(precision, device):
                loss = F.cross_entropy(network(*batch.arguments), batch.targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        return float(total) / steps

    return loop


def compared(turns: Mapping[str, Turns], *, steps: int) -> dict[str, dict[str, Any]]:
    """A row for the bare loop, over all its turns, and one a kind of learner with what it takes more, in percent.

    A checkpoint's cost is what its turns take more than those without one. extra_percent's stderr is that of a median
    of normal draws with this mad.
    """
    bare = np.concatenate([each.bare_s for each in turns.values()]) * 1000 / steps
    row: dict[str, Any] = {"ms_per_step": spread(bare[:, 0]), "cpu_ms_per_step": spread(bare[:, 1])}
    results = {"bare": row}
    for name, each in turns.items():
        seconds, (wall, cpu) = np.array(each.learner_s) * 1000 / steps, each.extra()
        results[name] = {
            "ms_per_step": spread(seconds[:, 0]),
            "cpu_ms_per_step": spread(seconds[:, 1]),
            "extra_percent": spread(100 * wall),
            "cpu_extra_percent": spread(100 * cpu),
            "extra_percent_stderr": _stderr(100 * wall),
        }
    if len(turns) == len(KINDS):
        plain, with_one = (results[name] for name in KINDS)
        a_turn_s = steps * results["bare"]["ms_per_step"]["median"] / 1000
        percent = plain["extra_percent"]["median"]
        more = (with_one["extra_percent"]["median"] - percent) * a_turn_s / 60
        results[MINUTE] = {"extra_percent": percent + more, "extra_percent_stderr": plain["extra_percent_stderr"]}
    return results


def _stderr(values: np.ndarray[Any, Any]) -> float:
    return 1.2533 * 1.4826 * spread(values)["mad"] / len(values) ** 0.5


# Parts ------------------------------------------------------------------------------------------------------


def parts(network: nn.Module, data: ImageBatch, *, precision: Precision, step_ms: float) -> dict[str, dict[str, Any]]:
    """What single calls of the trainer take, by themselves: ms, and CPU-ms in percent of the `step_ms` of a bare step.

    The two updates stand for themselves, since a bare loop has one as well: their difference is the trainer's.
    """
    device = data.inputs.device
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, dict[str, Any]] = {}
        for name, call in _calls(network, data, precision=precision, folder=folder).items():
            often = 1 if name.startswith("a checkpoint") else _CALLS
            timing = measure(partial(_repeat, call, often), images_per_call=often, device=device)
            wall, cpu = (1000 * np.array(seconds) / often for seconds in (timing.wall_s, timing.cpu_s))
            rows[name] = {
                "ms": spread(wall),
                "cpu_ms": spread(cpu),
                "cpu_percent": 100 * float(np.median(cpu)) / step_ms,
            }
    return rows


def _calls(
    network: nn.Module, data: ImageBatch, *, precision: Precision, folder: str
) -> dict[str, Callable[[], object]]:
    stepper = stepping(network, data, precision=precision)
    guard, optimizer = stepper.guard, stepper.optimizer
    losses = stepper.step(lambda: data, seed=0).losses  # its gradients stay until the next step
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    alone = torch.optim.AdamW([p for p in network.parameters() if p.grad is not None], lr=LR, fused=True)
    norm = torch.nn.utils.get_total_norm(gradients)
    held = {"model": network.state_dict(), "state": {"optimizer": optimizer.state_dict()}}
    copied, number = snapshot(held).parts, count()

    def window() -> None:
        window = Window()
        for _ in range(10):
            window.add(ids=data.ids, losses=losses, data_wait_s=0.0)
        window.close(guard=guard, busy=stepper.busy, stop=False)

    return {
        "guard.keep": guard.keep,
        "gradient norm": lambda: torch.nn.utils.get_total_norm(gradients),
        "guard.see": lambda: guard.see(norm),
        "AdamW, by layer group": optimizer.step,
        "AdamW, bare": alone.step,
        "set_hyper": lambda: optim.set_hyper(optimizer, [LR] * len(stepper.parameters), 0.9),
        "seed": lambda: torch.manual_seed(int(hash64(42, 7, 0) >> 1)),
        "a window of 10": window,
        "a checkpoint's snapshot": lambda: snapshot(held).parts,
        "a checkpoint's write": lambda: checkpoint.save(folder, next(number), copied, keep=1),
    }


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()
