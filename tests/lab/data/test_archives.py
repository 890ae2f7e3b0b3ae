"""Files are verified by content, and a data folder is never written to."""

import gzip
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaf_lab.data import sources
from gaf_lab.data.archives import locate, read_archive, read_idx
from gaf_lab.data.sources import CIFAR100, DataError
from helpers import fakes
from helpers.hostile import hostile

pytestmark = pytest.mark.usefixtures("own_cache")


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
