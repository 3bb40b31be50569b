"""How do the flags of a command line go on top of a job?

override(load("pets.toml"), ["--fit.epochs", "6"])
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from thawline.cluster.job.job import Augment, Job
from thawline.dataio.pixels.spec import PRESETS


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
        return replace(
            flags(replace(default, phases=(), appended=())), phases=default.phases, appended=default.appended
        )

    parsed = parse(job)
    preset = parsed.augment.preset
    if preset == job.augment.preset:
        return parsed
    old = Augment(**PRESETS[job.augment.preset])
    own = {name: value for name, value in asdict(job.augment).items() if value != getattr(old, name)}
    # Parsed again on top of the new preset: the flags win whatever their order, and whatever they say.
    return parse(replace(job, augment=Augment(**{**PRESETS[preset], **own, "preset": preset})))


def plain_flags(args: Sequence[str]) -> list[str]:
    """`--augment.flip` and `--augment.no-flip` with the value that tyro asks for where a field may also be a word."""
    words = {"--augment.flip": ["--augment.flip", "True"], "--augment.no-flip": ["--augment.flip", "False"]}
    plain = list[str]()
    for i, arg in enumerate(args):
        valued = args[i + 1 : i + 2] in (["True"], ["False"], ["auto"])
        plain += [arg] if valued else words.get(arg, [arg])
    return plain
