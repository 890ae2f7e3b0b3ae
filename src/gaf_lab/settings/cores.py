"""How many cores this process may use."""

import os


def cores() -> int:
    """At least 1. A job scheduler or taskset may leave a process fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
