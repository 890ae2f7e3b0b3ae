"""The state: resumed runs go on as undisturbed ones."""

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim import SGD

import gaf
from helpers.accumulating import AGREE, DISAGREE, ROWS_OF_3, feed, vector
from helpers.comparing import same


@pytest.mark.parametrize("through", ["json", "torch.save"])
@pytest.mark.parametrize(
    "policy", [lambda: gaf.GAF(0.8), lambda: gaf.RandomSkip(0.5, seed=5)], ids=["GAF", "RandomSkip"]
)
def test_a_resumed_run_is_the_undisturbed_one(policy: Callable, through: str) -> None:
    rows = torch.randn(30, 3, 4).add(0.5)
    rows[4, 1] = math.nan
    p = vector(4)
    optimizer = SGD([p], 0.1, momentum=0.9)
    acc = gaf.Accumulator(optimizer, policy())
    for step, macro in enumerate(rows):
        if step == 13:
            state = acc.state_dict()
            if through == "json":
                state = json.loads(json.dumps(state))
            else:
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
            q = nn.Parameter(p.detach().clone())
            other_optimizer = SGD([q], 0.1, momentum=0.9)
            other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            other = gaf.Accumulator(other_optimizer, policy())
            other.load_state_dict(state)
            assert same(acc.stats(), other.stats())
        feed(acc, p, macro)
        decision = acc.step()
        if step >= 13:
            feed(other, q, macro)
            assert other.step().accepted.tolist() == decision.accepted.tolist()
    assert torch.equal(p, q)
    assert same(acc.stats(), other.stats())
    assert same(acc.state_dict(), other.state_dict())
    assert 0 < acc.stats()["stepped"] < 30


def test_the_state_is_a_copy() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    state = acc.state_dict()
    before = copy.deepcopy(state)
    feed(acc, p, AGREE)
    acc.step()
    assert same(state, before)


def test_the_state_cannot_be_taken_while_micro_gradients_wait() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5))
    feed(acc, p, AGREE)
    with pytest.raises(
        RuntimeError, match=r"state_dict\(\) must come between macro-batches; micro-gradients wait"
    ):
        acc.state_dict()
    acc.decide()
    with pytest.raises(RuntimeError, match=r"micro-gradients wait and would be lost"):
        acc.state_dict()
    acc.step()
    acc.state_dict()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    "tau", [lambda: 0.5, lambda: gaf.MovingAverageTau(0.05), lambda: gaf.NoiseFloorTau()]
)
def test_the_state_goes_through_torchs_distributed_checkpoint_into_a_new_run(
    tau: Callable[[], Any], tmp_path: Path
) -> None:
    """It takes dictionaries apart, and finds only what the new run's own state has a place for."""
    p = vector()
    acc, fresh = (gaf.Accumulator(SGD([p], 0.1), gaf.GAF(tau())) for _ in range(2))
    for rows in (AGREE, DISAGREE, AGREE):
        feed(acc, p, rows)
        acc.step()
    dcp.save({"gaf": acc.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    state = {"gaf": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh.load_state_dict(state["gaf"])
    # as text, where NaN equals NaN
    assert json.dumps(fresh.state_dict(), default=repr) == json.dumps(
        acc.state_dict(), default=repr
    )
    assert fresh.stats()["steps"] == 3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ({}, r"\[\]"),
        ({"model": {}, "gaf": {}}, r"\['gaf', 'model'\]"),
        (None, "NoneType None"),
        ([1], r"list \[1\]"),
    ],
)
def test_a_state_of_something_else_is_named(state: Any, shown: str) -> None:
    acc = gaf.Accumulator(SGD([vector(3)], 0.1), gaf.GAF())
    with pytest.raises(ValueError, match=f"with 'telemetry' and 'policy'; got {shown}. Save acc"):
        acc.load_state_dict(state)


def test_a_state_that_the_policy_refuses_leaves_the_counts_as_they_were() -> None:
    p = vector(3)
    learned = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(gaf.QuantileTau()))
    feed(learned, p, ROWS_OF_3)
    learned.step()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(gaf.MovingAverageTau()))
    with pytest.raises(ValueError, match="the state must be of the same kind"):
        acc.load_state_dict(learned.state_dict())
    assert acc.stats()["steps"] == 0
