"""Worlds of 1 to 8 processes, each started once and shared by all tests that ask for it."""

from collections.abc import Iterator

import pytest

from helpers.ranks import Ranks, World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    running: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size in running and running[size].broken:
            running.pop(size).close()
        if size not in running:
            running[size] = Ranks(size)
        return running[size]

    yield get
    for ranks in running.values():
        ranks.close()
