"""A long tail has the sizes of its formula; shards gather wrong labels, and steps take of each."""

import pytest
import torch

from gaf_lab.data.imbalance import long_tail
from gaf_lab.data.make_data import make_run_data
from gaf_lab.data.sampling import Sharded
from gaf_lab.settings.config import TrainConfig


def test_classes_keep_a_geometric_row_of_sizes():
    y = torch.arange(1000) % 5
    kept = long_tail(y, 5, "any", 16.0)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert torch.bincount(y[kept]).tolist() == [200, 100, 50, 25, round(12.5)]
    assert torch.equal(long_tail(y, 5, "any", 1.0), torch.arange(1000))
    assert torch.bincount(y[long_tail(y, 5, "any", 1e9)]).tolist()[-1] == 1


def test_a_run_with_a_long_tail_knows_where_its_pictures_came_from():
    config = TrainConfig(dataset="digits", limit=500, imbalance=10.0, noise="none")
    problem = make_run_data(config, None, torch.device("cpu"))
    whole = make_run_data(
        TrainConfig(dataset="digits", noise="none", heldout=0.0), None, torch.device("cpu")
    )
    place = torch.empty(len(whole.train), dtype=torch.int64)
    place[whole.origin] = torch.arange(len(whole.train))
    assert torch.equal(whole.train.x[place[problem.origin]], problem.train.x)


def test_each_step_takes_an_eighth_of_every_shard_and_one_shard_has_all_wrong_labels():
    wrong = torch.zeros(320, dtype=torch.bool)
    wrong[torch.randperm(320)[:40]] = True
    eight, one = Sharded(wrong, 8, 10, 3), Sharded(wrong, 1, 80, 3)
    seen = []
    for step in range(4):
        parts = [eight.draw(8 * step + i) for i in range(8)]
        assert torch.equal(torch.cat(parts), one.draw(step))
        assert wrong[parts[0]].all()
        assert not wrong[torch.cat(parts[1:])].any()
        seen += parts
    assert torch.cat(seen).unique().numel() == 320  # a pass visits every sample once
    with pytest.raises(ValueError, match="k b must be a multiple of 8"):
        Sharded(wrong, 3, 5, 0)
