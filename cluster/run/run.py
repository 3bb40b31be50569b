"""What is a run? `run(job, context)`: its life, from an empty folder to a result. What it trains, vision says.

A notebook, `thawline train`, torchrun and a Ray worker all call this same function, once on every rank. The run's
folder decides what it does: absent, it begins; holding checkpoints, it goes on; finished, it returns its result.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from thawline.cluster.errors import KINDS, HangError, LaunchError, StorageError
from thawline.cluster.job.job import Job
from thawline.cluster.job.recipes import phases
from thawline.cluster.observe.discovery import clear_targets, targets_file, write_targets
from thawline.cluster.observe.exporter import Exporter
from thawline.cluster.results.outcome import outcome
from thawline.cluster.run.folder import Result, appended, open_run, run_dir
from thawline.cluster.run.loaded import Loaded
from thawline.cluster.run.pulse import Pulse
from thawline.cluster.run.vision import job_learner, ranks_here
from thawline.cluster.words import quoted
from thawline.dataio.checks import census
from thawline.dataio.labels import counts
from thawline.dataio.store import files
from thawline.dataio.stream.balanced import Balanced
from thawline.dataio.stream.loader import ImageLoader
from thawline.dataio.stream.renderer import default_threads
from thawline.dataio.table.tasks import TASKS
from thawline.trainer.context import RunContext
from thawline.trainer.learner import Learner
from thawline.trainer.losses.class_weights import weigh
from thawline.trainer.step import world
from thawline.trainer.stopping.durations import seconds

T = TypeVar("T")
_TOLD = 8
"""Classes whose weights are said."""


def run(
    job: Job, context: RunContext, *, held: bool = False, fresh: bool = False, loaded: Loaded | None = None
) -> Result:
    """Train as the job says, or go on, or return the result of a run that has finished. Collective.

    held: the launching process holds the run's folder (see folder.hold); else rank 0 holds it until the end.
    fresh: begin anew, and move the folder's content aside. loaded: the job's, if this process has read some of it.
    Returns what `result.json` holds (rank 0 writes it); on a graceful stop, the same with status "stopped".
    Raises: one of USER_ERRORS, the same on every rank for what is wrong before training begins; HangError where the
    wait for another rank timed out.
    """
    pulse = Pulse(rank=context.rank, world_size=context.world_size, hang_s=job.cluster.hang_s)
    try:
        with ExitStack() as holding:
            return _run(job, context, pulse, None if held else holding, loaded or Loaded(job), fresh=fresh)
    except RuntimeError as error:
        sentence = pulse.explain(error)
        if sentence is None:
            raise
        raise HangError(sentence) from error
    finally:
        pulse.close()


def _run(
    job: Job, context: RunContext, pulse: Pulse, holding: ExitStack | None, loaded: Loaded, *, fresh: bool
) -> Result:
    def begin() -> Result | None:
        def tell(text: str) -> None:
            context.publish([{"kind": "note", "text": text}])

        return open_run(job, holding, fresh=fresh, tell=tell, loaded=loaded) if context.rank == 0 else None

    finished = world.gather(_together(begin))[0]
    if finished is not None:
        return finished
    job = appended(job)
    torch.set_num_threads(default_threads(ranks_here(context)))
    torch.backends.cudnn.benchmark = True  # every batch of a run has the same shape: the search pays once
    with ExitStack() as stack:
        learner = _together(lambda: _build(job, context, stack, pulse, loaded))
        loaded.forget()
        stack.callback(learner.close)
        _announce(job, context, learner, stack)
        for line in (_description(job, context, learner), *_class_warnings(learner), *_balance(job, learner)):
            learner.note(line)
        resumed = learner.resume()
        _check_same_batch(job, learner)
        if not resumed:
            _together(lambda: learner.meter)  # a metric that cannot be made must not cost an epoch
        pulse.begin(learner.progress.step)
        if resumed and context.rank == 0:
            context.publish([{"kind": "resumed", "step": learner.progress.step, "unix_s": time.time()}])
        predictions = learner.fit(phases(job), predict=True, budget_s=seconds(job.fit.budget))
        return outcome(job, context, learner, predictions)


def _build(job: Job, context: RunContext, stack: ExitStack, pulse: Pulse, loaded: Loaded) -> Learner:
    """Everything a run needs, on this rank. Not collective: any rank may fail on its own."""
    port = job.metrics.port and job.metrics.port + context.local_rank
    try:
        exporter = Exporter(
            run=job.name,
            rank=context.rank,
            host=job.metrics.host,
            port=port,
            restarts=context.restarts,
            gpu=(context.device.index or 0) if context.device.type == "cuda" else None,
        )
    except OSError as error:
        raise LaunchError(
            f"metrics.host={quoted(job.metrics.host)} cannot be listened on ({error.strerror}): nobody could read "
            "this worker's metrics; give an address of this machine, or 0.0.0.0"
        ) from error
    stack.enter_context(exporter)
    exporter.observe({"world_size": context.world_size, "quarantined": 0})
    learner = job_learner(job, context, sinks=[exporter, pulse], loaded=loaded)
    assert isinstance(learner.train, ImageLoader)
    loader = learner.train
    exporter.watch(lambda: loader.seconds)
    return learner


def _announce(job: Job, context: RunContext, learner: Learner, stack: ExitStack) -> None:
    """Publish every rank's endpoint for Prometheus, until the run ends. Collective."""
    (exporter,) = (sink for sink in learner.recorder.sinks if isinstance(sink, Exporter))
    endpoints = world.gather(exporter.endpoint)
    if context.rank == 0:
        targets = targets_file(job.storage, job.name)
        try:
            write_targets(targets, job.name, endpoints)
        except OSError as error:  # only watching needs it: no reason to end a run
            learner.note(f"{targets} cannot be written ({files.why_refused(error)}): Prometheus finds no workers by it")
        stack.callback(_forget, targets)
        context.publish([{"kind": "targets", "endpoints": " ".join(endpoints)}])


def _forget(targets: Path) -> None:
    with suppress(OSError):  # the disk may be full by now, and the run has ended
        clear_targets(targets)


def _together(make: Callable[[], T]) -> T:
    """Call on every rank; if any rank fails in a way that a user can mend, all raise that. Collective."""
    return world.together(make, KINDS)


def _check_same_batch(job: Job, learner: Learner) -> None:
    """Raises StorageError for a run begun before the default batch was limited to the split: its steps were larger."""
    first = next(iter(learner.recorder.of_kind("train")), None)
    if first is None or not first["step"]:
        return
    was = float(first["images"] or 0) / float(first["step"])
    if was > learner.train.global_batch:
        raise StorageError(
            f"{run_dir(job)} was begun by an older thawline with {was:g} images a step, which are now no more than the "
            f"split's {learner.train.global_batch}: the stream would change in the middle; give another --name, or "
            "--fresh, which moves what is there aside"
        )


def _description(job: Job, context: RunContext, learner: Learner) -> str:
    """One line on what is about to be trained."""
    assert isinstance(learner.train, ImageLoader)
    return (
        f"{job.name}: {job.model.name} ({getattr(learner.model, 'origin', 'given')}), "
        f"{learner.train.samples:,} training and {learner.valid.samples:,} validation images in "
        f"{len(learner.train.classes)} {TASKS[learner.train.task].classes_word}; "
        f"{context.world_size} worker(s) on {context.device.type}, "
        f"{learner.precision.name}; {learner.train.engine}: {learner.train.renderer.choice.reason}"
    )


def _class_warnings(learner: Learner) -> list[str]:
    """Classes that one split lacks; `index` warned, but perhaps somebody else. On rank 0 only."""
    train, valid = learner.train, learner.valid
    if learner.context.rank or not (isinstance(train, ImageLoader) and isinstance(valid, ImageLoader)):
        return []
    if TASKS[train.task].names is None:
        return []
    sides = {"train": train, "valid": valid}
    return counts.lacking(
        {side: census.count_subset(loader.subset, loader.classes) for side, loader in sides.items()}, train.classes
    )


def _balance(job: Job, learner: Learner) -> list[str]:
    """How often the rarest and the commonest class are shown or weighed, or those named are. On rank 0 only."""
    train = learner.train
    if learner.context.rank or not isinstance(train, ImageLoader):
        return []
    images, lines = train.class_counts(), []
    occurring = np.flatnonzero(images)
    ends = [occurring[images[occurring].argmin()], occurring[images[occurring].argmax()]] if len(occurring) else []
    ends = list(dict.fromkeys(map(int, ends)))
    if isinstance(train.order, Balanced):
        times = train.order.shares() * train.samples / np.maximum(images, 1)
        of_ends = (f"each of {images[i]:,} images of {quoted(train.classes[i])} {times[i]:.3g} times" for i in ends)
        lines.append(f"data.balance={job.data.balance:g}: an epoch shows {', '.join(of_ends)}; validation is as it is")
    if job.fit.class_weights is not None:
        weights, named = weigh(job.fit.class_weights, train), job.fit.class_weights
        shown = ends if isinstance(named, str) else [train.classes.index(name) for name in [*named][:_TOLD]]
        each = (f"{weights[i]:.3g} for {quoted(train.classes[i])} ({images[i]:,} images)" for i in shown)
        lines.append(f"class weights in the loss: {', '.join(each)}")
    return lines
