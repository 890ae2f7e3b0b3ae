"""Files of the public data sets: found or downloaded, then verified.

A file is looked for in the folder that the user names, else in the cache (`GAF_DATA`, or the user's
cache folder), and then downloaded into the cache. Archives are read in memory: a data folder is
never written to. The content is verified, because archives get repacked: the md5 of the files
inside, and of the content of a `.gz`.
"""

import gzip
import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gaf_lab.data.download import cache, fetch
from gaf_lab.data.sources import Archive, DataError, Source


def locate(source: Source, folder: Path | None, *beside: Path) -> Path:
    """The file, from the user's folder if one is named, else from the cache, else downloaded.

    Args:
        source: the file, and where it is published.
        folder: the file is looked for only here and in `beside`; None: the cache, then the URL.
        *beside: further places to look in.

    Raises:
        DataError: if the file is not there, or cannot be downloaded.
    """
    check_folder(folder)
    for place in (folder or cache(), *beside):
        if (place / source.file).is_file():
            return place / source.file
    if folder is None:
        return fetch(source)
    raise DataError(f"{folder}: must hold {source.file}; it does not. {source.remedy(folder)}")


def check_folder(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        seen = "it does not exist. Give the folder that holds the data"
        if folder.is_file():
            seen = "it is a file. Give the folder it lies in"
        raise DataError(
            f"data folder {folder}: must be a folder; {seen}, or leave out --data to download."
        )


def read_archive(archive: Archive, folder: Path | None) -> dict[str, bytes]:
    """The contents of the archive's files, by name, verified.

    Args:
        archive: which one, and what it unpacks to.
        folder: holds the archive, or the folder it unpacks to, or is that folder. It may be
            read-only.
            None: the cache, then a download.

    Raises:
        DataError: if something is missing, cut off, or its md5 is not the published one.
    """
    check_folder(folder)
    root = _unpacked_folder(archive, folder or cache())
    if root is not None:
        where, contents = root, {name: read_file(root / name) for name in archive.md5}
    elif folder is None or (folder / archive.source.file).is_file():
        where = locate(archive.source, folder)
        contents = read_tar(where, archive)
    else:
        raise DataError(_describe_missing(archive, folder))
    for name, content in contents.items():
        verify(content, archive.md5[name], f"{where}: {name}", archive.source)
    return contents


def _unpacked_folder(archive: Archive, place: Path) -> Path | None:
    """The folder in or at `place` that holds all files of the archive."""
    for root in (place / archive.folder, place):
        if all((root / name).is_file() for name in archive.md5):
            return root
    return None


def _describe_missing(archive: Archive, folder: Path) -> str:
    inner = folder / archive.folder
    root = inner if inner.is_dir() else folder
    missing = [name for name in archive.md5 if not (root / name).is_file()]
    return (
        f"{folder}: must hold {archive.source.file}, or the folder {archive.folder} with "
        f"{', '.join(archive.md5)}; got no archive, and no {', '.join(missing)}. "
        f"{archive.source.remedy(folder)}"
    )


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
        raise DataError(
            f"{path}: must be a whole .tar.gz archive; it is cut off or damaged ({error}). "
            f"{archive.source.remedy(path.parent)}"
        ) from None
    missing = [name for name in archive.md5 if name not in contents]
    if missing:
        raise DataError(
            f"{path}: must hold {archive.folder}/{', '.join(archive.md5)}; "
            f"{', '.join(missing)} is missing. {archive.source.remedy(path.parent)}"
        )
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
            f"{what}: its md5 must be {md5}; got {seen}. The file was changed or damaged: "
            f"get it again from {source.url}."
        )


def read_idx(
    source: Source, md5: str, folder: Path | None, *beside: Path
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array of bytes from an IDX file in a `.gz`: images (N, H, W) or labels (N,).

    Args:
        source: the file, and where it is published.
        md5: of the unpacked content, because packages compress it anew.
        folder: the file is looked for only here and in `beside`; None: the cache, then the URL.
        *beside: further places to look in.

    Raises:
        DataError: if the file is missing, cut off, or not the expected one.
    """
    path = locate(source, folder, *beside)
    try:
        content = gzip.decompress(read_file(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: must be a whole .gz file; it is cut off or damaged ({error}). "
            f"{source.remedy(path.parent)}"
        ) from None
    verify(content, md5, str(path), source)
    # two zero bytes, 8 for unsigned bytes, the rank, then the shape as 32-bit integers
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape.tolist()).copy()
