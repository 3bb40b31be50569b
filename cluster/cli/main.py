"""What can be typed? `thawline VERB ...`: the verbs, and how their errors reach a person.

Data goes to stdout, everything else to stderr; exit 0 done, 1 failed, 2 misuse; of `train`, 143 or 130 where SIGTERM or
Ctrl-C stopped it at a checkpoint. Heavy imports wait inside their verb, so that `thawline --help` answers at once.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

import thawline
from thawline.cluster import outputs
from thawline.cluster.cli.data import Index, Pack, Sample
from thawline.cluster.cli.finished.evaluate import Evaluate
from thawline.cluster.cli.finished.export import Export
from thawline.cluster.cli.finished.predict import Predict
from thawline.cluster.cli.finished.serve import Serve
from thawline.cluster.cli.jobs import List, Logs, Status, Stop, Submit, Token
from thawline.cluster.cli.look import Doctor, Explain, LrFind, Show
from thawline.cluster.cli.models import Models
from thawline.cluster.cli.train import Train
from thawline.cluster.cli.verbs import Verb, parse, with_job
from thawline.cluster.errors import USER_ERRORS, HangError
from thawline.cluster.job.job import Job
from thawline.cluster.run import signals
from thawline.cluster.words import Plain, quoted, say

_DESCRIPTION = (
    "Fine-tune vision models: index images, look at them, train here or on a cluster. See `thawline VERB --help` "
    "for a verb's options; `thawline --version` prints the version."
)


@dataclass(frozen=True, kw_only=True)
class Completion(Verb):
    """Print a script for shell completion: `source <(thawline completion bash)`."""

    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], arg(metavar="bash|zsh|fish")]
    """Shell that the script is for."""

    def run(self) -> int:
        """Print the script."""
        _all_verbs(["--tyro-write-completion", self.shell, "-"])
        return 0


VERBS: Mapping[str, type[Verb]] = {
    "sample": Sample,
    "index": Index,
    "pack": Pack,
    "models": Models,
    "explain": Explain,
    "show": Show,
    "lr-find": LrFind,
    "train": Train,
    "predict": Predict,
    "evaluate": Evaluate,
    "export": Export,
    "serve": Serve,
    "submit": Submit,
    "list": List,
    "status": Status,
    "logs": Logs,
    "stop": Stop,
    "token": Token,
    "doctor": Doctor,
    "completion": Completion,
}


def main() -> None:
    """The console script."""
    words = sys.argv[1:]
    with outputs.safe_streams() as stdout, signals.ending_when_interrupted():
        verb = _verb(words)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Plain("%(message)s"))
        logging.basicConfig(level=logging.INFO if verb.debug else logging.WARNING, handlers=[handler])
        status = _run(verb, words)
        if not isinstance(verb, Train):  # a run has ended as it has, whoever hears of it
            status = status or _check_printed(words[0], stdout)
    sys.exit(status)


def check_arguments(words: Sequence[str]) -> None:
    """See whether `thawline WORDS` can be understood, and run nothing: for documents that hold such lines.

    Raises SystemExit for misuse (status 2) and for --help (0), and JobError for values out of range.
    """
    with_job(_verb(words), words, file=Job(manifest="a.parquet"))


def _verb(words: Sequence[str]) -> Verb:
    """The verb that the words make, a job's file unread. Misuse, --help and --version end the process."""
    if words and words[0] in VERBS:
        return parse(VERBS[words[0]], words)
    if words and words[0] == "--version":
        print(f"thawline {thawline.__version__}")
        sys.exit(0)
    if words and not words[0].startswith("-"):
        near = get_close_matches(words[0], VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        say(f"thawline: {quoted(words[0])} is not a verb; {hint}")
        sys.exit(2)
    return _all_verbs(words)


def _all_verbs(words: Sequence[str]) -> Verb:
    """The parser of everything, which knows all verbs: for help, and for a shell's completion."""
    verb: Verb = tyro.extras.subcommand_cli_from_dict({**VERBS}, prog="thawline", description=_DESCRIPTION, args=words)
    return verb


def _run(verb: Verb, words: Sequence[str]) -> int:
    """Run a verb; a user's mistake becomes one sentence on stderr and exit code 1."""
    try:
        return with_job(verb, words).run()
    except KeyboardInterrupt:
        print("thawline: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if verb.debug or not isinstance(error, (*USER_ERRORS, HangError)):
            raise
        say(f"thawline: {error}")
        return 1


def _check_printed(verb: str, stdout: outputs.SafeStream) -> int:
    """1, and a sentence, where what a verb printed is lost; no sentence where the reader has left."""
    stdout.flush()
    if stdout.why is None:
        return 0
    if not outputs.reader_left(stdout):
        print(
            f"thawline: stdout cannot be written ({outputs.reason(stdout.why)}): what `thawline {verb}` printed is "
            "lost; send it elsewhere",
            file=sys.stderr,
        )
    return 1
