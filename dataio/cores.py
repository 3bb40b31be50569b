"""How many cores may this process use? Not how many the machine has: a container or a scheduler may allow fewer."""

import os


def usable_cores() -> int:
    """At least 1. Where the system cannot say what is allowed (macOS), what it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
