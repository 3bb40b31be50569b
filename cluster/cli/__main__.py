"""What does the `thawline` command start? The verbs, in a process that ends when they have ended."""

from thawline.cluster.cli.main import main
from thawline.cluster.run.signals import end_soon


def start() -> None:
    """The console script, and `python -m thawline.cluster.cli`."""
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code:
            end_soon(ended.code)  # a thread that waits for a mount would hold up the end for ever
        raise


if __name__ == "__main__":
    start()
