"""How does a finished run go on with new images and classes? Its last checkpoint is rewritten, and phases are appended.

Old classes keep their outputs, new ones get untrained rows of the head. job.toml is written last: a kill before that
leaves the finished run, and the next call does the same again.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from thawline.cluster.errors import JobError, StorageError
from thawline.cluster.job.checks import batch_of
from thawline.cluster.job.job import Job, to_toml
from thawline.cluster.job.recipes import longer, sides_px
from thawline.cluster.launch import ranks
from thawline.cluster.run.folder import hold, run_root, write_text
from thawline.cluster.run.loaded import Loaded
from thawline.dataio.table.growth import grow
from thawline.dataio.table.manifest import Manifest
from thawline.trainer.checkpoints import checkpoint
from thawline.trainer.checkpoints.format import Origin


def grown(job: Job, epochs: float, new: Manifest, *, tell: Callable[[str], None]) -> Job:
    """The job of a finished run, `epochs` longer and on the images of `new`; its folder is prepared for it.

    job: of the run's folder, with the manifest that it was trained on. tell: takes a sentence.
    Raises StorageError where that manifest has changed; ManifestError where `new` cannot continue it; JobError for a
    job that validates on another manifest, or whose images have several sizes, or under torchrun.
    """
    if job.data.valid or ranks.place() is not None:
        reason = f"data.valid={job.data.valid}" if job.data.valid else "torchrun"
        raise JobError(
            f"--more with new images and {reason}: the splits of new images are chosen for one manifest and by one "
            "process; train them as a run of their own, with --model.weights this run's folder"
        )
    if len(sizes := dict.fromkeys(sides_px(job))) > 1:
        raise JobError(
            f"--more with new images, and images of {' and '.join(map(str, sizes))} px: an epoch has other steps now, "
            "so an earlier size would come back; train a run of their own, with --model.weights this run's folder"
        )
    folder = run_root(job)
    with hold(job, tell=tell):
        old = Manifest.load(job.manifest, root=job.data.root or None)
        growth = grow(old, new)
        recorded = folder.read("manifest.hash").decode().strip()
        if recorded not in (old.fingerprint(), growth.manifest.fingerprint()):  # the latter after a kill below
            raise StorageError(
                f"{job.manifest} has changed since {folder} was trained on it: which images it was validated on is not "
                "known, and they might be trained on; index new images into another file, and give --manifest"
            )
        tell(f"--more {epochs:g}: {growth}")
        name = f"manifest-{len(job.appended) + 1}.parquet"
        growth.manifest.save(folder.full(name))
        job = longer(replace(job, manifest=folder.full(name)), epochs)
        _rewrite_checkpoint(job, growth.manifest)
        write_text(folder, "manifest.hash", growth.manifest.fingerprint() + "\n")
        write_text(folder, "job.toml", to_toml(job))
    return job


def _rewrite_checkpoint(job: Job, manifest: Manifest) -> None:
    """Rewrite the run's newest checkpoint for other data. Raises StorageError, CheckpointError."""
    folder = run_root(job)
    root = folder.child("checkpoints")
    saved, _ = checkpoint.newest(root)
    if saved is None:
        raise StorageError(f"{root} holds no checkpoint any more: there is nothing to go on from; train anew")
    fresh: Mapping[str, Tensor] = Loaded(job).take_model().state_dict()
    parts = {name: saved.load(name) for name in saved.parts}
    for name in ("model", "ema"):
        if name in parts:
            parts[name] = {key: _extended(value, fresh[key]) for key, value in parts[name].items()}
    run = {**saved.origin.run, "data": manifest.fingerprint()}
    run["data.global_batch"] = batch_of(job, samples=len(manifest.subset("train")))
    origin = Origin(run, manifest.classes)
    checkpoint.save(root, saved.step, parts, keep=job.checkpoint.keep, metrics=saved.metrics, origin=origin)


def _extended(old: Tensor, fresh: Tensor) -> Tensor:
    """`old`, and after its rows those of `fresh` that it lacks: the outputs of new classes."""
    if old.shape == fresh.shape:
        return old
    return torch.cat([old, fresh[len(old) :].to(old)])
