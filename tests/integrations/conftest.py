"""Two ranks, started once for all frameworks that ask for them."""

from collections.abc import Iterator

import pytest
from oracle import launched  # puts ranks on the path
from ranks import Ranks


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    ranks.run(launched)
    yield ranks
    ranks.close()
