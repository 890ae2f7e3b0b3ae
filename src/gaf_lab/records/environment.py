"""Under what a run ran: versions, machine, commit."""

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
    return facts | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def memory() -> int:
    """Bytes of main memory that this process may use at most: the machine's, or its container's."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", where there is none
            sizes.append(int(Path(limit).read_text()))
    return min(sizes)


def check_memory(what: str, size: int, fix: str) -> None:
    """ConfigError where so many bytes do not fit into main memory."""
    if size > memory():
        raise ConfigError(
            f"{what}: must fit into memory, {memory() / 1e9:,.0f} GB; needs {size / 1e9:,.0f} GB. {fix}"
        )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def commit() -> str | None:
    """The project's commit, with "+" where files were changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(folder: Path, *args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
    ).stdout.strip()
