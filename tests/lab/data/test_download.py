"""A download resumes where it was cut off, and its checksum is verified."""

import os
import threading
from pathlib import Path

import pytest
import requests

from gaf_lab.data import download, sources
from gaf_lab.data.archives import locate, read_archive
from gaf_lab.data.download import Resumable, fetch
from gaf_lab.data.sources import CIFAR100, DataError
from helpers import fakes

pytestmark = pytest.mark.usefixtures("own_cache")

BODY = os.urandom(200_000)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resumable.__init__, "__defaults__", (3, 0.0))


def test_a_download_that_is_cut_off_goes_on_where_it_ended(own_cache: Path) -> None:
    with fakes.Server(BODY, cuts=(65_536, 65_536)) as server:
        path = fetch(server.source())
    assert path == own_cache / "file.bin"
    assert path.read_bytes() == BODY
    assert server.asked == ["", "bytes=65536-", "bytes=131072-"]


def test_a_download_given_up_goes_on_in_the_next_run(own_cache: Path) -> None:
    with fakes.Server(BODY, cuts=(65_536, 0, 0, 0)) as server:
        with pytest.raises(DataError, match=r"file\.bin: must be downloaded, and could not be"):
            fetch(server.source())
        assert (own_cache / "file.bin.part").stat().st_size == 65_536
        assert not (own_cache / "file.bin").exists()
        assert fetch(server.source()).read_bytes() == BODY
    assert server.asked[-1] == "bytes=65536-"
    assert {path.name for path in own_cache.iterdir()} == {"file.bin", "file.bin.lock"}


def test_a_server_without_ranges_sends_all_of_it_again(own_cache: Path) -> None:
    with fakes.Server(BODY, cuts=(65_536,), ranges=False) as server:
        assert fetch(server.source()).read_bytes() == BODY
    assert server.asked == ["", "bytes=65536-"]


@pytest.mark.parametrize("length", [len(BODY), len(BODY) + 1])
def test_a_part_as_long_as_the_file_is_dropped(length: int, own_cache: Path) -> None:
    own_cache.mkdir()
    (own_cache / "file.bin.part").write_bytes(bytes(length))
    with fakes.Server(BODY) as server:
        assert fetch(server.source()).read_bytes() == BODY
    assert server.asked == [f"bytes={length}-", ""]


def test_a_part_of_another_file_fails_by_its_checksum_and_then_the_download_starts_anew(
    own_cache: Path,
) -> None:
    own_cache.mkdir()
    (own_cache / "file.bin.part").write_bytes(b"x" * 1000)
    with fakes.Server(BODY) as server:
        with pytest.raises(DataError, match="hash"):
            fetch(server.source())
        assert {path.name for path in own_cache.iterdir()} == {"file.bin.lock"}
        assert fetch(server.source()).read_bytes() == BODY


def test_a_refusal_is_not_tried_again() -> None:
    with fakes.Server(BODY, status=404) as server, pytest.raises(DataError, match="404"):
        fetch(server.source())
    assert server.asked == [""]


def test_what_was_fetched_is_not_fetched_again() -> None:
    with fakes.Server(BODY) as server:
        assert locate(server.source(), None) == locate(server.source(), None)
    assert len(server.asked) == 1


def test_ranks_that_want_the_same_file_at_once_fetch_it_once() -> None:
    with fakes.Server(BODY) as server:
        ranks = [threading.Thread(target=fetch, args=(server.source(),)) for _ in range(4)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    assert len(server.asked) == 1


def test_offline_the_error_says_the_url_the_checksum_and_where_to_put_the_file(
    own_cache: Path,
) -> None:
    with fakes.Server(BODY) as server:
        source = server.source()
    with pytest.raises(DataError) as error:
        fetch(source)
    assert str(error.value).endswith(
        f"Download {source.url} (md5 {source.md5}) into {own_cache}, "
        "or give the folder that holds it: --data DIR."
    )


def test_an_archive_without_a_folder_is_downloaded_into_the_cache(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, tmp_path: Path
) -> None:
    contents = fakes.cifar100()
    body = fakes.pack(tmp_path, CIFAR100, contents).read_bytes()
    with fakes.Server(body, cuts=(len(body) // 2,)) as server:
        archive = sources.Archive(
            server.source(CIFAR100.source.file),
            CIFAR100.folder,
            {k: fakes.md5(v) for k, v in contents.items()},
        )
        assert read_archive(archive, None) == contents
    assert read_archive(archive, None) == contents
    assert read_archive(archive, own_cache) == contents


def test_the_cache_is_the_users_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GAF_DATA", str(tmp_path))
    assert download.cache() == tmp_path
    monkeypatch.delenv("GAF_DATA")
    assert download.cache().name == "gaf"


def test_the_errors_of_requests_are_caught_as_oserror() -> None:
    assert issubclass(requests.RequestException, OSError)
