"""Optimizers of a run: made as asked for, resumed to the bit, and evaluated where they average."""

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

import gaf
from gaf_lab.settings.arms import name_arm
from gaf_lab.settings.checks import ConfigError
from gaf_lab.settings.config import TrainConfig
from gaf_lab.training.engines import check_ranks, obstacle
from gaf_lab.training.optimizers import (
    PACKAGED,
    MuonAndAdamW,
    evaluated_weights,
    make_optimizer,
)
from gaf_lab.training.run import train
from helpers.fakes import Silent
from helpers.runs import Stop, assert_same, final_state

SMALL = TrainConfig(
    dataset="digits",
    limit=240,
    model="mlp-small",
    k=3,
    b=12,
    passes=5.0,
    eval_every=0.5,
    lr=0.002,
    tau=0.95,
)


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


def regression():
    """A small network, and a function that sets its gradients."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)

    def differentiate():
        model.zero_grad()
        (model(x) - y).square().mean().backward()

    return model, differentiate


@pytest.mark.parametrize("name", ["muon", "adamw-all", "rmsprop-all", *PACKAGED])
def test_a_run_with_skips_resumes_to_the_bit(tmp_path, name):
    if name in PACKAGED:
        pytest.importorskip("pytorch_optimizer")
    config = changed(optimizer=name)
    run = train(config, tmp_path / "whole", Silent())
    assert 0 < run.evals[-1]["steps_taken"] < run.evals[-1]["step"]
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Stop(after=11))
    train(config, tmp_path / "parts", Silent(), resume=True)
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def test_muon_moves_matrices_as_torchs_muon_does_and_the_rest_as_adamw():
    model, differentiate = regression()
    twin, differentiate_twin = regression()
    params, others = list(model.parameters()), list(twin.parameters())
    both = MuonAndAdamW(params, lr=0.01, weight_decay=0.1, momentum=0.8, nesterov=True)
    muon = torch.optim.Muon(
        [others[0], others[2]],
        lr=0.01,
        weight_decay=0.1,
        momentum=0.8,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW([others[1], others[3]], lr=0.01, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(one, 2) for one in (both, muon, adamw)]
    for step in range(5):
        differentiate()
        differentiate_twin()
        for one in (both, muon, adamw):
            one.step()
        for one in schedules:
            one.step()
        assert all(map(torch.equal, params, others))
        if step == 1:
            state = both.state_dict()
            both = MuonAndAdamW(params, lr=5.0, weight_decay=0.0, momentum=0.1, nesterov=False)
            both.load_state_dict(state)
            schedules[0].optimizer = both


@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 2)])
def test_muon_takes_a_model_without_matrices_or_of_matrices_alone(kept):
    model, differentiate = regression()
    params = list(model.parameters())[kept]
    optimizer = make_optimizer(changed(optimizer="muon"), 0.1, params)
    before = params[0].detach().clone()
    differentiate()
    optimizer.step()
    assert not torch.equal(before, params[0])


def test_muon_refuses_a_closure():
    model, _ = regression()
    optimizer = make_optimizer(changed(optimizer="muon"), 0.1, list(model.parameters()))
    with pytest.raises(ValueError, match="closure must be None; got one"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_an_optimizer_of_all_rows_is_the_plain_one_under_averaging(name):
    model, _ = regression()
    twin = copy.deepcopy(model)
    params, others = list(model.parameters()), list(twin.parameters())
    optimizer = make_optimizer(changed(optimizer=f"{name}-all", weight_decay=0.1), 0.01, params)
    accumulator = gaf.Accumulator(optimizer, gaf.Mean())
    plain = make_optimizer(changed(optimizer=name, weight_decay=0.1), 0.01, others)
    for step in range(6):
        x = torch.randn(3, 7, 5, dtype=torch.float64)
        for part in x:
            accumulator.backward(model(part).square().mean())
        accumulator.step()
        plain.zero_grad()
        (sum(twin(part).square().mean() for part in x) / 3).backward()
        plain.step()
        for p, other in zip(params, others, strict=True):
            assert torch.allclose(p, other, rtol=1e-10), step


@pytest.mark.parametrize(("name", "share"), [("adamw-all", 1.0), ("rmsprop-all", 0.01)])
def test_an_optimizer_of_all_rows_divides_the_kept_row_by_the_length_of_all(name, share):
    # one coordinate, one step from zero moments: lr 3 / sqrt(v), v a share of 4^2
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make_optimizer(changed(optimizer=name), 0.1, [p])
    accumulator = gaf.Accumulator(optimizer, lambda gram: torch.tensor([1.0, 0.0]).double())
    for slope in (3.0, 5.0):
        accumulator.backward((slope * p).sum())
    accumulator.step()
    assert p.item() == pytest.approx(-0.1 * 3.0 / (4.0 * share**0.5), rel=1e-6)


@pytest.mark.parametrize("name", ["adamw-all", "rmsprop-all"])
def test_an_optimizer_of_all_rows_refuses_a_closure(name):
    model, _ = regression()
    optimizer = make_optimizer(changed(optimizer=name), 0.1, list(model.parameters()))
    with pytest.raises(ValueError, match="OfAllRows: closure must be None; got one"):
        optimizer.step(lambda: 0.0)


def test_a_schedule_free_run_is_evaluated_at_the_average_of_its_steps():
    # the averages x of ScheduleFree: x = y + (1 - 1 / beta) (z - y); z is kept (arXiv 2405.15682)
    pytest.importorskip("pytorch_optimizer")
    model, differentiate = regression()
    params = list(model.parameters())
    optimizer = make_optimizer(changed(optimizer="schedule-free"), 0.01, params)
    with evaluated_weights(optimizer):  # before the first step: nothing to average
        pass
    for _ in range(4):
        differentiate()
        optimizer.step()
    training = [p.detach().clone() for p in params]
    expected = [
        y + (1 - 1 / 0.9) * (optimizer.state[y_]["z"] - y)
        for y, y_ in zip(training, params, strict=True)
    ]
    state = optimizer.state_dict()
    with evaluated_weights(optimizer):
        for x, right in zip(params, expected, strict=True):
            assert torch.allclose(x, right, rtol=1e-12)
            assert not torch.equal(x, training[0])
    assert all(map(torch.equal, params, training))
    assert_same(optimizer.state_dict(), state)


def test_other_optimizers_are_evaluated_where_they_are():
    model, _ = regression()
    before = [p.detach().clone() for p in model.parameters()]
    with evaluated_weights(torch.optim.SGD(model.parameters(), lr=0.1)):
        assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("name", PACKAGED)
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        ConfigError,
        match=f"^optimizer '{name}' needs the package pytorch-optimizer; it is not installed. "
        r"Install it with pip install '.\[optimizers\]'.$",
    ):
        make_optimizer(changed(optimizer=name), 0.1, [nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"early_stopping": 2}])
def test_schedule_free_goes_with_no_other_average(changes):
    with pytest.raises(
        ConfigError,
        match="optimizer averages weights itself, and goes neither with ema nor with "
        "early_stopping; got 'schedule-free'. Set both to 0.",
    ):
        changed(optimizer="schedule-free", **changes)


@pytest.mark.parametrize("name", ["muon", "adamw-all", "rmsprop-all", *PACKAGED])
def test_the_device_engine_refuses_them_and_several_ranks_the_packages(name):
    config = changed(optimizer=name, engine="device")
    found = obstacle(config)
    assert found is not None
    assert found.startswith("optimizer must have a fused form")
    if name == "muon":
        check_ranks(config, 3)
        return
    with pytest.raises(
        ConfigError,
        match="optimizer must be one of torch's on several ranks, because the others count "
        f"skipped steps or see one rank's rows alone; got '{name}' on 3 ranks. Run one process.",
    ):
        check_ranks(config, 3)


def test_an_arm_names_its_optimizer():
    assert name_arm(changed(optimizer="soap")) == "GAF, SOAP"
    assert name_arm(changed(optimizer="schedule-free", policy="mean")) == "averaging, ScheduleFree"
