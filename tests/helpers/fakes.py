"""Small data sets in public formats, a server that fails on demand, a silent listener."""

import dataclasses
import hashlib
import io
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gaf_lab.data import sources
from gaf_lab.data.sources import Archive, Source


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def rows(n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (np.arange(n * 3072) * 2654435761 % 251).astype(np.uint8).reshape(n, 3072)


def cifar100(**changes: Any) -> dict[str, bytes]:
    """200 training and 100 test pictures; class c is in super-class c % 20.

    changes: to the training dict.
    """
    parts = {"train": 200, "test": 100}
    values = {
        part: {
            "data": rows(n),
            "fine_labels": [i % 100 for i in range(n)],
            "coarse_labels": [i % 20 for i in range(n)],
        }
        for part, n in parts.items()
    }
    values["train"] |= changes
    values["meta"] = {"fine_label_names": [str(c) for c in range(100)]}
    return {name: pickle.dumps(value, protocol=2) for name, value in values.items()}


def cifar10() -> dict[str, bytes]:
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents = {
        name: pickle.dumps({"data": rows(10), "labels": list(range(10))}, protocol=2)
        for name in names
    }
    return contents | {
        "batches.meta": pickle.dumps({"label_names": [str(c) for c in range(10)]}, protocol=2)
    }


def human(**changes: Any) -> dict[str, Any]:
    """Labels for `cifar100()`: the first 50 pictures mistaken for the next class."""
    fine = np.arange(200) % 100
    noisy = np.where(np.arange(200) < 50, (fine + 1) % 100, fine)
    values = {
        "clean_label": fine,
        "noisy_label": noisy,
        "clean_coarse_label": (fine % 20).tolist(),
        "noisy_coarse_label": (noisy % 20).tolist(),
    }
    return values | changes


def save_human(folder: Path, **changes: Any) -> None:
    torch.save(human(**changes), folder / sources.HUMAN_LABELS.file)


def pack(folder: Path, archive: Archive, contents: dict[str, bytes], level: int = 1) -> Path:
    path = folder / archive.source.file
    with tarfile.open(path, "w:gz", compresslevel=level) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{archive.folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(folder: Path, archive: Archive, contents: dict[str, bytes]) -> Path:
    root = folder / archive.folder
    root.mkdir()
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return root


def trust(monkeypatch: pytest.MonkeyPatch, which: str, contents: dict[str, bytes]) -> Archive:
    """The archive `which` ("CIFAR10", "CIFAR100"), as if these contents were the published ones."""
    archive = dataclasses.replace(
        getattr(sources, which), md5={name: md5(content) for name, content in contents.items()}
    )
    monkeypatch.setattr(sources, which, archive)
    return archive


class Server:
    """Serves `content` at any path.

    Attributes:
        cuts: bytes after which to hang up, for each of the first requests.
        ranges: whether it honours Range.
        status: answers this alone, if not 200.
        asked: the Range headers seen, "" for none.
    """

    def __init__(
        self, content: bytes, cuts: tuple[int, ...] = (), ranges: bool = True, status: int = 200
    ) -> None:
        self.content, self.cuts, self.ranges, self.status = content, list(cuts), ranges, status
        self.asked: list[str] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())

    def source(self, name: str = "file.bin", md5_: str | None = None) -> Source:
        return Source(
            name, f"http://127.0.0.1:{self.http.server_port}/{name}", md5_ or md5(self.content)
        )

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range", "")
                server.asked.append(asked)
                start = 0
                if asked and server.ranges:
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                status = server.status_for(start)
                body = server.content[start:] if status < 300 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
                self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        return Handler

    def status_for(self, start: int) -> int:
        if self.status != 200:
            return self.status
        if start >= len(self.content):
            return 416
        return 206 if start else 200

    def __enter__(self) -> "Server":
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class Silent:
    """Follows a run, as a console would."""

    def begin(self, problem: Any, step: int, steps: int) -> None:
        pass

    def stepped(self, step: int, outcome: Any) -> None:
        pass

    def evaluated(self, line: dict[str, Any]) -> None:
        pass
