"""What several tests of the data need."""

from pathlib import Path

import pytest

from gaf_lab.data.generated import make_pictures


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GAF_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes, 24 training and 6 test pictures of each, 20 to 30 pixels on a side."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), classes=4, per_class=24, size=20)
