"""How is a running job asked to stop? `python -m thawline.cluster.messenger NAME`, on its cluster, tells its board.

Ray's own way kills the driver after three seconds, which no checkpoint survives. This is a process of its own that
imports next to nothing, since somebody waits for it.
"""

import sys

from thawline.cluster.launch.board import NAMESPACE, board_name

NOT_RUNNING = 3
"""Exit status where there is no such board."""


def main() -> int:
    """Ask; exit 0 asked, 2 misuse, 3 nobody there."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    import ray

    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False)
    try:
        board = ray.get_actor(board_name(sys.argv[1]))
    except ValueError:
        return NOT_RUNNING
    ray.get(board.request_stop.remote())
    return 0


if __name__ == "__main__":
    sys.exit(main())
