"""The lab: experiments with gradient agreement filtering. It imports `gaf`; `gaf` never imports it."""

import sys


def main() -> int:
    """The command `gaf`. The library alone does not bring what the lab needs; then it says so."""
    try:
        from gaf_lab.cli import main as run
    except ModuleNotFoundError as missing:
        print(
            f"gaf: the command needs the lab's packages; {missing.name} is not installed. pip install 'gaf[lab]'",
            file=sys.stderr,
        )
        return 2
    return run()
