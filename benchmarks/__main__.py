"""Which benchmark? `python -m benchmarks NAME [flags]`; exit 0 done, 1 cannot run here, 2 misuse.

Heavy imports wait until a name is known, so that a list of them comes at once.
"""

import ast
import importlib
import logging
import sys
from pathlib import Path

NAMES = (
    "decode",
    "presize",
    "presize_quality",
    "prefilter",
    "step",
    "train",
    "profile",
    "overhead",
    "finetune",
    "imbalance",
    "ray_overhead",
    "shards",
    "scale",
)
"""Each is a module beside this one, its docstring beginning with its question, with a main()."""


def main(arguments: list[str]) -> int:
    """Run the benchmark that `arguments` name; return the exit code."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in NAMES:
        print(f"benchmarks: {name!r} is not one of them\n{_usage()}", file=sys.stderr)
        return 2
    import tyro

    from thawline.benchmarks.harness import BenchmarkError
    from thawline.cluster.errors import ClusterError
    from thawline.dataio.errors import DataError
    from thawline.models.errors import ModelError
    from thawline.trainer.errors import TrainError

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    module = importlib.import_module(f"benchmarks.{name}")
    try:
        tyro.cli(module.main, args=rest, prog=f"python -m benchmarks {name}")
    except (BenchmarkError, ClusterError, DataError, ModelError, TrainError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


def _usage() -> str:
    lines = ["usage: python -m benchmarks NAME [--device cpu|cuda] [--out FILE.json]; NAME --help tells more"]
    for name in NAMES:
        text = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        lines.append(f"  {name:15} {(ast.get_docstring(ast.parse(text)) or '').splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
