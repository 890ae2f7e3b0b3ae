"""A Hugging Face dataset on disk: its values and names come through, and it trains."""

import csv
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gaf_lab.commands.main import main
from gaf_lab.data.convert import read_from
from gaf_lab.data.sources import DataError
from gaf_lab.records import run as records

ARRAYS = "gaf_lab.tasks.arrays:arrays"


def test_without_datasets_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets, .*. pip install datasets$"):
        read_from(f"hf:{tmp_path}")


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="reads Hugging Face datasets: needs datasets")


def save_shades(datasets, folder, **parts):
    """Pictures whose shade is 60 times the class, plus the row's number."""
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee", "cow"])}
    )

    def make(n):
        kinds = [i % 3 for i in range(n)]
        images = [Image.new("L", (8, 8), 60 * kind + i // 3) for i, kind in enumerate(kinds)]
        return datasets.Dataset.from_dict({"image": images, "kind": kinds}, features=features)

    whole = datasets.DatasetDict({name: make(n) for name, n in parts.items()})
    whole.save_to_disk(str(folder))


def test_pictures_with_class_labels_are_imported_trained_on_and_audited(
    datasets, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_shades(datasets, "shades", train=150, test=30)
    assert main(["data", "--from", "hf:shades", "--out", "shades.npz"]) == 0
    assert "3 (ant: 50, bee: 50, cow: 50)" in capsys.readouterr().out
    found = read_from("hf:shades")
    for (x, y), names, n in zip((found.train, found.test), found.names, (150, 30), strict=True):
        i = torch.arange(n)
        assert y.equal(i % 3)
        assert x.equal((60 * (i % 3) + i // 3).byte()[:, None, None, None].expand(n, 1, 8, 8))
        assert names == [f"row {row}" for row in range(n)]
    task = ["--task", ARRAYS, "--data", "shades.npz", "--device", "cpu", "--passes", "8"]
    assert main(["train", *task, "--k", "2", "--b", "10", "--out", "run"]) == 0
    assert records.read(tmp_path / "run").evals[-1]["test_accuracy"] > 0.8
    assert main(["audit", *task, "--b", "10", "--out", "audit"]) == 0
    with (tmp_path / "audit" / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 135
    for row in rows:
        assert row["sample"] == f"row {row['index']}"
        assert row["given_class"] == ["ant", "bee", "cow"][int(row["index"]) % 3]


def test_words_and_numbers_are_labels_too_and_a_single_split_is_divided(datasets, tmp_path):
    columns = {"a": [i / 2 for i in range(20)], "b": [[i, -i] for i in range(20)]}
    words = columns | {"kind": ["dog", "cat"] * 10}
    datasets.Dataset.from_dict(words).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(DataError, match="0 are of type ClassLabel. Give one of a, b, kind with"):
        read_from(f"hf:{tmp_path}/words")
    with pytest.raises(DataError, match="label must be a column; got 'knd'. Did you mean 'kind'"):
        read_from(f"hf:{tmp_path}/words", "knd")
    found = read_from(f"hf:{tmp_path}/words", "kind")
    assert found.classes == ["cat", "dog"]
    assert (len(found.train[1]), len(found.test[1])) == (16, 4)
    for (x, y), names in zip((found.train, found.test), found.names, strict=True):
        i = torch.tensor([int(name.removeprefix("row ")) for name in names])
        torch.testing.assert_close(x, torch.stack([i / 2, i, -i], 1).float(), rtol=0, atol=0)
        assert y.equal((i + 1) % 2)
    targets = columns | {"y": np.arange(20) / 4}
    datasets.Dataset.from_dict(targets).save_to_disk(str(tmp_path / "numbers"))
    numbers = read_from(f"hf:{tmp_path}/numbers", "y")
    assert numbers.classes == []
    assert numbers.train[1].dtype == torch.float32
    broken = columns | {"kind": ["dog", None] * 10}
    datasets.Dataset.from_dict(broken).save_to_disk(str(tmp_path / "broken"))
    with pytest.raises(DataError, match="every label must be there; that of row 1 is not"):
        read_from(f"hf:{tmp_path}/broken", "kind")
