"""The environment of a run: versions, machine, commit."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gaf
from gaf_lab.settings.checks import ConfigError


def versions() -> dict[str, str]:
    packages = {"torch": torch.__version__, "numpy": metadata.version("numpy")}
    return {"gaf": gaf.__version__, "python": platform.python_version()} | packages


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", if there is no limit
            sizes.append(int(Path(limit).read_text()))
    return min(sizes)


def check_memory(what: str, size: int, fix: str) -> None:
    """ConfigError if so many bytes do not fit into main memory."""
    if size > memory():
        raise ConfigError(
            f"{what}: must fit into memory, {memory() / 1e9:,.0f} GB; "
            f"needs {size / 1e9:,.0f} GB. {fix}"
        )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str | None:
    """The project's commit, with "+" if files have changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = run_git(here, "rev-parse", "--short=12", "HEAD")
        changed = run_git(here, "status", "--porcelain", "--untracked-files=no")
        return f"{head}+" if changed else head
    except (OSError, subprocess.CalledProcessError):
        return None


def run_git(folder: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
    ).stdout.strip()
