"""What can be typed? `thawline VERB ...`: the verbs, and how their errors reach a person.

Data goes to stdout, talk to stderr; exit 0 done, 1 failed, 2 misuse. Heavy imports wait inside their verb, so that
`thawline --help` answers at once.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

_EPILOGUE = """\
verbs:
  sample digits DIR                 write scikit-learn's handwritten digits as JPEGs
  index SOURCE --out FILE.parquet   a folder or CSV of images -> a manifest
  explain JOB                       one sample through every step, with shapes
  show JOB --out FILE.png           a batch as the model sees it
  train JOB [--workers N] ...       train, or resume, or show a finished run's result
  doctor                            versions, devices, engines: what works here and what does not

JOB is a TOML file or a manifest. `thawline VERB --help` tells more; --debug shows tracebacks.
"""


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: thawline VERB ...\n\n{_EPILOGUE}", end="", file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    verb, rest = arguments[0], arguments[1:]
    if verb not in _VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, _VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(_VERBS)}"
        print(f"thawline: {verb!r} is not a verb; {hint}", file=sys.stderr)
        sys.exit(2)
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(message)s", stream=sys.stderr)
    sys.exit(_guarded(lambda: _run_verb(verb, rest), debug=debug))


def _run_verb(verb: str, arguments: list[str]) -> int:
    from cluster.doctor import shadowed
    from cluster.errors import LaunchError

    intruders = [] if verb == "doctor" else shadowed()  # doctor lists them itself
    if intruders:
        raise LaunchError("; ".join(intruders))
    return _VERBS[verb](arguments)


def _guarded(action: Callable[[], int], *, debug: bool) -> int:
    """Run a verb; a user's mistake becomes one sentence on stderr and exit code 1."""
    try:
        return action()
    except KeyboardInterrupt:
        print("thawline: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug or not _is_users(error):
            raise
        print(f"thawline: {error}", file=sys.stderr)
        return 1


def _is_users(error: Exception) -> bool:
    from cluster.errors import ClusterError
    from dataio.errors import DataError

    if isinstance(error, ClusterError | DataError):
        return True
    from cluster.run import USER_ERRORS

    return isinstance(error, USER_ERRORS)


# The verbs ------------------------------------------------------------------------------------------------


def _sample(arguments: list[str]) -> int:
    def sample(what: Positional[str], folder: Positional[Path]) -> int:
        """Write sample images to train on.

        Args:
            what: digits: scikit-learn's 1,797 handwritten digits, 96 px.
            folder: Where to write them, as 7_0123.jpg and so on.
        """
        from dataio.samples import write_digits

        if what != "digits":
            print(f"thawline: sample {what!r} is not known: give digits", file=sys.stderr)
            return 2
        count = write_digits(folder)
        print(f"{count} images in {folder}", file=sys.stderr)
        return 0

    return tyro.cli(sample, args=arguments, prog="thawline sample")


def _index(arguments: list[str]) -> int:
    def index(
        source: Positional[Path],
        *,
        out: Path,
        label: str = "parent",
        delimiter: str | None = None,
        valid: str = "0.2",
        seed: int = 42,
        root: Path | None = None,
        path_column: str | None = None,
    ) -> int:
        """Make a manifest: which images there are, what each shows, which are for validation.

        Args:
            source: A folder of images, or a CSV/TSV with a column of paths.
            out: The manifest to write, a .parquet file.
            label: parent (the folder's name), regex:R (its first group, on the file's name), column:C (of the CSV).
            delimiter: Splits a column's value into several labels (multi-label).
            valid: A fraction drawn at random, column:C (true or valid), or folder:N (a folder of that name).
            seed: Of the random split.
            root: Where a CSV's paths start; its own folder if not given.
            path_column: The CSV's column of paths; the first if not given.
        """
        from cluster.index import make_manifest

        manifest = make_manifest(
            source,
            label=label,
            delimiter=delimiter,
            valid=valid,
            seed=seed,
            root=root,
            path_column=path_column,
        )
        manifest.save(out)
        print(manifest.summary(), file=sys.stderr)
        print(out)
        return 0

    return tyro.cli(index, args=arguments, prog="thawline index")


def _explain(arguments: list[str]) -> int:
    from cluster.run import job_loaders
    from dataio.explanation import explain

    job = _job(arguments, "explain")
    train, valid = job_loaders(job, _alone(job))
    print(explain(train), end="\n\n")
    print(explain(valid))
    return 0


def _show(arguments: list[str]) -> int:
    from cluster.run import job_loaders
    from dataio.explanation import show_batch

    if "--out" not in arguments[:-1]:
        print("thawline show: give --out FILE.png", file=sys.stderr)
        return 2
    at = arguments.index("--out")
    out = Path(arguments[at + 1])
    job = _job(arguments[:at] + arguments[at + 2 :], "show")
    train, _ = job_loaders(job, _alone(job))
    out.parent.mkdir(parents=True, exist_ok=True)
    show_batch(train, rows=4, cols=8).savefig(out, dpi=110)
    print(out)
    return 0


def _train(arguments: list[str]) -> int:
    job = _job(arguments, "train")
    from cluster.job import to_toml
    from cluster.preflight import preflight

    first = os.environ.get("RANK", "0") == "0"
    finished = preflight(job)
    if finished is not None:
        if first:
            _print_result(job, finished, already=True)
        return 0
    if first:
        print(to_toml(job), file=sys.stderr)
    from cluster.launch import launch

    result = launch(job)
    if first:
        _print_result(job, result, already=False)
    return 0


def _print_result(job: Any, result: dict[str, Any], *, already: bool) -> None:
    from cluster.console import epoch_table
    from cluster.storage import run_dir

    folder = run_dir(job)
    if result["status"] == "stopped":
        print(f"stopped at step {result['steps']}; the same command resumes it", file=sys.stderr)
        return
    if already:
        import pyarrow.parquet as pq

        print(f"{folder} has finished: this is its result", file=sys.stderr)
        print(epoch_table(pq.read_table(folder / "rows.parquet").to_pylist()), file=sys.stderr)
    print(
        f"{result['images_per_s']:,.0f} images/s, {result['data_wait_fraction']:.1%} of the time waiting for data, "
        f"{result['wall_s']:.0f} s in all; see {folder / 'report.html'}",
        file=sys.stderr,
    )
    print(json.dumps({"run": str(folder), **result["metrics"], "stream_hash": result["stream_hash"]}))


def _doctor(arguments: list[str]) -> int:
    def doctor(*, storage: str = "runs") -> int:
        """Versions, devices, engines: what works here, what does not, and what to do.

        Args:
            storage: The folder that runs would be written to.
        """
        from cluster.doctor import collect

        checks = collect(storage=storage)
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{'ok ' if check.ok else '!! '} {check.name:<{width}}  {check.value}")
            if check.remedy and not check.ok:
                print(f"    {'':<{width}}  -> {check.remedy}")
        return 0 if all(check.ok for check in checks) else 1

    return tyro.cli(doctor, args=arguments, prog="thawline doctor")


_VERBS: dict[str, Callable[[list[str]], int]] = {
    "sample": _sample,
    "index": _index,
    "explain": _explain,
    "show": _show,
    "train": _train,
    "doctor": _doctor,
}


def _job(arguments: list[str], verb: str) -> Any:
    """The job that comes first among the arguments, with the flags after it on top."""
    from cluster import job as jobs

    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            jobs.override(jobs.Job(), ["--help"])  # prints every field and exits
        print(f"usage: thawline {verb} JOB [--field VALUE ...]; JOB is a .toml or a manifest", file=sys.stderr)
        sys.exit(2)
    job = jobs.check(jobs.override(jobs.load(arguments[0]), arguments[1:]))
    return jobs.resolved(job)


def _alone(job: Any) -> Any:
    """The context of a verb that looks at data in this process."""
    from cluster.launch import local_device
    from trainer.context import LocalContext

    return LocalContext(device=local_device(job))


if __name__ == "__main__":
    main()
