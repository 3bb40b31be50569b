"""What does the `thawline` command start? `cluster.cli`, once it is sure that `cluster` is ours.

Our packages have names that others have, too: a `cluster.py` on PYTHONPATH comes before what is installed. Nobody else
has a module of this name, so it can look before it imports any of them.
"""

import importlib.util
import sys
from pathlib import Path

_HOME = Path(__file__).resolve().parents[1]


def main() -> None:
    """The console script."""
    for name in ("cluster", "dataio", "models", "trainer"):
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec is not None else None
        if found is None or Path(found).resolve() != _HOME / name / "__init__.py":
            if sys.stderr is not None:
                sys.stderr.write(
                    f"thawline: `import {name}` finds {found or 'nothing'}, not {_HOME / name}: another module of that "
                    "name comes first and foreign code would run; rename it, or take it out of PYTHONPATH\n"
                )
            sys.exit(1)
    from thawline.cluster.cli.main import main as verbs
    from thawline.cluster.run.signals import end_soon

    try:
        verbs()
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code:
            end_soon(ended.code)  # a thread that waits for a mount would hold up the end for ever
        raise


if __name__ == "__main__":
    main()
