"""What shall a run do? `Job`: frozen dataclasses <-> TOML, a few flags on top, every value checked.

    job = check(override(load("pets.toml"), ["--fit.epochs", "6"]))

Reading refuses unknown fields, wrong types and unknown choices, and names the file; `check` refuses values
out of range and is called once, after the flags. What an image may become is dataio.ImageSpec's to refuse.
Nothing here opens a manifest or a run folder, and neither torch nor Ray nor DALI is imported.
"""

import tomllib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from math import inf
from operator import attrgetter
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tomli_w

from cluster.errors import JobError

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Which pixels reach the model, and how many at a time."""

    size_px: int = 224  # side of the square that the model sees
    stages: tuple[tuple[float, int], ...] = ()  # progressive resizing: from this epoch on this side, ...; last: size_px
    presize_px: int = 460  # side of the square that augmentation works on
    global_batch: int = 64  # images a step, over all workers
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

    preset: Literal["default", "satellite", "plain", "digits"] = "default"  # dataio.spec.PRESETS, as a start
    flip: bool = True  # mirror left to right, every second image
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

    name: str = "resnet34"  # a backbone of torchvision
    weights: str = "imagenet"  # none, imagenet, or a file
    dropout: float = 0.5  # before the last layer; half of it before the layer ahead


@dataclass(frozen=True)
class Fit:
    """How long, how fast, and how exact."""

    recipe: Literal["fine_tune", "one_cycle"] = "fine_tune"  # fastai's words, fastai's numbers
    epochs: int = 5  # passes over the training images with everything trainable
    frozen_epochs: int = 1  # passes before them with only the head trainable; fine_tune only
    lr: float | tuple[float, float] = 3e-3  # learning rate, or two: the first layers' and the head's
    div: float | None = None  # the cycle starts at lr / div; None = the recipe's own
    pct_start: float | None = None  # share of the cycle in which lr rises; None = the recipe's own
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the forward and backward pass


@dataclass(frozen=True)
class Optim:
    """What turns gradients into steps."""

    name: Literal["adamw", "sgd", "lamb"] = "adamw"  # lamb needs NVIDIA's apex
    weight_decay: float = 0.01  # decoupled; never on norms and biases


@dataclass(frozen=True)
class Checkpoint:
    """What a kill may cost."""

    every_s: float = 60.0  # seconds between checkpoints
    keep: int = 3  # newest checkpoints kept


@dataclass(frozen=True)
class Metrics:
    """Where Prometheus finds a worker."""

    port: int = 9400  # of the first worker on a machine, the next takes the next; 0 = any free port
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 = every one


@dataclass(frozen=True)
class Job:
    """One training run, from a manifest to a model."""

    name: str = "run"  # the run's folder under storage; the same name resumes
    manifest: str = ""  # what `thawline index` or `thawline pack` wrote: .parquet or .arrow, a file or a URI
    storage: str = "runs"  # a folder, or a URI that pyarrow.fs understands
    seed: int = 42  # decides order, augmentation and initial weights
    workers: int = 1  # processes, one a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train
    log_every: int = 10  # steps in a logging window
    failures: int = 3  # worker failures to survive
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    fit: Fit = field(default_factory=Fit)
    optim: Optim = field(default_factory=Optim)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)


MAY_DIFFER = (
    # Where and under what name the run goes on: a run started on one machine may continue on another.
    *("name", "manifest", "storage", "data.root", "data.valid", "data.cache", "data.cache_gib"),
    # What the stream and the reduction do not depend on, by design: the same steps over the same ids.
    *("workers", "device", "data.engine", "data.threads"),
    # What is written and survived, not what is computed.
    *("log_every", "failures", "checkpoint", "metrics", "data.max_quarantined"),
)
"""Fields, or whole sections, in which a run and its continuation may differ."""


def _is_file_name(name: str) -> bool:
    return bool(name.strip(" .")) and name == name.strip() and name.isprintable() and not {*name} & {*"/\\"}


_RANGES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "name": (_is_file_name, "a name without slashes, such as 'pets-2'", "no run folder can be called so"),
    "manifest": (bool, "the file that `thawline index` or `thawline pack` writes", "there is nothing to train on"),
    "storage": (bool, "a folder or a URI", "the run would have no place"),
    "seed": (lambda v: 0 <= v < 2**63, "0 <= _ < 2**63", "the random numbers are counted in 63 bits"),
    "workers": (lambda v: v >= 1, "_ >= 1", "nobody would train"),
    "log_every": (lambda v: v >= 1, "_ >= 1", "a window has at least one step"),
    "failures": (lambda v: v >= 0, "_ >= 0", "a count is not negative"),
    "data.global_batch": (lambda v: v >= 2, "_ >= 2", "BatchNorm cannot train on one image"),
    "data.threads": (lambda v: v >= 0, "_ >= 0, where 0 chooses", "a count is not negative"),
    "data.max_quarantined": (lambda v: 0 <= v <= 1, "0 <= _ <= 1", "it is a share of the training images"),
    "data.cache_gib": (lambda v: v > 0, "_ > 0", "no shard would find room"),
    "augment.mixup": (lambda v: 0 <= v <= 100, "0 <= _ <= 100, where 0 is none", "it is a Beta distribution's alpha"),
    "augment.cutmix": (lambda v: 0 <= v <= 100, "0 <= _ <= 100, where 0 is none", "it is a Beta distribution's alpha"),
    "model.name": (bool, "a backbone such as 'resnet34'", "there is nothing to train"),
    "model.weights": (bool, "none, imagenet or a file", "it would be no choice"),
    "model.dropout": (lambda v: 0 <= v < 1, "0 <= _ < 1", "it is a probability, and at 1 nothing passes"),
    "fit.epochs": (lambda v: v >= 1, "_ >= 1", "nothing would be trained"),
    "fit.frozen_epochs": (lambda v: v >= 0, "_ >= 0", "a count is not negative"),
    "fit.lr": (lambda v: 0 < v < inf, "a finite number above 0", "training would stand still or diverge"),
    "fit.div": (lambda v: 1 <= v < inf, "_ >= 1", "the cycle would start above its own maximum"),
    "fit.pct_start": (lambda v: 0 < v < 1, "0 < _ < 1", "a cycle rises and falls"),
    "optim.weight_decay": (lambda v: 0 <= v < inf, "_ >= 0", "weights would grow by themselves"),
    "checkpoint.every_s": (lambda v: 0 <= v < inf, "_ >= 0", "it is a time between two checkpoints"),
    "checkpoint.keep": (lambda v: v >= 1, "_ >= 1", "a killed run could not resume"),
    "metrics.port": (lambda v: 0 <= v < 2**16, "0 <= _ < 65536; 0 is any free one", "no such port exists"),
    "metrics.host": (bool, "an address such as 127.0.0.1", "nothing could listen"),
}
"""Field -> is the value inside?, what to give (_ stands for the field's name), what would happen outside."""


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
        raise JobError(f"{path} does not exist, so there is nothing to train on: `thawline index` writes it")
    packed = parts.name == "manifest.arrow" and parts.parent.name
    return Job(name=packed or parts.stem, manifest=str(path))


def from_toml(file: str | Path) -> Job:
    """The job that a TOML file describes; absent fields have their defaults.

    Raises:
        JobError: no such file, not TOML, an unknown field, a wrong type, an unknown choice.
    """
    try:
        mapping = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"{file} does not exist: give a job (.toml) or a manifest (.parquet)") from None
    except tomllib.TOMLDecodeError as error:
        raise JobError(f"{file} is not valid TOML, so it is no job: {error}; correct it there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{file} cannot be read as a job ({error}): give a TOML file") from None
    return from_dict(mapping, source=str(file))


def from_dict(mapping: Mapping[str, Any], *, source: str = "the job") -> Job:
    """The job that nested tables describe, its augmentation's preset applied; `source` is what errors call them.

    Raises:
        JobError: an unknown field, a wrong type, an unknown choice.
    """
    job = _build(Job, mapping, prefix="", source=source)
    given = mapping.get("augment", {})
    preset = {name: value for name, value in _preset(job.augment.preset).items() if name not in given}
    return replace(job, augment=replace(job.augment, **preset))


def to_toml(job: Job) -> str:
    """`job` as TOML text, every field written, None by its absence: `from_toml` gives back an equal job."""
    return tomli_w.dumps(_tables(job))


def check(job: Job) -> Job:
    """`job` itself, if every value has the right type and lies in its range.

    Raises:
        JobError: the first field that does not, with its value, the consequence and the remedy.
    """
    job = from_dict(_tables(job))
    for name, value in _flat(job).items():
        if name not in _RANGES or value is None:
            continue
        inside, wanted, consequence = _RANGES[name]
        if not all(map(inside, value if isinstance(value, tuple) else (value,))):
            wanted = wanted.replace("_", name, 1)
            raise JobError(f"{name}={value!r} is out of range: {consequence}; give {wanted}")
    batch, workers = job.data.global_batch, job.workers
    if batch < 2 * workers:
        problem = f"global_batch={batch} over workers={workers} leaves one with fewer than 2 images a step"
        raise JobError(f"{problem}: BatchNorm cannot train on one; give global_batch >= {2 * workers}")
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


def differences(old: Job, new: Job, *, ignore: Collection[str] = MAY_DIFFER) -> list[str]:
    """Lines such as "fit.epochs: 5 -> 6" for the fields that would make `new` another run than `old`.

    Paths are compared as text, never what lies there: whether it is the same manifest, its reader must say.
    """
    before, after = _flat(old), _flat(new)
    names = [name for name in before if name not in ignore and name.split(".")[0] not in ignore]
    return [f"{name}: {before[name]} -> {after[name]}" for name in names if before[name] != after[name]]


def override(job: Job, args: list[str]) -> Job:
    """`job` with command-line flags on top: ["--fit.lr", "1e-6", "1e-4", "--augment.no-flip"].

    Another preset than the job's replaces what that one set; what the job set itself stays, and flags win.
    Misuse prints its reason on stderr and exits 2; --help prints every field and exits 0.
    """
    import tyro  # 0.1 s that reading a job does not need

    def parse(default: Job) -> Job:
        return tyro.cli(Job, default=default, args=args, prog="thawline train JOB")

    parsed = parse(job)
    preset = parsed.augment.preset
    if preset == job.augment.preset:
        return parsed
    old = Augment(**_preset(job.augment.preset))
    own = {name: value for name, value in asdict(job.augment).items() if value != getattr(old, name)}
    # Parsed again on top of the new preset: the flags win whatever their order, and whatever they say.
    return parse(replace(job, augment=Augment(**{**_preset(preset), **own, "preset": preset})))


def _preset(name: str) -> dict[str, Any]:
    """The fields of [augment] that a preset sets."""
    if name == "default":  # sets none, so that reading most jobs imports nothing of dataio
        return {}
    from dataio.spec import PRESETS

    return PRESETS[name]


def _absolute(path: str) -> str:
    return path if not path or "://" in path else str(Path(path).expanduser().absolute())


def _tables(job: Job) -> dict[str, Any]:
    """Nested tables as TOML has them: no None; a pair stays a tuple, which TOML writes as an array."""
    return asdict(job, dict_factory=lambda items: {name: value for name, value in items if value is not None})


def _flat(job: Job) -> dict[str, Any]:
    """Every value by its dotted name, in the order of the dataclasses, None included."""
    return {name: attrgetter(name)(job) for name in _names(Job)}


def _names(cls: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, hint in get_type_hints(cls).items():
        names += _names(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name]
    return names


def _build(cls: type[T], table: Mapping[str, Any], *, prefix: str, source: str) -> T:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in table.items():
        dotted = prefix + name
        where = f"{dotted}={value!r} in {source}"
        if name not in hints:
            near = _nearest(name, {known: prefix + known for known in hints})
            raise JobError(f"unknown field {dotted} in {source}: nothing would read it; {near}")
        if not is_dataclass(hints[name]):
            values[name] = _read(hints[name], value, where=where)
        elif isinstance(value, Mapping):
            values[name] = _build(hints[name], value, prefix=f"{dotted}.", source=source)
        else:
            raise JobError(f"{where} is no section, so its fields have no place: write them under [{dotted}]")
    return cls(**values)


def _nearest(word: str, here: dict[str, str]) -> str:
    """What somebody who wrote `word` probably meant: a similar word in the same section, or else anywhere."""
    anywhere = {name.split(".")[-1]: name for name in reversed(_names(Job))}
    for known in (here, anywhere):
        if close := get_close_matches(word, known, n=1):
            return f"did you mean {known[close[0]]}?"
    return f"there are {', '.join(here.values())}"


def _read(hint: Any, value: Any, *, where: str) -> Any:
    """`value` as `hint` has it: a whole number is fine for a float, and a TOML array for a pair."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value in choices:
            return value
        close = get_close_matches(str(value), choices, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"give one, {choices[0]!r} for instance"
        raise JobError(f"{where} is none of {', '.join(choices)}, so nothing could run: {remedy}")
    accepted = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in accepted:
        with suppress(TypeError, ValueError):
            return _fit(kind, value)
    wanted = " or ".join(_WORDS.get(kind, str(kind)) for kind in accepted if kind is not NoneType)
    raise JobError(f"{where} is of type {type(value).__name__}, which does not fit there: give {wanted}")


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple[float, float]: "two numbers in [ ]",
    tuple[float, float, float]: "three numbers in [ ]",
    tuple[tuple[float, int], ...]: "[ ] of pairs, each [a number, a whole number]",
}


def _fit(kind: Any, value: Any) -> Any:
    """`value` as a `kind`. Raises TypeError or ValueError where it is none."""
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_fit(*pair) for pair in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:  # isinstance would take True for a count
        raise TypeError
    return value
