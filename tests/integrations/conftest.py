"""Two ranks, started once for all frameworks that ask for them."""

import os
from collections.abc import Iterator

import oracle  # noqa: F401  # puts ranks on the path
import pytest
from ranks import Ranks


def launched() -> None:
    """What a launcher would have said."""
    os.environ.update(LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    ranks.run(launched)
    yield ranks
    ranks.close()
