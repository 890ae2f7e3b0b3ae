"""The lab: experiments with gradient agreement filtering. It imports `gaf`, never the reverse."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gaf_lab.data.problem import Augmentation, Metric, Problem

__all__ = ["Augmentation", "Metric", "Problem"]

# settings of how threads wait for one another: OpenMP's, GNU's and Intel's
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main() -> int:
    """The command `gaf`; without the lab's packages, a message that names the missing one."""
    let_threads_sleep()
    try:
        from gaf_lab.commands.main import main as run
    except ModuleNotFoundError as missing:
        print(
            "gaf: the command needs the lab's packages; "
            f"{missing.name} is not installed. pip install 'gaf[lab]'",
            file=sys.stderr,
        )
        return 2
    return run()


def let_threads_sleep() -> None:
    """Makes waiting threads sleep instead of spin, here and in child processes.

    A setting of the user's wins. On a busy machine the thread that others wait for may not be
    running at all (docs/speed.md). OpenMP reads the setting once, when torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def __getattr__(name: str) -> Any:
    """The names of __all__, imported when they are used: torch takes a while."""
    if name in __all__:
        from gaf_lab.data import problem

        return getattr(problem, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
