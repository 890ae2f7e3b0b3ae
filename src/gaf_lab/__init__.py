"""The lab: experiments with gradient agreement filtering. It imports `gaf`; `gaf` never imports it."""

import os
import sys

# how threads wait for one another, in OpenMP's words, GNU's and Intel's
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main() -> int:
    """The command `gaf`. The library alone does not bring what the lab needs; then it says so."""
    let_threads_sleep()
    try:
        from gaf_lab.commands.main import main as run
    except ModuleNotFoundError as missing:
        print(
            f"gaf: the command needs the lab's packages; {missing.name} is not installed. pip install 'gaf[lab]'",
            file=sys.stderr,
        )
        return 2
    return run()


def let_threads_sleep() -> None:
    """Threads that wait for one another sleep instead of spinning, here and in child processes; unless the user has said how they wait.

    On a machine that does something else as well, the thread that is waited for may not be running at all (docs/speed.md). OpenMP
    reads this once, when torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
