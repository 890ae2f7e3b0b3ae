"""The real CIFAR-100, where it is at hand; no type checks at every call: whole runs train here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gaf_lab.data import sources
from typechecker import without_type_checks

HUMAN = sources.HUMAN_LABELS.file


@pytest.fixture(autouse=True, scope="module")
def _fast() -> Iterator[None]:
    with without_type_checks():
        yield


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder with the real CIFAR-100 archive and human labels."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    for folder in filter(None, (os.environ.get("GAF_DATA"), beside)):
        if all((Path(folder) / file).is_file() for file in (sources.CIFAR100.source.file, HUMAN)):
            return Path(folder)
    pytest.skip(
        f"needs {sources.CIFAR100.source.file} and {HUMAN} in the folder GAF_DATA, or in {beside}"
    )
