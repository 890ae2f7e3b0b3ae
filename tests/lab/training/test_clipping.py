"""Clipped updates are those of torch's clipping; Guard and the median run as arms and resume."""

import dataclasses

import pytest
import torch
from torch import nn

import gaf
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.clipping import Clipped
from gaf_lab.training.engines import check_ranks, obstacle
from gaf_lab.training.make import make_policy
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state

SMALL = TrainConfig(
    dataset="digits",
    limit=240,
    model="mlp-small",
    k=3,
    b=12,
    passes=3.0,
    eval_every=0.5,
    lr=0.02,
    policy="mean",
)


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(("norm", "shorter"), [(0.01, True), (1e6, False)])
def test_an_update_is_the_mean_shortened_to_the_norm(norm, shorter):
    model = nn.Linear(4, 3).double()
    x, start = torch.randn(2, 6, 4, dtype=torch.float64), model.weight.detach().clone()
    losses = [model(part).square().mean() for part in x]
    mean = torch.autograd.grad(sum(losses) / 2, list(model.parameters()))
    length = torch.cat([g.flatten() for g in mean]).norm()
    assert (length > norm) == shorter
    accumulator = Clipped(torch.optim.SGD(model.parameters(), lr=1.0), gaf.Mean(), norm)
    for part in x:
        accumulator.backward(model(part).square().mean())
    accumulator.decide()
    accumulator.step()
    factor = norm / length if shorter else 1.0
    # torch's clipping divides by the norm plus 1e-6
    assert torch.allclose(model.weight, start - factor * mean[0], rtol=1e-3 * shorter + 1e-12)


def test_a_skipped_step_has_nothing_to_clip():
    model = nn.Linear(2, 1)
    accumulator = Clipped(torch.optim.SGD(model.parameters(), lr=1.0), gaf.RandomSkip(0.0), 1.0)
    before = [p.detach().clone() for p in model.parameters()]
    accumulator.backward(model(torch.ones(3, 2)).mean())
    accumulator.step()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("changes", [{"clip": 0.3}, {"policy": "guard"}, {"policy": "median"}])
def test_they_resume_to_the_bit(tmp_path, changes):
    config = changed(**changes)
    train(config, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Stop(after=11))
    train(config, tmp_path / "parts", Silent(), resume=True)
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def test_they_are_made_and_named():
    assert isinstance(make_policy(changed(policy="guard")), gaf.Guard)
    assert isinstance(make_policy(changed(policy="median")), gaf.Median)
    assert [changed(policy=name).arm for name in ("guard", "median")] == ["Guard", "median"]
    assert changed(clip=1.0).arm == "gradient clipping"
    assert changed(policy="gaf", clip=1.0).arm == "GAF + gradient clipping"


@pytest.mark.parametrize(
    "changes", [{"clip": -1.0}, {"clip": float("inf")}, {"clip": 1.0, "scope": "group"}]
)
def test_a_norm_that_cannot_be_is_refused(changes):
    message = "clip must be at least 0 and finite, and goes with scope 'all' alone; got"
    with pytest.raises(ConfigError, match=message):
        changed(policy="gaf", **changes)


def test_the_device_engine_and_several_ranks_refuse_what_they_cannot_run():
    assert obstacle(changed(clip=1.0)) == "clip must be 0 for engine 'device'; got 1.0."
    for policy in ("guard", "median"):
        found = obstacle(changed(policy=policy))
        assert found is not None
        assert found.startswith("policy must need neither its own past nor all rows")
    with pytest.raises(ConfigError, match="clip must be 0 on several ranks; got 1 on 3"):
        check_ranks(changed(clip=1.0), 3)
