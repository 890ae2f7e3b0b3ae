"""How annotations are checked under test: by beartype, an int being as good as a float."""

from collections.abc import Iterator

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def without_type_checks() -> Iterator[None]:
    """For a fixture to yield from."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
