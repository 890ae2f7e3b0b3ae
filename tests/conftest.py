"""Every annotated shape in `gaf` is checked at every call while the library's tests run."""

import jaxtyping

# Before the first import of gaf: gaf.shapes looks for jaxtyping in sys.modules, and the hook sees
# only what is imported later.
jaxtyping.install_import_hook("gaf", "typechecker.check")

from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from typechecker import without_type_checks  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "gaf", deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("gaf")


# files that take half a minute
LONG = (
    "test_paper_smoke",
    "test_sweep_ray",
    "test_sweep",
    "test_parallel",
    "test_gpu_benchmark",
    "test_demo",
    "test_examples",
    "test_train",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: short tests are left to the end, and a worker that is done takes half."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks, as for users: a wrong type reaches the message of gaf itself."""
    with without_type_checks():
        yield
