"""Files are verified by content and never run; a data folder is never written to.

A download resumes where it was cut off.
"""

import builtins
import gzip
import os
import pickle
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaf_lab.data import download, sources
from gaf_lab.data.archives import locate, read_archive, read_idx
from gaf_lab.data.download import Resumable, fetch
from gaf_lab.data.sources import CIFAR100, DataError
from gaf_lab.data.unpickle import load_pt, unpickle
from helpers import fakes


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GAF_DATA", str(folder))
    return folder


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


# Pickles


@given(
    st.sampled_from(["uint8", "int64", ">i4", "float32", "bool"]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([0, 1, 2, 3, 4]),
    st.sampled_from(["C", "F"]),
)
def test_a_pickle_of_arrays_and_lists_is_read_as_it_was_written(
    dtype: str, n: int, m: int, protocol: int, order: Literal["C", "F"]
) -> None:
    array = np.asarray((np.arange(n * m) % 2).reshape(n, m).astype(dtype), order=order)
    read = unpickle(
        pickle.dumps(
            {"data": array, "labels": list(range(n)), "name": "é", "raw": b"\xff\x00"}, protocol
        ),
        "it",
    )
    assert read["data"].dtype == array.dtype
    assert np.array_equal(read["data"], array)
    assert (read["labels"], read["name"], read["raw"]) == (list(range(n)), "é", b"\xff\x00")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.exec", "builtins.open", "subprocess.Popen"]
)
def test_a_pickle_that_would_write_a_file_is_refused_and_nothing_runs(
    name: str, protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "written"
    content = pickle.dumps({"data": np.zeros(3), "x": [hostile(marker)[name]]}, protocol)
    function = name.split(".")[-1]
    with pytest.raises(
        DataError,
        match=r"^train: must be a pickle of numpy arrays and lists alone; "
        rf"it asks for \w+\.{function}\. It was refused",
    ):
        unpickle(content, "train")
    assert not marker.exists()


def test_the_hostile_pickle_does_write_the_file_where_it_is_not_refused(tmp_path: Path) -> None:
    marker = tmp_path / "written"
    pickle.loads(pickle.dumps(hostile(marker)["posix.system"]))
    assert marker.exists()


def test_the_refusal_names_the_file_and_the_global() -> None:
    with pytest.raises(
        DataError,
        match=r"^cifar-100-python/train: .*it asks for fractions\.Fraction\. It was refused before",
    ):
        unpickle(b"cfractions\nFraction\n.", "cifar-100-python/train")


def test_an_allowed_name_elsewhere_is_still_refused() -> None:
    with pytest.raises(DataError, match=r"it asks for numpy\.core\.multiarray\.ndarray"):
        unpickle(b"cnumpy.core.multiarray\nndarray\n.", "train")


# an object at an address of the file's choice
FORGED = Call(np.ndarray, (1,), np.dtype("O"), b"\x01" * 8)


def test_an_array_of_objects_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    path = tmp_path / "human.pt"
    for value in (FORGED, np.array([None]), np.array(["text"])):
        with pytest.raises(DataError, match=r"^train: .* asks for an array of [OU]"):
            unpickle(pickle.dumps({"data": value}, 2), "train")
        torch.save({"data": value}, path)
        with pytest.raises(DataError, match=r"human\.pt: .* asks for an array of [OU]"):
            load_pt(path)


def test_an_array_is_no_more_than_its_bytes() -> None:
    content = pickle.dumps({"data": np.arange(4, dtype=np.uint8)}, 2)
    with pytest.raises(DataError, match="cannot reshape"):
        unpickle(content.replace(b"K\x04\x85", b"K\x05\x85"), "train")


def test_bytes_are_decoded_by_latin1_alone() -> None:
    with pytest.raises(DataError, match=r"it asks for _codecs\.encode to 'zlib'"):
        unpickle(pickle.dumps({"x": Call(__import__("_codecs").encode, "a", "zlib")}, 2), "train")


CONTENT = pickle.dumps(
    {"data": np.arange(20, dtype=np.uint8).reshape(4, 5), "labels": [1, 2, 3, 4]}, 2
)


@given(st.integers(0, len(CONTENT) - 1))
def test_a_pickle_cut_off_anywhere_is_an_error_of_ours(length: int) -> None:
    with pytest.raises(
        DataError, match=r"^train: must be a whole pickle; it is cut off or damaged"
    ):
        unpickle(CONTENT[:length], "train")


def test_a_pickle_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match=r"^train: must hold a dict; got list\."):
        unpickle(pickle.dumps([1]), "train")


# .pt files


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_file_of_arrays_is_read(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "human.pt"
    torch.save(fakes.human() | {"rate": 0.4}, path, _use_new_zipfile_serialization=zipped)
    read = load_pt(path)
    assert np.array_equal(read["noisy_label"], fakes.human()["noisy_label"])
    assert read["rate"] == 0.4


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_file_that_would_write_a_file_is_refused_and_nothing_runs(
    zipped: bool, tmp_path: Path
) -> None:
    path, marker = tmp_path / "human.pt", tmp_path / "written"
    for name, call in hostile(marker).items():
        torch.save({"clean_label": call}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            DataError,
            match=r"human\.pt: must hold numpy arrays, .*; "
            rf"it .*{name.split('.')[-1]}.*was refused before",
        ):
            load_pt(path)
        assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not a file of torch's", b"PK\x03\x04 cut off"])
def test_a_broken_pt_file_is_an_error_of_ours(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "human.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"human\.pt: must "):
        load_pt(path)


def test_allowing_numpy_does_not_outlast_the_call(tmp_path: Path) -> None:
    path = tmp_path / "human.pt"
    torch.save(fakes.human(), path)
    load_pt(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


# Archives


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    contents = fakes.cifar100()
    fakes.trust(monkeypatch, "CIFAR100", contents)
    return contents


def test_archive_folder_and_the_folder_itself_are_the_same_data(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    packed, unpacked = tmp_path / "packed", tmp_path / "unpacked"
    packed.mkdir()
    unpacked.mkdir()
    fakes.pack(packed, CIFAR100, contents)
    root = fakes.unpack(unpacked, CIFAR100, contents)
    for folder in (packed, unpacked, root):
        assert read_archive(sources.CIFAR100, folder) == contents


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_repacked_archive_is_as_good(
    level: int, contents: dict[str, bytes], tmp_path: Path
) -> None:
    fakes.pack(tmp_path, CIFAR100, contents, level)
    assert read_archive(sources.CIFAR100, tmp_path) == contents


def test_a_read_only_folder_is_enough_and_nothing_is_written_to_it(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = fakes.pack(folder, CIFAR100, contents)
    before = folder.stat().st_mtime_ns, path.stat().st_mtime_ns
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    path.chmod(stat.S_IRUSR)
    try:
        assert read_archive(sources.CIFAR100, folder) == contents
        assert list(folder.iterdir()) == [path]
        assert (folder.stat().st_mtime_ns, path.stat().st_mtime_ns) == before
    finally:
        folder.chmod(stat.S_IRWXU)


@settings(max_examples=25)
@given(share=st.floats(0, 0.999))
def test_an_archive_cut_off_anywhere_is_an_error_of_ours(
    share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    small = {"train": os.urandom(40_000), "test": b"b" * 5000, "meta": b"c"}
    path = fakes.pack(folder, CIFAR100, small)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(
        DataError, match=r"cifar-100-python\.tar\.gz.*(cut off or damaged|is missing|md5 must be)"
    ):
        read_archive(CIFAR100, folder)


def test_the_message_of_a_cut_off_archive_says_what_to_do(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    path = fakes.pack(tmp_path, CIFAR100, contents)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError) as error:
        read_archive(sources.CIFAR100, tmp_path)
    assert str(error.value).startswith(
        f"{path}: must be a whole .tar.gz archive; it is cut off or damaged ("
    )
    assert CIFAR100.source.url in str(error.value)


def test_a_changed_file_inside_is_named_with_both_checksums(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    changed = contents | {"test": contents["test"] + b" "}
    fakes.pack(tmp_path, CIFAR100, changed)
    want, got = fakes.md5(contents["test"]), fakes.md5(changed["test"])
    with pytest.raises(
        DataError,
        match=rf"tar\.gz: test: its md5 must be {want}; got {got}\. .*get it again from https://",
    ):
        read_archive(sources.CIFAR100, tmp_path)


def test_a_changed_pickle_is_not_even_opened(contents: dict[str, bytes], tmp_path: Path) -> None:
    marker = tmp_path / "written"
    root = fakes.unpack(
        tmp_path, CIFAR100, contents | {"meta": pickle.dumps(hostile(marker)["posix.system"])}
    )
    with pytest.raises(DataError, match="cifar-100-python: meta: its md5 must be"):
        read_archive(sources.CIFAR100, root)
    assert not marker.exists()


def test_a_file_missing_in_the_archive_is_named(contents: dict[str, bytes], tmp_path: Path) -> None:
    fakes.pack(
        tmp_path, CIFAR100, {name: content for name, content in contents.items() if name != "meta"}
    )
    with pytest.raises(
        DataError, match=r"must hold cifar-100-python/train, test, meta; meta is missing"
    ):
        read_archive(sources.CIFAR100, tmp_path)


def test_a_file_missing_in_the_folder_is_named(contents: dict[str, bytes], tmp_path: Path) -> None:
    (fakes.unpack(tmp_path, CIFAR100, contents) / "test").unlink()
    with pytest.raises(DataError, match=r"got no archive, and no test\."):
        read_archive(sources.CIFAR100, tmp_path)


def test_an_incomplete_folder_beside_a_whole_archive_does_no_harm(
    contents: dict[str, bytes], tmp_path: Path
) -> None:
    (fakes.unpack(tmp_path, CIFAR100, contents) / "test").unlink()
    fakes.pack(tmp_path, CIFAR100, contents)
    assert read_archive(sources.CIFAR100, tmp_path) == contents


def test_an_empty_folder_says_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_archive(CIFAR100, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: must hold cifar-100-python.tar.gz, or the folder cifar-100-python with "
        "train, test, meta; got no archive, and no train, test, meta. "
        f"Download {CIFAR100.source.url} (md5 {CIFAR100.source.md5}) into {tmp_path}, "
        "or give the folder that holds it: --data DIR."
    )


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="^data folder .*: must be a folder; it does not exist. "
        "Give the folder that holds the data, or leave out --data",
    ):
        read_archive(CIFAR100, tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError,
        match="^data folder .*: must be a folder; it is a file. "
        "Give the folder it lies in, or leave out --data",
    ):
        locate(sources.HUMAN_LABELS, tmp_path / "file")


# IDX


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_an_idx_file_is_read_as_it_was_written_and_a_cut_one_refused(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    source = sources.Source("images.gz", "http://nowhere/images.gz", "0" * 32)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(array)))
    assert np.array_equal(read_idx(source, fakes.md5(idx(array)), tmp_path), array)
    with pytest.raises(DataError, match=r"images\.gz: its md5 must be f{32}; got "):
        read_idx(source, "f" * 32, tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        DataError, match=r"must be a whole \.gz file; it is cut off or damaged .* into .*--data DIR"
    ):
        read_idx(source, "f" * 32, tmp_path)


# Downloads

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
