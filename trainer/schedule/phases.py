"""Which phases make up a run: how long is each, what does it train, and how fast?

    one_cycle_phases, cosine_phases, fine_tune_phases, ... -> Phase, ...     RECIPES has them by name
    length(phase, ...) -> its steps     phase.schedule(lr, ...) -> what `shapes` computes at each of them

Pure descriptions: no torch, no state. A phase knows no loader, and a `Find` no learning rate, before it runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from numbers import Real
from typing import Literal, get_args

from thawline.dataio.errors import quoted
from thawline.trainer.errors import RecipeError
from thawline.trainer.schedule.shapes import (
    MILESTONES,
    MOMENTA,
    Constant,
    FlatCos,
    LearningRate,
    Momenta,
    OneCycle,
    Schedule,
    Shape,
    Step,
    check_gamma,
    positive,
    spread,
    whole,
)

RecipeName = Literal["fine_tune", "one_cycle", "flat_cos", "cosine", "step", "plateau", "constant"]

FEW_STEPS = 20
"""Below these a schedule has hardly begun: BatchNorm's running statistics alone need as many."""


@dataclass(frozen=True)
class Find:
    """In place of a learning rate: what the lr finder suggests, which is known only when the phase starts."""

    rate: LearningRate = 1.0
    """In units of the suggestion."""
    search: bool = True
    """Search when the phase starts; False: take what an earlier phase of the run found."""

    def __post_init__(self) -> None:
        spread(self.rate, 1)

    def of(self, lr: float) -> LearningRate:
        """The learning rate where the finder suggests `lr`."""
        if isinstance(self.rate, slice):
            low, high = self.rate.start, self.rate.stop
            return slice(None if low is None else low * lr, high * lr)
        return [rate * lr for rate in self.rate] if isinstance(self.rate, Sequence) else self.rate * lr


@dataclass(frozen=True)
class Phase:
    """A part of a run: how long it takes, what is trainable meanwhile, and the shape of its schedule.

    Raises RecipeError unless exactly one of epochs, steps and samples is given, and where a value makes no schedule.
    """

    name: str
    epochs: float = 0
    steps: int = 0
    samples: int = 0
    """At least so many, up to the next whole step."""
    freeze_to: int = 0
    """The first trainable layer group: 0 for all of them, -1 for the last alone."""
    lr: LearningRate | Find = 3e-3
    """As the user gave it; `schedule` makes one of it per layer group."""
    shape: Shape = "one_cycle"
    div: float = 25.0
    div_final: float = 1e5
    pct_start: float | None = None
    """None: the shape's own."""
    momenta: Momenta = MOMENTA
    """Of one_cycle; the other shapes leave momentum alone."""
    warmup: float = 0.0
    """Of all but one_cycle: the share of the steps in which lr rises along a line, from lr / div."""
    milestones: tuple[float, ...] = MILESTONES
    """Of step: from which shares of the steps on lr is `gamma` times what it was."""
    gamma: float = 0.1
    """Of step and plateau."""
    plateau_epochs: int = 1
    """Of plateau: after how many epochs in a row without a new best of the monitored metric lr falls by `gamma`."""

    def __post_init__(self) -> None:
        name, value = given_length(
            f"phase {self.name!r}", RecipeError, epochs=self.epochs, steps=self.steps, samples=self.samples
        )
        check = positive if name == "epochs" else whole
        check(name, value)
        if not isinstance(self.freeze_to, int):
            raise RecipeError(f"freeze_to={self.freeze_to!r} is no layer group: give 0 for all, -1 for the last alone")
        if self.shape not in get_args(Shape):
            raise RecipeError(f"shape={self.shape!r} is no schedule: give one of {', '.join(get_args(Shape))}")
        check_gamma(self.gamma)
        whole("plateau_epochs", self.plateau_epochs)
        self.schedule(self.lr.rate if isinstance(self.lr, Find) else self.lr, groups=1, steps=1)

    def schedule(self, lr: LearningRate, *, groups: int, steps: int, fallen: int = 0) -> Schedule:
        """The learning rates and momenta of the phase's `steps`. lr: the phase's own, or what its `Find` comes to.

        fallen: how often a plateau has let lr fall so far, which is known at the end of an epoch only.
        """
        maxima = spread(lr, groups)
        pct_start = {} if self.pct_start is None else {"pct_start": self.pct_start}
        if self.shape in ("constant", "plateau"):
            return Constant(tuple(rate * self.gamma**fallen for rate in maxima), steps, self.div, self.warmup)
        if self.shape == "step":
            return Step(maxima, steps, self.div, self.warmup, self.milestones, self.gamma)
        if self.shape == "flat_cos":
            return FlatCos(maxima, steps, self.div, self.div_final, warmup=self.warmup, **pct_start)
        if self.warmup:
            raise RecipeError(
                f"warmup={self.warmup} with one_cycle, which warms up by itself: nothing would come of it; give "
                "pct_start, or the shape flat_cos"
            )
        return OneCycle(maxima, steps, self.div, self.div_final, momenta=self.momenta, **pct_start)


def given_length(phase: str, error: type[Exception], **lengths: float | None) -> tuple[str, float]:
    """Which of a phase's epochs, steps and samples is given, and its value; 0 and None are not given.

    Raises an `error`, which calls the phase so, unless exactly one is given.
    """
    given = [(name, value) for name, value in lengths.items() if value]
    if len(given) != 1:
        has = " and ".join(f"{name}={value}" for name, value in given) or "no epochs, steps or samples"
        raise error(f"{phase} has {has}: its length would be unknown; give exactly one of the three")
    return given[0]


def length(phase: Phase, *, epoch_steps: Callable[[float], int], global_batch: int) -> int:
    """Steps that a phase takes. epoch_steps: how many so many epochs take, which is the loader's to say."""
    return phase.steps or -(-phase.samples // global_batch) or epoch_steps(phase.epochs)


def doubts(
    phases: Sequence[Phase],
    *,
    epoch_steps: Callable[[float], int],
    global_batch: int,
    pretrained: bool,
    fixed: bool = False,
) -> list[str]:
    """What in a fit about to begin is probably a mistake, a sentence each. epoch_steps: as in `length`.

    pretrained: whether what these phases freeze has been trained before. fixed: whether the body never trains, whatever
    they unfreeze, as with LoRA.
    """
    said = []
    steps = sum(length(phase, epoch_steps=epoch_steps, global_batch=global_batch) for phase in phases)
    epochs = sum(phase.epochs for phase in phases)
    if epochs and steps < FEW_STEPS:
        said.append(
            f"{epochs:g} epoch(s) come to {steps} steps of {global_batch} images, and fewer than some {FEW_STEPS} "
            "teach a model little, whatever the learning rate: give more epochs, or a smaller global batch"
        )
    frozen = [phase.name for phase in phases if phase.freeze_to]
    if frozen and not pretrained:
        said.append(
            f"phase {quoted(frozen[0])!r} freezes a body of random weights: the head learns from noise; give "
            'weights = "imagenet" or a file, or frozen_epochs = 0'
        )
    elif fixed and not pretrained:
        said.append(
            "LoRA leaves a body of random weights as it is: little can be learned beside noise; give "
            'weights = "imagenet" or a file, or leave LoRA out'
        )
    return said


def one_cycle_phases(
    epochs: float,
    lr: LearningRate | Find = 3e-3,
    *,
    div: float = 25.0,
    div_final: float = 1e5,
    pct_start: float = 0.25,
    momenta: Momenta = MOMENTA,
    freeze_to: int = 0,
) -> tuple[Phase, ...]:
    """fit_one_cycle: a single phase. Raises RecipeError."""
    return (
        Phase(
            "one_cycle",
            epochs,
            freeze_to=freeze_to,
            lr=lr,
            div=div,
            div_final=div_final,
            pct_start=pct_start,
            momenta=momenta,
        ),
    )


def flat_cos_phases(
    epochs: float,
    lr: LearningRate | Find = 3e-3,
    *,
    div: float = 25.0,
    div_final: float = 1e5,
    pct_start: float = 0.75,
    warmup: float = 0.0,
    freeze_to: int = 0,
) -> tuple[Phase, ...]:
    """fit_flat_cos: a single phase. Raises RecipeError."""
    return (
        Phase(
            "flat_cos",
            epochs,
            freeze_to=freeze_to,
            lr=lr,
            shape="flat_cos",
            div=div,
            div_final=div_final,
            pct_start=pct_start,
            warmup=warmup,
        ),
    )


def constant_phases(
    epochs: float, lr: LearningRate | Find = 3e-3, *, div: float = 25.0, warmup: float = 0.0, freeze_to: int = 0
) -> tuple[Phase, ...]:
    """One rate throughout, after a linear warm-up if asked for: a single phase. Raises RecipeError."""
    return (Phase("constant", epochs, freeze_to=freeze_to, lr=lr, shape="constant", div=div, warmup=warmup),)


def cosine_phases(
    epochs: float,
    lr: LearningRate | Find = 3e-3,
    *,
    div: float = 25.0,
    div_final: float = 1e5,
    warmup: float = 0.0,
    freeze_to: int = 0,
) -> tuple[Phase, ...]:
    """Down by a cosine, after a linear warm-up if asked for: a single phase. Raises RecipeError.

    Source: Loshchilov and Hutter, SGDR, 2017, without restarts; as torch's CosineAnnealingLR, called every step.
    """
    (phase,) = flat_cos_phases(
        epochs, lr, div=div, div_final=div_final, pct_start=warmup, warmup=warmup, freeze_to=freeze_to
    )
    return (replace(phase, name="cosine"),)


def step_phases(
    epochs: float,
    lr: LearningRate | Find = 3e-3,
    *,
    div: float = 25.0,
    warmup: float = 0.0,
    milestones: tuple[float, ...] = MILESTONES,
    gamma: float = 0.1,
    freeze_to: int = 0,
) -> tuple[Phase, ...]:
    """One rate that falls at each milestone: a single phase. Raises RecipeError. Source: torch's MultiStepLR."""
    (phase,) = constant_phases(epochs, lr, div=div, warmup=warmup, freeze_to=freeze_to)
    return (replace(phase, name="step", shape="step", milestones=tuple(milestones), gamma=gamma),)


def plateau_phases(
    epochs: float,
    lr: LearningRate | Find = 3e-3,
    *,
    div: float = 25.0,
    warmup: float = 0.0,
    gamma: float = 0.1,
    plateau_epochs: int = 1,
    freeze_to: int = 0,
) -> tuple[Phase, ...]:
    """One rate that falls when the validation gets no better: a single phase. Raises RecipeError.

    Which metric is watched is the Learner's to say (stopping.monitor). Source: fastai's ReduceLROnPlateau.
    """
    (phase,) = constant_phases(epochs, lr, div=div, warmup=warmup, freeze_to=freeze_to)
    return (replace(phase, name="plateau", shape="plateau", gamma=gamma, plateau_epochs=plateau_epochs),)


def fine_tune_phases(
    epochs: float,
    base_lr: float | Find = 2e-3,
    *,
    frozen_epochs: float = 1,
    lr_mult: float = 100.0,
    pct_start: float = 0.3,
    div: float = 5.0,
    div_final: float = 1e5,
    momenta: Momenta = MOMENTA,
) -> tuple[Phase, ...]:
    """fastai's fine_tune: the head alone, then all layers at half the rate, the stem lr_mult times slower.

    frozen_epochs=0 leaves the first phase out. One search of a `Find` serves both. Raises RecipeError.
    """
    base = base_lr.rate if isinstance(base_lr, Find) else base_lr
    if not isinstance(base, Real):
        raise RecipeError(
            f"lr={base} with fine_tune, which makes its own slices of one number: give lr = 3e-3, say, "
            "or the one_cycle recipe"
        )
    half = positive("lr", base, "give a positive number, such as 3e-3") / 2

    def lr(part: slice, *, search: bool) -> slice | Find:
        return Find(part, search=base_lr.search and search) if isinstance(base_lr, Find) else part

    unfrozen = Phase(
        "unfrozen",
        epochs,
        lr=lr(slice(half / positive("lr_mult", lr_mult), half), search=frozen_epochs == 0),
        div=div,
        div_final=div_final,
        pct_start=pct_start,
        momenta=momenta,
    )
    if frozen_epochs == 0:
        return (unfrozen,)
    positive("frozen_epochs", frozen_epochs, "give such a number, or 0 to leave that phase out")
    frozen = Phase(
        "frozen",
        frozen_epochs,
        freeze_to=-1,
        lr=lr(slice(2 * half), search=True),
        div_final=div_final,
        pct_start=0.99,
        momenta=momenta,
    )
    return frozen, unfrozen


RECIPES: Mapping[RecipeName, Callable[..., tuple[Phase, ...]]] = {
    "fine_tune": fine_tune_phases,
    "one_cycle": one_cycle_phases,
    "flat_cos": flat_cos_phases,
    "cosine": cosine_phases,
    "step": step_phases,
    "plateau": plateau_phases,
    "constant": constant_phases,
}
"""Name -> the phases that (epochs, lr, **options) make; the length in epochs is the last phase's."""


def options(recipe: RecipeName) -> tuple[str, ...]:
    """What shapes a recipe besides its length and lr: the keywords of its function."""
    parameters = signature(RECIPES[recipe]).parameters.values()
    return tuple(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)
