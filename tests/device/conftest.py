"""Data and a process group for the tests of one device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.digits import Batch, noisy_digits


@pytest.fixture(scope="session")
def digits() -> Batch:
    return noisy_digits()


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
