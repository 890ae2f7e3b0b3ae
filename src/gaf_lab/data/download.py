"""Downloads into the cache, which resume after an interruption."""

import os
import time
from pathlib import Path

import pooch
import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gaf_lab.data.sources import DataError, Source
from gaf_lab.progress import Pulse
from gaf_lab.records.locks import file_lock

CHUNK = 1 << 14  # bytes; an interrupted download loses at most so many


def cache() -> Path:
    """Where downloads are kept: the environment variable GAF_DATA, else the user's cache folder."""
    return Path(os.environ.get("GAF_DATA") or pooch.os_cache("gaf"))


def fetch(source: Source) -> Path:
    """Downloads into the cache, unless it is there. An interrupted download is resumed.

    Raises:
        DataError: if the download fails, or the file has another md5.
    """
    folder = cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the ranks of a run need the same file at once: one downloads it, the others wait
        with file_lock(folder / f"{source.file}.lock"):
            downloader = Resumable(folder / f"{source.file}.part")
            given = source.url, f"md5:{source.md5}", source.file, folder
            return Path(pooch.retrieve(*given, downloader=downloader))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: the md5
        raise DataError(
            f"{source.file}: must be downloaded, and could not be ({error}). "
            f"{source.remedy(folder)}"
        ) from None


class Resumable:
    """A downloader for pooch that keeps the bytes received in `part` and requests only the rest.

    Args:
        part: the growing file; it is moved away when it is complete.
        tries: gives up after so many failures in a row without a byte between them. It gives up at
            once when the server refuses (404).
        pause: seconds between two tries.
    """

    def __init__(self, part: Path, tries: int = 3, pause: float = 1.0) -> None:
        self.part, self.tries, self.pause = part, tries, pause

    def __call__(self, url: str, output_file: str, _pooch: object = None) -> None:
        left = self.tries
        while True:
            have = self._size()
            try:
                self._resume(url, have)
                break
            except requests.HTTPError:
                raise
            except requests.RequestException:
                left = self.tries if self._size() > have else left - 1
                if left <= 0:
                    raise
                time.sleep(self.pause)
        self.part.replace(output_file)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _resume(self, url: str, have: int) -> None:
        # identity: the length counts bytes of the file, not of a compressed transfer
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            if have and response.status_code == requests.codes.requested_range_not_satisfiable:
                self.part.unlink()  # as long as the file, or longer: of no use
                raise requests.ConnectionError(f"{url} has no more than {have} bytes")
            response.raise_for_status()
            # 200: the server sends all of it
            start = have if response.status_code == requests.codes.partial_content else 0
            self._receive(response, start)

    def _receive(self, response: requests.Response, start: int) -> None:
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            self.part.open("ab" if start else "wb") as file,
            Download(Console(stderr=True, emoji=False)) as bar,
        ):
            task = bar.add_task(self.part.stem, total=total, completed=start)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                bar.advance(task, len(chunk))
        if total is not None and self._size() < total:
            raise requests.ConnectionError(
                f"the connection ended after {self._size()} of {total} bytes"
            )


class Download(Progress):
    """Bytes of a file and their rate: a bar on a terminal, elsewhere plain lines."""

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
