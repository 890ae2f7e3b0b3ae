"""Every dense optimizer steps as it would by itself, and a skip leaves it alone."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

import gaf
from gaf.checks import check_optimizers
from helpers.accumulating import AGREE, DISAGREE, ROWS_OF_4, feed, state_of, vector
from helpers.comparing import same
from helpers.digits import Batch, conv_net, micro_batches, mlp


def dense_optimizers() -> dict[str, type[Optimizer]]:
    kinds = {
        n: c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, Optimizer)
    }
    return {n: c for n, c in kinds.items() if n not in ("Optimizer", "LBFGS", "SparseAdam")}


# Whatever makes an optimizer move on a zero gradient is set: weight decay, momentum.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
    ],
    "Adam": [{"weight_decay": 0.1}, {"amsgrad": True}],
    "AdamW": [{"weight_decay": 0.1}, {"amsgrad": True}],
    "Adamax": [{"weight_decay": 0.1}],
    "NAdam": [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"weight_decay": 0.1}],
    "Adagrad": [{"weight_decay": 0.1, "lr_decay": 0.1}],
    "Adadelta": [{"weight_decay": 0.1}],
    "RMSprop": [{"weight_decay": 0.1, "momentum": 0.9, "centered": True}],
    "Rprop": [{}],
    "ASGD": [{"weight_decay": 0.1}],
    "Adafactor": [{"weight_decay": 0.1}],
    "Muon": [{"weight_decay": 0.1}],
}


def test_every_dense_optimizer_of_torch_is_among_the_cases() -> None:
    assert set(VARIANTS) >= set(dense_optimizers())


FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


def optimizer_cases() -> Iterator[Any]:
    for name, variants in VARIANTS.items():
        for options in variants:
            for mode in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}):
                if ("fused" in mode and name not in FUSED) or (
                    "foreach" in mode and name == "Muon"
                ):
                    continue
                yield pytest.param(
                    name,
                    options | mode,
                    id="-".join([name, *options, *(f"{key}={v}" for key, v in mode.items())]),
                )


@pytest.mark.parametrize(("name", "options"), list(optimizer_cases()))
def test_an_optimizer_steps_as_it_would_by_itself_and_does_nothing_on_a_skip(
    name: str, options: dict[str, Any]
) -> None:
    """Bitwise: parameters and state. The first step is a skip, before there is any state."""
    if name not in dense_optimizers():
        pytest.skip(f"this torch has no {name}")
    p = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 2))]
    q = copy.deepcopy(p)
    optimizer, plain = (dense_optimizers()[name](params, lr=0.1, **options) for params in (p, q))
    acc = gaf.Accumulator(optimizer, gaf.GAF(0.5))
    initial = state_of(optimizer)  # Adagrad fills its own at once
    for agree in (False, True, False, True, True):
        direction = [torch.randn_like(x) for x in p]
        for sign in (1.0, 0.25 if agree else -1.0):
            acc.backward(sum((sign * d * x).sum() for d, x in zip(direction, p, strict=True)))
        before, state = [x.detach().clone() for x in p], state_of(optimizer)
        assert acc.decide().stepped == agree
        for x, y in zip(p, q, strict=True):
            y.grad = None if x.grad is None else x.grad.clone()
        acc.step()
        if agree:
            plain.step()
            assert not same(before, [x.detach() for x in p])
        else:
            assert same(before, [x.detach() for x in p])
            assert same(state, state_of(optimizer))
        assert same([x.detach() for x in p], [y.detach() for y in q])
        assert same(state_of(optimizer), state_of(plain))
        plain.zero_grad()
    assert not same(initial, state_of(optimizer)) or not state_of(optimizer)  # plain SGD keeps none


def test_a_training_run_is_the_plain_one_bit_by_bit_where_everything_is_accepted(
    digits: Batch,
) -> None:
    """Two micro-batches: g_1 + g_2 rounds once; halving it, or both losses, is exact."""
    model = conv_net()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, twin))
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    for macro in range(4):
        for x, y in micro_batches(digits, 2, macro):
            acc.backward(cross_entropy(model(x), y))
            (cross_entropy(twin(x), y) / 2).backward()
        acc.step()
        plain.step()
        plain.zero_grad()
    assert same(model.state_dict(), twin.state_dict())
    assert same(state_of(optimizer), state_of(plain))


def test_several_optimizers_share_one_decision() -> None:
    """Each half agrees or disagrees by itself; together the longer one decides."""
    p, q = vector(), vector()
    first, second = SGD([p], 0.125), torch.optim.Adam([q], 0.1)
    acc = gaf.Accumulator([first, second], gaf.GAF(0.5))
    for sign in (1.0, -1.0):  # p agrees at length 10, q disagrees at length 1
        acc.backward(
            (p * torch.tensor([10.0, 0.0])).sum() + sign * (q * torch.tensor([1.0, 0.0])).sum()
        )
    decision = acc.step()
    assert decision.stepped
    # float32 inner products
    assert decision.distances[1].item() == pytest.approx(1 - 99 / 101, abs=1e-6)
    assert p.tolist() == [-0.25, 1.0]
    assert q.tolist() == [1.0, 1.0]  # the mean of q's gradients is zero, and Adam moves by nothing
    before = p.detach().clone(), state_of(second)
    for sign in (1.0, -1.0):  # now p disagrees at length 10
        acc.backward(
            sign * (p * torch.tensor([10.0, 0.0])).sum() + (q * torch.tensor([1.0, 0.0])).sum()
        )
    assert not acc.step().stepped
    assert torch.equal(p, before[0])
    assert same(state_of(second), before[1])


def test_parameter_groups_keep_their_own_settings(digits: Batch) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    groups = [
        [
            {"params": m[1].parameters(), "lr": 0.5},
            {"params": m[3].parameters(), "weight_decay": 0.1},
        ]
        for m in (model, twin)
    ]
    optimizer, plain = (SGD(g, 0.01, momentum=0.9) for g in groups)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    for macro in range(3):
        for x, y in micro_batches(digits, 2, macro):
            acc.backward(cross_entropy(model(x), y))
        acc.decide()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        acc.step()
        plain.step()
    assert same(model.state_dict(), twin.state_dict())


def test_frozen_parameters_stay_until_they_are_thawed(digits: Batch) -> None:
    model = mlp()
    model[1].requires_grad_(False)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1, weight_decay=0.1), gaf.GAF(2.0))
    frozen = copy.deepcopy(model[1].state_dict())
    for macro in range(3):
        if macro == 1:
            model[1].requires_grad_(True)
        if macro == 2:
            model[1].requires_grad_(False)
            frozen = copy.deepcopy(model[1].state_dict())
        for x, y in micro_batches(digits, 2, macro):
            acc.backward(cross_entropy(model(x), y))
        acc.decide()
        assert (model[1].weight.grad is not None) == (macro == 1)
        acc.step()
        assert same(frozen, model[1].state_dict()) == (macro != 1)


def test_a_group_added_later_takes_part_from_the_next_macro_batch_on() -> None:
    p, q = vector(), vector()
    optimizer = SGD([p], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    feed(acc, p, AGREE)
    acc.step()
    optimizer.add_param_group({"params": [q]})
    for _ in range(2):
        acc.backward(p.sum() + 3 * q.sum())
    acc.decide()
    assert p.grad.tolist() == [1, 1]
    assert q.grad.tolist() == [3, 3]


def test_a_parameter_put_in_anothers_place_takes_over() -> None:
    p, q, other = vector(), vector(), vector()
    optimizer = SGD([p, other], 0.1)
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0), leave_out=lambda name, _: name == "1 of group 0")
    feed(acc, p, DISAGREE)
    acc.step()
    optimizer.param_groups[0]["params"] = [q, other]
    feed(acc, q, AGREE)
    acc.decide()
    assert q.grad.tolist() == [1, 0.25]
    assert p.grad is None


class Wrapper(Optimizer):
    """As Accelerate's and Opacus's: an Optimizer that never calls Optimizer.__init__."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.original = optimizer

    param_groups = property(lambda self: self.original.param_groups)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.original.step(closure)


@pytest.mark.parametrize("subject", ["Accumulator", "attach"])
def test_an_optimizer_without_hooks_of_its_own_is_refused_with_the_one_to_pass(
    subject: str,
) -> None:
    with pytest.raises(
        TypeError,
        match=rf"^{subject}: .* step hooks .*; Wrapper wraps another one and has none. "
        r"Pass its .original \(SGD\)",
    ):
        check_optimizers(Wrapper(SGD([vector(4)], 0.1)), subject)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_post_local_sgd_is_refused_with_the_one_to_pass() -> None:
    from torch.distributed.algorithms.model_averaging.averagers import ModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    class Averager(ModelAverager):
        def __init__(self) -> None: ...

        def average_parameters(self, params: Any) -> None: ...

    optimizer = PostLocalSGDOptimizer(SGD([vector(4)], 0.1), Averager())
    with pytest.raises(TypeError, match=r"PostLocalSGDOptimizer wraps .* Pass its .optim \(SGD\)"):
        gaf.Accumulator(optimizer, gaf.GAF())


def test_accelerates_optimizer_is_refused_with_the_way_to_go() -> None:
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True).prepare(SGD([vector(4)], 0.1))
    with pytest.raises(TypeError, match=r"gave to gaf\.integrations\.accelerate\.attach, or an"):
        gaf.Accumulator(prepared, gaf.GAF())


class Delegating(Wrapper):
    """Whatever it lacks, it has from the one inside: its hooks too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


def test_an_optimizer_that_has_the_hooks_of_the_one_inside_works() -> None:
    p = vector(4)
    optimizer = Delegating(SGD([p], 1.0))
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0))
    feed(acc, p, ROWS_OF_4)
    with pytest.raises(RuntimeError, match="must not be called while micro-gradients wait"):
        optimizer.step()
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS_OF_4.mean(0))


@pytest.mark.filterwarnings("ignore")
def test_what_fabric_sets_up_works_under_the_models_names() -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    plain = copy.deepcopy(model)
    setup, optimizer = fabric.setup(model, SGD(model.parameters(), 0.1))
    rows = torch.randn(3, 8, 4)
    for net, stepper in ((setup, optimizer), (plain, SGD(plain.parameters(), 0.1))):
        acc = gaf.Accumulator(
            stepper,
            gaf.GAF(2.0),
            model=net,
            bn="accepted",
            leave_out=lambda name, p: name.startswith("0."),
        )
        for x in rows:
            acc.backward(net(x).square().mean())
        with pytest.raises(RuntimeError, match="must not be called while micro-gradients wait"):
            stepper.step()
        assert acc.step().stepped
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
