"""Pickles that run code if one lets them."""

import builtins
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Call:
    """Unpickles as a call, if one lets it."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hostile(marker: Path) -> dict[str, Call]:
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.exec": Call(builtins.exec, code),
        "builtins.open": Call(open, str(marker), "w"),
        "subprocess.Popen": Call(subprocess.Popen, [sys.executable, "-c", code]),
    }
