"""Files of the public data sets: found or fetched, verified, and read without running anything that they hold.

Pickles and `.pt` files are programs. They are read with an allow-list of what a plain array needs, and anything else is
refused before it is called. Archives are read in memory: a folder of data is never written to. What is verified is the
content, for archives are repacked: the md5 of the files inside, and of what a `.gz` unpacks to.

A file is looked for in the folder that the user names, else in the cache (`GAF_DATA`, or the user's cache folder), and
then downloaded into the cache.
"""

import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import requests
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gaf_lab.progress import Pulse
from gaf_lab.records.locks import file_lock

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
CHUNK = 1 << 14  # bytes; what a cut-off download can lose


class DataError(Exception):
    """A data file is missing, broken, not what it should be, or asks for code to be run."""


@dataclass(frozen=True)
class Source:
    """Where one file comes from. md5: of the file as published at the URL."""

    file: str
    url: str
    md5: str


@dataclass(frozen=True)
class Archive:
    """A `.tar.gz` that unpacks to one folder. md5: of each file in that folder, by name."""

    source: Source
    folder: str
    md5: Mapping[str, str]


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"

CIFAR10 = Archive(
    Source(
        "cifar-10-python.tar.gz",
        f"{_TORONTO}/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ),
    "cifar-10-batches-py",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100 = Archive(
    Source(
        "cifar-100-python.tar.gz",
        f"{_TORONTO}/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
    ),
    "cifar-100-python",
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)
HUMAN = Source(
    "CIFAR-100_human.pt",
    "https://github.com/UCSC-REAL/cifar-10-100n/raw/main/data/CIFAR-100_human.pt",
    "a67b45c1d7992051865b5c755bd68bb1",
)
FASHION = {  # each with the md5 of the unpacked content
    Source(f"{name}.gz", f"{_FASHION}/{name}.gz", packed): unpacked
    for name, packed, unpacked in [
        (
            "train-images-idx3-ubyte",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        ),
        (
            "train-labels-idx1-ubyte",
            "25c81989df183df01b3e8a0aad5dffbe",
            "9018921c3c673c538a1fc5bad174d6f9",
        ),
        (
            "t10k-images-idx3-ubyte",
            "bef4ecab320f06d8554ea6380940ec79",
            "8181f5470baa50b63fa0f6fddb340f0a",
        ),
        (
            "t10k-labels-idx1-ubyte",
            "bb300cfdad3c16e7a12a480ee83cd310",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ]
}


# Finding


def cache() -> Path:
    """Where downloads are kept: the environment variable GAF_DATA, else the user's cache folder."""
    return Path(os.environ.get("GAF_DATA") or pooch.os_cache("gaf"))


def locate(source: Source, folder: Path | None, *beside: Path) -> Path:
    """The file, from the user's folder if one is named, else from the cache, else downloaded.

    Args:
        source: the file, and where it is published.
        folder: only here (and in `beside`) is the file looked for; None: the cache, then the URL.
        *beside: further places to look in.

    Raises:
        DataError: where the file is not there, or cannot be downloaded.
    """
    check_folder(folder)
    for place in (folder or cache(), *beside):
        if (place / source.file).is_file():
            return place / source.file
    if folder is None:
        return fetch(source)
    raise DataError(f"{folder}: must hold {source.file}; it does not. {_remedy(source, folder)}")


def check_folder(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        seen = (
            "it is a file. Give the folder it lies in"
            if folder.is_file()
            else "it does not exist. Give the folder that holds the data"
        )
        raise DataError(
            f"data folder {folder}: must be a folder; {seen}, or leave out --data to download."
        )


def _remedy(source: Source, folder: Path) -> str:
    return f"Download {source.url} (md5 {source.md5}) into {folder}, or give the folder that holds it: --data DIR."


# Reading and verifying


def read_archive(archive: Archive, folder: Path | None) -> dict[str, bytes]:
    """The contents of the archive's files, by name, verified.

    Args:
        archive: which one, and what it unpacks to.
        folder: holds the archive, or the folder it unpacks to, or is that folder; it may be read-only.
            None: the cache, then a download.

    Raises:
        DataError: where something is missing, cut off, or its md5 is not the published one.
    """
    check_folder(folder)
    place = folder or cache()
    unpacked = [
        root
        for root in (place / archive.folder, place)
        if all((root / name).is_file() for name in archive.md5)
    ]
    if unpacked:
        where, contents = unpacked[0], {name: read_file(unpacked[0] / name) for name in archive.md5}
    elif folder is None or (folder / archive.source.file).is_file():
        where = locate(archive.source, folder)
        contents = read_tar(where, archive)
    else:
        raise DataError(_neither(archive, folder))
    for name, content in contents.items():
        verify(content, archive.md5[name], f"{where}: {name}", archive.source)
    return contents


def _neither(archive: Archive, folder: Path) -> str:
    root = folder / archive.folder if (folder / archive.folder).is_dir() else folder
    missing = [name for name in archive.md5 if not (root / name).is_file()]
    return (f"{folder}: must hold {archive.source.file}, or the folder {archive.folder} with {', '.join(archive.md5)}; "
            f"got no archive, and no {', '.join(missing)}. {_remedy(archive.source, folder)}")  # fmt: skip


def read_tar(path: Path, archive: Archive) -> dict[str, bytes]:
    """The archive's files, unpacked in memory."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix(f"{archive.folder}/")
                file = tar.extractfile(member) if name in archive.md5 and member.isfile() else None
                if file is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: must be a whole .tar.gz archive; it is cut off or damaged ({error}). "
                        f"{_remedy(archive.source, path.parent)}") from None  # fmt: skip
    missing = [name for name in archive.md5 if name not in contents]
    if missing:
        raise DataError(f"{path}: must hold {archive.folder}/{', '.join(archive.md5)}; {', '.join(missing)} is missing. "
                        f"{_remedy(archive.source, path.parent)}")  # fmt: skip
    return contents


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: must be readable; it is not ({error.strerror}). Check its permissions."
        ) from None


def verify(content: bytes, md5: str, what: str, source: Source) -> None:
    seen = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if seen != md5:
        raise DataError(
            f"{what}: its md5 must be {md5}; got {seen}. The file was changed or damaged: get it again from {source.url}."
        )


def read_idx(
    source: Source, md5: str, folder: Path | None, *beside: Path
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array of bytes from an IDX file in a `.gz`: images (N, H, W) or labels (N,).

    Args:
        source: the file, and where it is published.
        md5: of the unpacked content, for packages pack again.
        folder: only here (and in `beside`) is the file looked for; None: the cache, then the URL.
        *beside: further places to look in.

    Raises:
        DataError: where the file is missing, cut off, or not what it should be.
    """
    path = locate(source, folder, *beside)
    try:
        content = gzip.decompress(read_file(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: must be a whole .gz file; it is cut off or damaged ({error}). {_remedy(source, path.parent)}"
        ) from None
    verify(content, md5, str(path), source)
    # two zero bytes, 8 for unsigned bytes, the rank, then the shape as 32-bit integers
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape.tolist()).copy()


# Reading what could run code


class _Refused(Exception):
    """What a pickle asked for and does not get."""


# Stand-ins for numpy's own: those would make an array of Python objects out of any bytes, that is, of any addresses.


class _Kind:
    """For numpy.dtype: whole numbers, truth values and floats."""

    def __init__(self, name: str, *_: object) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise _Refused(f"an array of {name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """For numpy.ndarray: as much as its bytes fill."""

    value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        content = raw.encode("latin-1") if isinstance(raw, str) else raw
        self.value = (
            np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C").copy()
        )


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles spell bytes. No other codec: finding one by name would import a module."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode to {encoding!r}")
    return text.encode("latin-1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return ALLOWED[module, name]


def unpickle(content: bytes, source: str) -> dict[str, Any]:
    """A dict of lists, text, numbers and arrays of numbers from a pickle, Python 2's too; nothing else is looked up or called.

    Args:
        content: the pickle.
        source: what to call the file in an error.

    Raises:
        DataError: where the pickle asks for anything else, is broken, or does not hold a dict.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _Refused as error:
        raise DataError(f"{source}: must be a pickle of numpy arrays and lists alone; it asks for {error}. It was refused "
                        "before anything was called. Do not use this file; get it from its publisher.") from None  # fmt: skip
    except Exception as error:  # a broken pickle can raise nearly anything
        raise DataError(
            f"{source}: must be a whole pickle; it is cut off or damaged ({error!r}). Get it again."
        ) from None
    return _dict(value, source)


def load_pt(path: Path) -> dict[str, Any]:
    """A dict of lists, numbers, tensors and arrays of numbers from a `.pt` file; nothing else is looked up or called.

    Raises:
        DataError: where the file asks for anything else, is broken, or does not hold a dict.
    """
    try:
        with torch.serialization.safe_globals(
            [(value, ".".join(name)) for name, value in ALLOWED.items()]
        ):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, _Refused) as error:
        found = re.search(r"GLOBAL ([\w.]+)|(an array of .*)", str(error))
        seen = f"it asks for {found[1] or found[2]}" if found else "it does not"
        raise DataError(f"{path}: must hold numpy arrays, tensors and lists alone; {seen}. It was refused "
                        "before anything was called. Do not use this file; get it from its publisher.") from None  # fmt: skip
    except Exception as error:  # a broken file can raise nearly anything
        raise DataError(
            f"{path}: must be a whole .pt file; it is cut off or damaged ({type(error).__name__}). Get it again."
        ) from None
    return _dict(value, str(path))


def _dict(value: object, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{source}: must hold a dict; got {type(value).__name__}. Is it the file of another data set?"
        )
    return {key: item.value if isinstance(item, _Array) else item for key, item in value.items()}


def entry(values: dict[str, Any], key: str, source: str) -> Any:
    if key not in values:
        raise DataError(
            f"{source}: must hold {key!r}; got {sorted(map(str, values))}. Is it the file of another data set?"
        )
    return values[key]


# Fetching


def fetch(source: Source) -> Path:
    """Downloads into the cache, unless it is there; a download that was cut off goes on where it ended.

    Raises:
        DataError: where that is not possible, or what came has another md5.
    """
    folder = cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the ranks of one run want the same file at once: one fetches, the others wait and find it
        with file_lock(folder / f"{source.file}.lock"):
            downloader = Resumable(folder / f"{source.file}.part")
            return Path(
                pooch.retrieve(
                    source.url, f"md5:{source.md5}", source.file, folder, downloader=downloader
                )
            )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: the md5
        raise DataError(
            f"{source.file}: must be downloaded, and could not be ({error}). {_remedy(source, folder)}"
        ) from None


class Resumable:
    """A downloader for pooch that keeps what has come in `part`, and asks the server for the rest only.

    Args:
        part: the file that grows; it is moved away when it is whole.
        tries: failures in a row, without a byte between them, that end it. A server's refusal (404) ends it at once.
        pause: seconds between two tries.
    """

    def __init__(self, part: Path, tries: int = 3, pause: float = 1.0) -> None:
        self.part, self.tries, self.pause = part, tries, pause

    def __call__(self, url: str, output_file: str, _pooch: object = None) -> None:
        left = self.tries
        while True:
            have = self._have()
            try:
                self._go_on(url, have)
                break
            except requests.HTTPError:
                raise
            except requests.RequestException:
                left = self.tries if self._have() > have else left - 1
                if left <= 0:
                    raise
                time.sleep(self.pause)
        self.part.replace(output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _go_on(self, url: str, have: int) -> None:
        # identity: a length in bytes of the file, not of how the server packs it on the way
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            if have and response.status_code == requests.codes.requested_range_not_satisfiable:
                self.part.unlink()  # it is as long as the file, or longer: of no use, start again
                raise requests.ConnectionError(f"{url} has no more than {have} bytes")
            response.raise_for_status()
            # 200: the server sends all of it
            start = have if response.status_code == requests.codes.partial_content else 0
            self._receive(response, start)

    def _receive(self, response: requests.Response, start: int) -> None:
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with self.part.open("ab" if start else "wb") as file, progress() as bar:
            task = bar.add_task(self.part.stem, total=total, completed=start)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.advance(task, len(chunk))
        if total is not None and self._have() < total:
            raise requests.ConnectionError(
                f"the connection ended after {self._have()} of {total} bytes"
            )


class Download(Progress):
    """Bytes of a file, and how fast they come: a bar on a terminal, elsewhere plain lines."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self.pulse = Pulse(console, self._how_far)

    def start(self) -> None:
        super().start()
        self.pulse.start()

    def stop(self) -> None:
        self.pulse.stop()
        super().stop()

    def _how_far(self) -> str:
        if not self.tasks:
            return ""
        task = self.tasks[0]
        of = "" if task.total is None else f" of {task.total / 1e6:,.1f}"
        return f"downloading {task.description}: {task.completed / 1e6:,.1f}{of} MB"


def progress() -> Download:
    return Download(Console(stderr=True))
