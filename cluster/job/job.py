"""What shall a run do? `Job`: frozen dataclasses <-> TOML, a few flags on top, every value checked.

    job = load("pets.toml")

Reading refuses unknown fields, wrong types and unknown choices, and names the file; `check` refuses values out of
range or at odds, and is called once, after the flags. What an image may become is dataio.ImageSpec's to refuse.
Nothing here opens a manifest or a run folder, and neither torch nor Ray nor DALI is imported.
"""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import tomli_w

from thawline.cluster.errors import JobError
from thawline.cluster.job.model import Model
from thawline.cluster.job.tables import build, flat
from thawline.cluster.job.trust import Trust, check_trusted
from thawline.cluster.launch.settings import Cluster
from thawline.cluster.observe.settings import Metrics
from thawline.cluster.words import cut
from thawline.dataio.pixels.spec import PRESETS, SIDE, Augmentation, Mixing, Sizes
from thawline.dataio.ranges import Range, above_zero, at_least, between, given
from thawline.dataio.stream.settings import Drawing
from thawline.models.code import is_code
from thawline.trainer.checkpoints.settings import CheckpointSettings
from thawline.trainer.optimisers.settings import MOMENTUM, OptimSettings
from thawline.trainer.schedule.phases import RecipeName
from thawline.trainer.settings import TrainSettings
from thawline.trainer.stopping.durations import seconds
from thawline.trainer.stopping.early import Stopping

_COUNT = at_least(0, "a count is not negative")
_SHARE = between(0, 1, "it is a share of the steps; 0 is none")
_RATE = Range(lambda v: v == "find" or 0 < v < inf, "a finite number above 0", "training would stand still or diverge")
_DIV = at_least(1, "the cycle would start above its own maximum")
_PCT = Range(lambda v: 0 < v < 1, "0 < _ < 1", "a cycle rises and falls")
_GAMMA = Range(lambda v: 0 < v < 1, "0 < _ < 1", "lr would never fall, or be gone")
_BUDGET = Range(
    lambda v: v == "" or seconds(v) is not None, "a time above 0 such as '90s', '30m' or '2h30m'", "it is no time"
)
_LENGTH = above_zero("nothing would be trained", "_ > 0")
_NAME_BYTES = 200
"""Of the 255 that a file's name may have: NAME.targets.json, its temporary name, and a dated folder need the rest."""


def _is_file_name(name: str) -> bool:
    named = bool(name.strip(" .")) and name == name.strip() and name.isprintable() and not {*name} & {*"/\\"}
    return named and len(name.encode()) <= _NAME_BYTES


@dataclass(frozen=True, kw_only=True)
class Data(Drawing, Sizes):
    """Which pixels reach the model, and how many at a time."""

    global_batch: Annotated[int, at_least(2, "BatchNorm cannot train on one image")] = 64
    """Images a step, over all workers; the default is cut to a smaller training split."""
    engine: Literal["auto", "dali", "reference"] = "auto"
    """Engine that decodes and warps."""
    threads: Annotated[int, Range(lambda v: v >= 0, "_ >= 0, where 0 chooses", "a count is not negative")] = 0
    """Decoding threads a worker; 0 = choose."""
    valid: str = ""
    """Another manifest with the same classes, whose validation images to use instead."""
    root: str = ""
    """Folder that holds the images, if they moved since indexing."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from the channels, 0 to 1; None = the model's own."""
    std: tuple[float, float, float] | None = None
    """Divides the channels; None = the model's own."""
    max_quarantined: Annotated[float, between(0, 1, "it is a share of the training images")] = 0.01
    """Share of the training images that may prove unusable while training."""
    cache: str = ""
    """Folder for shards from an object store; empty = the user's cache folder."""
    cache_gib: Annotated[float, Range(lambda v: v > 0, "_ > 0", "no shard would find room")] = 100.0
    """Size that the cache may grow to, in GiB."""


@dataclass(frozen=True, kw_only=True)
class Augment(Mixing, Augmentation):
    """What training images go through; validation images never do.

    A preset sets what a file or the flags do not set themselves, as they are read; afterwards it is only a name.
    """

    preset: Literal["default", "satellite", "plain", "digits"] = "default"
    """Values for all fields that are not given."""


@dataclass(frozen=True)
class Fit(Stopping, TrainSettings):
    """How long, how fast, and how exact."""

    recipe: RecipeName = "fine_tune"
    """Schedule, with fastai's numbers."""
    epochs: Annotated[int, at_least(1, "nothing would be trained")] = 5
    """Passes over the training images with everything trainable."""
    budget: Annotated[str, _BUDGET] = ""
    """How long the run may take, such as 90s, 30m or 2h30m, instead of epochs; empty = as long as epochs take."""
    frozen_epochs: Annotated[int, _COUNT] = 1
    """Passes before those with only the head trainable; fine_tune only."""
    lr: Annotated[float | tuple[float, float] | Literal["find"], _RATE] = 3e-3
    """Learning rate; or two, of the first layers and of the head; or find."""
    div: Annotated[float | None, _DIV] = None
    """Start at lr / div; None = the recipe's own."""
    pct_start: Annotated[float | None, _PCT] = None
    """Share of the steps in which lr rises or stays flat; None = the recipe's own."""
    warmup: Annotated[float, _SHARE] = 0.0
    """Share of the steps in which lr rises linearly; not fine_tune or one_cycle, which warm up by themselves."""
    milestones: Annotated[tuple[float, ...] | None, _SHARE] = None
    """Shares of the steps from which on lr is gamma times as high; step only; None = 0.5, 0.75."""
    gamma: Annotated[float | None, _GAMMA] = None
    """Factor by which lr falls; step and plateau only; None = 0.1."""
    plateau_epochs: Annotated[int | None, at_least(1, "lr would fall in every epoch")] = None
    """Epochs in a row without a new best of fit.monitor until lr falls; plateau only; None = 1."""
    metrics: Annotated[tuple[str, ...], given("names such as 'accuracy'", "nothing is called so")] = ()
    """Metrics of the validation, such as "f_beta(beta=2)"; empty = the task's own."""


@dataclass(frozen=True)
class PhaseJob:
    """One of [[phases]], which run one after another: how long, how fast, what trains. None is [fit]'s or the recipe's.

    Exactly one of epochs, steps and samples is given; it is the unfrozen part's where the recipe is fine_tune.
    """

    name: str | None = None
    """Name in rows and on the console; None = the recipe's."""
    recipe: RecipeName | None = None
    """Schedule; None = fit.recipe."""
    epochs: Annotated[float | None, _LENGTH] = None
    """Length in passes over the training images."""
    steps: Annotated[int | None, _LENGTH] = None
    """Length in steps of the global batch."""
    samples: Annotated[int | None, _LENGTH] = None
    """Length in samples, up to the next whole step."""
    freeze_to: int | None = None
    """First layer group that trains: 0 = all of them, -1 = the head; not fine_tune."""
    frozen_epochs: Annotated[float | None, at_least(0, "a length is not negative")] = None
    """Passes before with only the head trainable; None = 1; fine_tune only."""
    lr: Annotated[float | tuple[float, float] | Literal["find"] | None, _RATE] = None
    """Learning rate, as fit.lr; None = fit.lr."""
    div: Annotated[float | None, _DIV] = None
    """Start at lr / div; None = fit.div."""
    div_final: Annotated[float | None, at_least(1, "the phase would end above its own maximum")] = None
    """End at lr / div_final; not constant."""
    pct_start: Annotated[float | None, _PCT] = None
    """Share of the steps in which lr rises or stays flat; None = fit.pct_start."""
    momenta: Annotated[tuple[float, float, float] | None, MOMENTUM] = None
    """Momentum at the start, the middle and the end of a cycle."""
    warmup: Annotated[float | None, _SHARE] = None
    """Share of the steps in which lr rises linearly; None = fit.warmup."""
    milestones: Annotated[tuple[float, ...] | None, _SHARE] = None
    """Shares of the steps from which on lr is gamma times as high; None = fit.milestones."""
    gamma: Annotated[float | None, _GAMMA] = None
    """Factor by which lr falls; None = fit.gamma."""
    plateau_epochs: Annotated[int | None, at_least(1, "lr would fall in every epoch")] = None
    """Epochs in a row without a new best until lr falls; None = fit.plateau_epochs."""
    size_px: Annotated[int | None, SIDE] = None
    """Side of the training images from here on; None = as before; at first data.size_px."""


@dataclass(frozen=True)
class Job:
    """One training run, from a manifest to a model."""

    name: Annotated[
        str,
        Range(
            _is_file_name,
            "a name without slashes of at most 200 bytes, such as 'pets-2'",
            "no run folder can be called so",
        ),
    ] = "run"
    """Name of the run, and of its folder under storage; the same name resumes."""
    manifest: Annotated[
        str, given("the file that `thawline index` or `thawline pack` writes", "there is nothing to train on")
    ] = ""
    """Manifest that `thawline index` or `thawline pack` wrote: a .parquet or .arrow file, or its URI."""
    storage: Annotated[str, given("a folder or a URI", "the run would have no place")] = "runs"
    """Where runs are kept: a folder, or a URI such as s3://bucket/runs."""
    seed: Annotated[
        int, Range(lambda v: 0 <= v < 2**63, "0 <= _ < 2**63", "the random numbers are counted in 63 bits")
    ] = 42
    """Seed of the order, the augmentation and the initial weights."""
    workers: Annotated[int | tuple[int, int], at_least(1, "nobody would train")] = 1
    """Worker processes, one a GPU; or two numbers: as many as there is room for, between them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    log_every: Annotated[int, at_least(1, "a window has at least one step")] = 10
    """Steps in a logging window."""
    failures: Annotated[int, _COUNT] = 3
    """Worker failures that the run survives."""
    preemptions: Annotated[
        int, Range(lambda v: v >= -1, "_ >= -1, where -1 is any number", "a count is not negative")
    ] = -1
    """Preempted machines (taken away with notice) that the run survives; -1 = any number."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    fit: Fit = field(default_factory=Fit)
    optim: OptimSettings = field(default_factory=OptimSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    metrics: Metrics = field(default_factory=Metrics)
    cluster: Cluster = field(default_factory=Cluster)
    phases: tuple[PhaseJob, ...] = ()
    """Instead of [fit]'s epochs and frozen_epochs; only in a file, not a flag."""
    appended: tuple[PhaseJob, ...] = ()
    """What `thawline train RUN --more EPOCHS` has appended to the run, once it had finished."""

    @property
    def least_workers(self) -> int:
        """Fewer than these cannot train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """More than these are never started."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


FIT_ALONE = ("epochs", "frozen_epochs", "budget")
"""Of [fit], what counts only where there are no [[phases]]."""

FIT_SHAPES = ("div", "pct_start", "warmup", "milestones", "gamma", "plateau_epochs")
"""Of [fit], what shapes the schedule of a phase that does not say it itself."""

MAY_DIFFER = (
    # Where and under what name the run goes on: a run started on one machine may continue on another.
    *("name", "manifest", "storage", "data.root", "data.valid", "data.cache", "data.cache_gib"),
    # What the stream and the reduction do not depend on, by design: the same steps over the same ids.
    *("workers", "device", "data.engine", "data.threads"),
    # What comes after a run's end; see cluster.run.more.
    "appended",
    # What is written and survived, not what is computed.
    *("log_every", "failures", "preemptions", "checkpoint", "metrics", "cluster", "data.max_quarantined"),
)
"""Fields, or whole sections, in which a run and its continuation may differ."""


def load(path: str | Path, *, trust_code: Trust = False) -> Job:
    """The job at `path`: a TOML file, or a manifest (.parquet, .arrow, also a URI), which is a job with all defaults.

    It is called as the manifest; what `thawline pack` wrote, as the folder that it lies in. trust_code: see from_dict.

    Raises:
        JobError: no such file; or whatever `from_toml` finds.
    """
    parts = PurePosixPath(str(path).partition("?")[0])
    if parts.suffix not in (".parquet", ".arrow"):
        return from_toml(path, trust_code=trust_code)
    if "://" not in str(path) and not Path(path).is_file():
        what = "is not a regular file" if Path(path).exists() else "does not exist"
        raise JobError(f"{path} {what}, so there is nothing to train on: `thawline index` writes it")
    packed = parts.name == "manifest.arrow" and parts.parent.name
    return Job(name=packed or parts.stem, manifest=str(path))


def from_toml(file: str | Path, *, trust_code: Trust = False) -> Job:
    """The job that a TOML file describes; absent fields have their defaults. trust_code: see from_dict.

    Raises:
        JobError: no such file, not TOML, an unknown field, a wrong type, an unknown choice, code.
    """
    from thawline.dataio.store import files  # brings pyarrow, for which `--help` need not wait

    try:
        mapping = tomllib.loads(files.text(file))
    except FileNotFoundError:
        raise JobError(
            f"{file} does not exist: give a job (.toml) or a manifest (.parquet); `thawline train` also takes "
            "images, a folder or a list of them"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(
            f"{file} is not valid TOML ({cut(str(error))}), so it cannot be read as a job: correct it there"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # no text, a name that no file can have, nested too deeply
        raise JobError(f"{file} cannot be read as a job ({cut(str(error))}): give a TOML file") from None
    return from_dict(mapping, source=str(file), trust_code=trust_code)


def from_dict(mapping: Mapping[str, Any], *, source: str = "the job", trust_code: Trust = False) -> Job:
    """The job that nested tables describe, its augmentation's preset applied; `source` is what errors call them.

    trust_code: whether it may name code of a user's (see code_of). Say True only for what the user wrote or asked to
    trust, and for a job that is compared and never run.

    Raises:
        JobError: an unknown field, a wrong type, an unknown choice, code that is not trusted.
    """
    job = build(Job, mapping, source=source)
    check_trusted(code_of(job), trust_code, source=source)
    given = mapping.get("augment", {})
    preset = {name: value for name, value in PRESETS[job.augment.preset].items() if name not in given}
    return replace(job, augment=replace(job.augment, **preset))


def code_of(job: Job) -> dict[str, str]:
    """What of a job stands for code of a user's, by field: {"model.name": "python:nets.mine:body"}."""
    names = {"model.name": job.model.name, "fit.loss": job.fit.loss}
    return {field_name: name for field_name, name in names.items() if is_code(name)}


def to_toml(job: Job, *, brief: bool = False) -> str:
    """`job` as TOML text, every field written but None, and beside [[phases]] what nothing reads there.

    `from_toml` gives back an equal job, if it passes `check`. brief: only what differs from the defaults, those of the
    augmentation's preset among them.
    """
    tables = nested(job)
    if job.phases:
        tables["fit"] = {name: value for name, value in tables["fit"].items() if name not in FIT_ALONE}
    if brief:
        default = {**nested(from_dict({"augment": {"preset": job.augment.preset}})), "phases": ()}
        default["augment"]["preset"] = Augment.preset
        tables = _differing(tables, default)
    return tomli_w.dumps(tables)


def _differing(table: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """What of nested tables is not as in the other; tables of which nothing is left are left out."""
    differing = {}
    for name, value in table.items():
        known = default.get(name)
        kept = _differing(value, known) if isinstance(value, Mapping) and isinstance(known, Mapping) else value
        if kept != known and kept != {}:
            differing[name] = kept
    return differing


def resolved(job: Job) -> Job:
    """`job` with absolute paths (against the working directory), so that another process may run it."""
    weights = job.model.weights
    weights = weights if weights in ("none", "imagenet") else _absolute(weights)
    data = replace(
        job.data, root=_absolute(job.data.root), valid=_absolute(job.data.valid), cache=_absolute(job.data.cache)
    )
    model = replace(job.model, weights=weights)
    manifest, storage = _absolute(job.manifest), _absolute(job.storage)
    return replace(job, manifest=manifest, storage=storage, data=data, model=model)


def identity(job: Job, *, ignore: Collection[str] = MAY_DIFFER) -> dict[str, Any]:
    """What a run and its continuation have in common, by field."""
    fields = {**flat(job), "augment.flip": job.augment.flip is not False}
    sections = {name: name.partition(".")[0].partition("[")[0] for name in fields}
    return {name: fields[name] for name, section in sections.items() if name not in ignore and section not in ignore}


def differences(old: Job, new: Job, *, ignore: Collection[str] = MAY_DIFFER) -> list[str]:
    """Lines such as "fit.epochs: 5 -> 6" for the fields that would make `new` another run than `old`.

    Paths are compared as text, never what lies there: whether it is the same manifest, its reader must say.
    """
    before, after = (identity(job, ignore=ignore) for job in (old, new))
    names = dict.fromkeys([*before, *after])
    if old.phases and new.phases:  # older jobs may hold what nothing reads
        names = {name: None for name in names if name.removeprefix("fit.") not in FIT_ALONE}
    changes = [(name, before.get(name), after.get(name)) for name in names]
    return [f"{name}: {cut(str(was))} -> {cut(str(now))}" for name, was, now in changes if was != now]


def _absolute(path: str) -> str:
    return path if not path or "://" in path else str(Path(path).expanduser().absolute())


def nested(job: Job) -> dict[str, Any]:
    """Nested tables as TOML has them: no None; a pair stays a tuple, which TOML writes as an array."""
    return asdict(job, dict_factory=lambda items: {name: value for name, value in items if value is not None})
