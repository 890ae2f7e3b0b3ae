"""Pickles and `.pt` files are read without running anything that they hold."""

import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaf_lab.data.sources import DataError
from gaf_lab.data.unpickle import load_pt, unpickle
from helpers import fakes
from helpers.hostile import Call, hostile


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
