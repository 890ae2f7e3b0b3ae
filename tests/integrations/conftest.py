"""Two ranks, started once for all frameworks that ask for them."""

from collections.abc import Iterator

import oracle  # noqa: F401  # puts ranks on the path
import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()
