"""What shall a run do? `Job`: frozen dataclasses <-> TOML, a few flags on top, every value checked.

    job = check(override(load("pets.toml"), ["--fit.epochs", "6"]))

Reading refuses unknown fields, wrong types and unknown choices, and names the file; `check` refuses values out of
range or at odds, and is called once, after the flags. What an image may become is dataio.ImageSpec's to refuse.
Nothing here opens a manifest or a run folder, and neither torch nor Ray nor DALI is imported.
"""

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import tomli_w

from thawline.cluster.errors import JobError
from thawline.cluster.job.checks import FIT_ALONE, check_ranges, check_together
from thawline.cluster.job.tables import build, flat
from thawline.cluster.words import cut


@dataclass(frozen=True)
class Data:
    """Which pixels reach the model, and how many at a time."""

    size_px: int = 224  # side of the square that the model sees
    stages: tuple[tuple[float, int], ...] = ()  # progressive resizing: from this epoch on this side, ...; last: size_px
    presize_px: int = 460  # side of the square that augmentation works on
    global_batch: int = 64  # images a step, over all workers; a smaller training split cuts the default
    engine: Literal["auto", "dali", "reference"] = "auto"  # what decodes and warps
    threads: int = 0  # decoding threads a worker; 0 = choose
    valid: str = ""  # another manifest, whose validation images to take; it must have the same classes
    root: str = ""  # the folder that holds the images, if they moved since indexing
    presize: Literal["crop", "squish", "pad"] = "crop"  # how an image becomes a square
    mean: tuple[float, float, float] | None = None  # subtracted from the channels, 0 to 1; None = the model's own
    std: tuple[float, float, float] | None = None  # divides the channels; None = the model's own
    max_quarantined: float = 0.01  # share of the training images that may turn out unusable while training
    cache: str = ""  # folder for shards fetched from an object store; empty = the user's cache folder
    cache_gib: float = 100.0  # how large that folder may become


@dataclass(frozen=True)
class Augment:
    """What training images go through; validation images never do.

    A preset sets what a file or the flags do not set themselves, as they are read; afterwards it is only a name.
    """

    preset: Literal["default", "satellite", "plain", "digits"] = "default"  # dataio.pixels.spec.PRESETS, as a start
    flip: bool | Literal["auto"] = "auto"  # mirror left to right, every second image; auto = points only if paired
    dihedral: bool = False  # one of the square's eight symmetries, mirrors included
    rotate_deg: float = 10.0  # rotate by up to this, either way
    min_zoom: float = 1.0  # zoom by this to max_zoom; below 1 shows the border
    max_zoom: float = 1.1  # zoom in by up to this factor
    max_warp: float = 0.2  # tilt the perspective by up to this
    max_lighting: float = 0.2  # change brightness and contrast by up to this
    max_saturation: float = 0.0  # change saturation by up to this
    p_affine: float = 0.75  # probability of each of rotation, zoom and warp
    p_lighting: float = 0.75  # probability of each change of light
    min_scale: float = 1.0  # below 1: random resized crop of at least this share of the area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # least and largest width / height of that crop
    border: Literal["reflect", "replicate", "constant"] = "reflect"  # what lies outside the image
    mixup: float = 0.0  # alpha of the Beta distribution by which two images are blended; 0 = never
    cutmix: float = 0.0  # alpha of the same for a rectangle of one image pasted into another; 0 = never


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = "resnet34"  # a ResNet of torchvision, or tiny, which only shows that a set-up works
    weights: str = "imagenet"  # none, imagenet, or a file, or the folder of a run or a checkpoint
    dropout: float = 0.5  # before the last layer; half of it before the layer ahead


RecipeName = Literal["fine_tune", "one_cycle", "flat_cos", "constant"]


@dataclass(frozen=True)
class Fit:
    """How long, how fast, and how exact."""

    recipe: RecipeName = "fine_tune"  # fastai's words, fastai's numbers
    epochs: int = 5  # passes over the training images with everything trainable
    frozen_epochs: int = 1  # passes before them with only the head trainable; fine_tune only
    lr: float | tuple[float, float] | Literal["find"] = 3e-3  # learning rate, or two: first layers' and head's; or find
    div: float | None = None  # lr starts at lr / div; None = the recipe's own
    pct_start: float | None = None  # share of the steps in which lr rises, or is flat; None = the recipe's own
    warmup: float = 0.0  # share of the steps in which lr rises along a line; flat_cos and constant only
    precision: Literal["auto", "fp32", "bf16", "fp16", "pure_bf16"] = "auto"  # of the forward and backward pass
    accumulate: int = 1  # parts in which a worker takes its images of a step, one after another, to save memory
    clip: float | None = None  # the largest norm of all gradients together; None = as they are
    ema: float = 0.0  # decay of an average of the weights, which is what is measured; 0 = none
    label_smoothing: float = 0.0  # share of every label that is spread over all classes
    compile: Literal["off", "default", "max-autotune-no-cudagraphs", "reduce-overhead"] = "off"  # torch.compile's mode
    batch_norm: Literal["train", "sync", "frozen"] = "train"  # statistics of a worker's batch, of all, or none new
    metrics: tuple[str, ...] = ()  # what validation measures, such as "f_beta(beta=2)"; empty = the task's own


@dataclass(frozen=True)
class Optim:
    """What turns gradients into steps."""

    name: Literal["adamw", "sgd", "lamb"] = "adamw"  # lamb needs NVIDIA's apex
    engine: Literal["torch", "apex"] = "torch"  # whose adamw and sgd
    weight_decay: float = 0.01  # decoupled; never on norms and biases
    momentum: float = 0.9  # sgd's, or the others' first beta, where the recipe does not set it
    nesterov: bool = False  # look ahead along the momentum; sgd only
    beta2: float = 0.99  # decay of the mean square of gradients; not sgd
    eps: float = 1e-5  # added to its root; not sgd


@dataclass(frozen=True)
class Checkpoint:
    """What a kill may cost."""

    every_s: float = 60.0  # seconds between checkpoints
    keep: int = 3  # newest checkpoints kept
    best: str = ""  # a metric; the checkpoint that is best by it is kept, too


@dataclass(frozen=True)
class PhaseJob:
    """One of [[phases]], which run one after another: how long, how fast, what trains. None is [fit]'s or the recipe's.

    Exactly one of epochs, steps and samples is given; it is the unfrozen part's where the recipe is fine_tune.
    """

    name: str | None = None  # in rows and on the console; None = the recipe's
    recipe: RecipeName | None = None  # None = fit.recipe
    epochs: float | None = None  # passes over the training images
    steps: int | None = None  # of the global batch
    samples: int | None = None  # up to the next whole step
    freeze_to: int | None = None  # the first trainable layer group: 0 = all of them train, -1 = the head; not fine_tune
    frozen_epochs: float | None = None  # fine_tune only; None = 1
    lr: float | tuple[float, float] | Literal["find"] | None = None  # None = fit.lr
    div: float | None = None  # None = fit.div
    div_final: float | None = None  # lr ends at lr / div_final; not constant
    pct_start: float | None = None  # None = fit.pct_start
    momenta: tuple[float, float, float] | None = None  # of a cycle: at its start, its middle, its end
    warmup: float | None = None  # None = fit.warmup
    size_px: int | None = None  # side of the training images from here on; None = as before, at first data.size_px


@dataclass(frozen=True)
class Metrics:
    """Where Prometheus finds a worker."""

    port: int = 9400  # of the first worker on a machine, the next takes the next; 0 = any free port
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 = every one
    sd_port: int = 9399  # on a cluster: of the driver's list of workers (http_sd); 0 = any free port


@dataclass(frozen=True)
class Cluster:
    """What the workers get from a Ray cluster, and how long they wait for one another."""

    cpus_per_worker: float = 1.0  # cores set aside for each worker, its decoding threads included
    resources: dict[str, float] = field(default_factory=dict)  # Ray's custom resources that each worker takes
    accelerator_type: str = ""  # such as "H100", as Ray calls it; empty = any
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"  # of the workers onto machines
    wait_s: float = 0.0  # how long a cluster that is too small may take to grow
    start_s: float = 30.0  # how long workers may take to be placed, before it is tried anew
    resize_s: float = 30.0  # elastic: seconds between two looks at whether there is room for more workers
    first_step_s: float = 1800.0  # how long ranks wait for one another until the first step is through
    hang_s: float = 180.0  # and afterwards


@dataclass(frozen=True)
class Job:
    """One training run, from a manifest to a model."""

    name: str = "run"  # the run's folder under storage; the same name resumes
    manifest: str = ""  # what `thawline index` or `thawline pack` wrote: .parquet or .arrow, a file or a URI
    storage: str = "runs"  # a folder, or a URI that pyarrow.fs understands
    seed: int = 42  # decides order, augmentation and initial weights
    workers: int | tuple[int, int] = 1  # processes, one a GPU; or two: as many as there is room for between them
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train
    log_every: int = 10  # steps in a logging window
    failures: int = 3  # worker failures to survive
    preemptions: int = -1  # machines taken away with notice that are survived; -1 = any number
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    fit: Fit = field(default_factory=Fit)
    optim: Optim = field(default_factory=Optim)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
    cluster: Cluster = field(default_factory=Cluster)
    phases: tuple[PhaseJob, ...] = ()  # instead of [fit]'s epochs and frozen_epochs; only in a file, not a flag

    @property
    def least_workers(self) -> int:
        """Fewer than these cannot train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """More than these are never started."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


MAY_DIFFER = (
    # Where and under what name the run goes on: a run started on one machine may continue on another.
    *("name", "manifest", "storage", "data.root", "data.valid", "data.cache", "data.cache_gib"),
    # What the stream and the reduction do not depend on, by design: the same steps over the same ids.
    *("workers", "device", "data.engine", "data.threads"),
    # What is written and survived, not what is computed.
    *("log_every", "failures", "preemptions", "checkpoint", "metrics", "cluster", "data.max_quarantined"),
)
"""Fields, or whole sections, in which a run and its continuation may differ."""


def load(path: str | Path) -> Job:
    """The job at `path`: a TOML file, or a manifest (.parquet, .arrow, also a URI), which is a job with all defaults.

    It is called as the manifest; what `thawline pack` wrote, as the folder that it lies in.

    Raises:
        JobError: no such file; or whatever `from_toml` finds.
    """
    parts = PurePosixPath(str(path).partition("?")[0])
    if parts.suffix not in (".parquet", ".arrow"):
        return from_toml(path)
    if "://" not in str(path) and not Path(path).is_file():
        what = "is not a regular file" if Path(path).exists() else "does not exist"
        raise JobError(f"{path} {what}, so there is nothing to train on: `thawline index` writes it")
    packed = parts.name == "manifest.arrow" and parts.parent.name
    return Job(name=packed or parts.stem, manifest=str(path))


def from_toml(file: str | Path) -> Job:
    """The job that a TOML file describes; absent fields have their defaults.

    Raises:
        JobError: no such file, not TOML, an unknown field, a wrong type, an unknown choice.
    """
    from thawline.dataio.store import files  # brings pyarrow, for which `--help` need not wait

    try:
        mapping = tomllib.loads(files.text(file))
    except FileNotFoundError:
        raise JobError(f"{file} does not exist: give a job (.toml) or a manifest (.parquet)") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{file} is not valid TOML, so it is no job: {cut(str(error))}; correct it there") from None
    except (OSError, ValueError, RecursionError) as error:  # no text, a name that no file can have, nested too deeply
        raise JobError(f"{file} cannot be read as a job ({cut(str(error))}): give a TOML file") from None
    return from_dict(mapping, source=str(file))


def from_dict(mapping: Mapping[str, Any], *, source: str = "the job") -> Job:
    """The job that nested tables describe, its augmentation's preset applied; `source` is what errors call them.

    Raises:
        JobError: an unknown field, a wrong type, an unknown choice.
    """
    job = build(Job, mapping, source=source)
    given = mapping.get("augment", {})
    preset = {name: value for name, value in _preset(job.augment.preset).items() if name not in given}
    return replace(job, augment=replace(job.augment, **preset))


def to_toml(job: Job, *, brief: bool = False) -> str:
    """`job` as TOML text, every field written but None, and beside [[phases]] what nothing reads there.

    `from_toml` gives back an equal job, if it passes `check`. brief: only what differs from the defaults, those of the
    augmentation's preset among them.
    """
    tables = _tables(job)
    if job.phases:
        tables["fit"] = {name: value for name, value in tables["fit"].items() if name not in FIT_ALONE}
    if brief:
        default = {**_tables(from_dict({"augment": {"preset": job.augment.preset}})), "phases": ()}
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


def check(job: Job) -> Job:
    """`job` itself, if every value has the right type and lies in its range.

    Raises:
        JobError: the first field that does not, or that contradicts another, with the consequence and the remedy.
    """
    job = from_dict(_tables(job))
    check_ranges(flat(job))
    check_together(job)
    return job


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
    return {name: value for name, value in fields.items() if name not in ignore and name.split(".")[0] not in ignore}


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


def override(job: Job, args: list[str]) -> Job:
    """`job` with command-line flags on top: ["--fit.lr", "1e-6", "1e-4", "--augment.no-flip"].

    Misuse prints its reason on stderr and exits 2; --help prints every field and exits 0.
    """
    import tyro  # 0.1 s that reading a job does not need

    return on_top(job, lambda default: tyro.cli(Job, default=default, args=plain_flags(args), prog="thawline"))


def on_top(job: Job, flags: Callable[[Job], Job]) -> Job:
    """`job` with command-line flags on top. Phases stay as they are.

    Another preset than the job's replaces what that one set; what the job set itself stays, and flags win.
    flags: takes defaults, and gives them with the flags on top.
    """

    def parse(default: Job) -> Job:
        return replace(flags(replace(default, phases=())), phases=default.phases)

    parsed = parse(job)
    preset = parsed.augment.preset
    if preset == job.augment.preset:
        return parsed
    old = Augment(**_preset(job.augment.preset))
    own = {name: value for name, value in asdict(job.augment).items() if value != getattr(old, name)}
    # Parsed again on top of the new preset: the flags win whatever their order, and whatever they say.
    return parse(replace(job, augment=Augment(**{**_preset(preset), **own, "preset": preset})))


def plain_flags(args: Sequence[str]) -> list[str]:
    """`--augment.flip` and `--augment.no-flip` with the value that tyro asks for where a field may also be a word."""
    words = {"--augment.flip": ["--augment.flip", "True"], "--augment.no-flip": ["--augment.flip", "False"]}
    plain = list[str]()
    for i, arg in enumerate(args):
        valued = args[i + 1 : i + 2] in (["True"], ["False"], ["auto"])
        plain += [arg] if valued else words.get(arg, [arg])
    return plain


def _preset(name: str) -> dict[str, Any]:
    """The fields of [augment] that a preset sets."""
    if name == "default":  # sets none, so that reading most jobs imports nothing of dataio
        return {}
    from thawline.dataio.pixels.spec import PRESETS

    return PRESETS[name]


def _absolute(path: str) -> str:
    return path if not path or "://" in path else str(Path(path).expanduser().absolute())


def _tables(job: Job) -> dict[str, Any]:
    """Nested tables as TOML has them: no None; a pair stays a tuple, which TOML writes as an array."""
    return asdict(job, dict_factory=lambda items: {name: value for name, value in items if value is not None})
