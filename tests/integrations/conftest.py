"""Two ranks, started once for all frameworks that ask for them."""

from collections.abc import Iterator

import pytest

from helpers.oracle import reset_accelerate, set_launcher_environment  # puts ranks on the path
from helpers.ranks import Ranks


@pytest.fixture(autouse=True)
def _nothing_left() -> None:
    reset_accelerate()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def pair(two: Ranks) -> Ranks:
    """As a launcher starts them: the framework before may have left another environment."""
    two.run(set_launcher_environment)
    return two
