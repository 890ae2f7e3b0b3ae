"""Reads pickles and `.pt` files without running anything that they hold.

Both are programs. They are read with an allow-list of what a plain array needs; anything else is
refused before it is called.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gaf_lab.data.sources import DataError


class _Refused(Exception):
    """A request of a pickle that is refused."""


# Stand-ins for numpy's own classes. Those would make an array of Python objects out of any bytes,
# that is, out of any addresses.


class _Kind:
    """Stands in for numpy.dtype: whole numbers, truth values and floats."""

    def __init__(self, name: str, *_: object) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "biuf":
            raise _Refused(f"an array of {name}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray: no larger than its bytes."""

    value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        content = raw.encode("latin-1") if isinstance(raw, str) else raw
        flat = np.frombuffer(content, kind.dtype)
        self.value = flat.reshape(shape, order="F" if fortran else "C").copy()


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Old pickles write bytes this way. No other codec: to find one by name imports a module."""
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


# the end of a refusal
UNTOUCHED = (
    "It was refused before anything was called. Do not use this file; get it from its publisher."
)


def unpickle(content: bytes, source: str) -> dict[str, Any]:
    """A dict of lists, text, numbers and arrays of numbers from a pickle, Python 2's too.

    Nothing else is looked up or called.

    Args:
        content: the pickle.
        source: the name of the file in an error.

    Raises:
        DataError: if the pickle asks for anything else, is broken, or does not hold a dict.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _Refused as error:
        raise DataError(
            f"{source}: must be a pickle of numpy arrays and lists alone; it asks for {error}. "
            f"{UNTOUCHED}"
        ) from None
    except Exception as error:  # a broken pickle can raise nearly anything
        raise DataError(
            f"{source}: must be a whole pickle; it is cut off or damaged ({error!r}). Get it again."
        ) from None
    return _check_dict(value, source)


def load_pt(path: Path) -> dict[str, Any]:
    """A dict of lists, numbers, tensors and arrays of numbers from a `.pt` file.

    Nothing else is looked up or called.

    Raises:
        DataError: if the file asks for anything else, is broken, or does not hold a dict.
    """
    allowed: list[Any] = [(value, ".".join(name)) for name, value in ALLOWED.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, _Refused) as error:
        found = re.search(r"GLOBAL ([\w.]+)|(an array of .*)", str(error))
        seen = f"it asks for {found[1] or found[2]}" if found else "it does not"
        raise DataError(
            f"{path}: must hold numpy arrays, tensors and lists alone; {seen}. {UNTOUCHED}"
        ) from None
    except Exception as error:  # a broken file can raise nearly anything
        raise DataError(
            f"{path}: must be a whole .pt file; it is cut off or damaged "
            f"({type(error).__name__}). Get it again."
        ) from None
    return _check_dict(value, str(path))


def _check_dict(value: object, source: str) -> dict[str, Any]:
    """The dict, its arrays as numpy's own."""
    if not isinstance(value, dict):
        raise DataError(
            f"{source}: must hold a dict; got {type(value).__name__}. "
            "Is it the file of another data set?"
        )
    return {key: item.value if isinstance(item, _Array) else item for key, item in value.items()}


def entry(values: dict[str, Any], key: str, source: str) -> Any:
    """values[key]. DataError if it is missing."""
    if key not in values:
        raise DataError(
            f"{source}: must hold {key!r}; got {sorted(map(str, values))}. "
            "Is it the file of another data set?"
        )
    return values[key]
