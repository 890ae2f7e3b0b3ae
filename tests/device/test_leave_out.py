"""Parameters that do not take part in the decision, and the names by which they are chosen."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

import gaf
from gaf.device.parameters import bare_names
from helpers.accumulating import ENGINES, ROWS_OF_4, feed, line, loss_of, stacked, streamed, vector
from helpers.digits import (
    Batch,
    close_to_sum,
    flat_grad,
    micro_batches,
    micro_gradients,
    mixed_tau,
    mlp,
)
from helpers.pairs import each_pair


@ENGINES
def test_leave_out_decides_on_the_rest_and_updates_all_with_the_same_weights(
    digits: Batch, wrap: Callable
) -> None:
    model = mlp()
    batches = micro_batches(digits, 6)
    rows = micro_gradients(model, batches)
    first = model[1].weight.numel() + model[1].bias.numel()
    tau = mixed_tau(rows[:, first:])
    acc = gaf.Accumulator(
        SGD(model.parameters(), 0.1),
        wrap(gaf.GAF(tau)),
        model=model,
        leave_out=lambda name, p: name.startswith("1.") and p.numel() > 0,
    )
    for x, y in batches:
        acc.backward(cross_entropy(model(x), y))
    decision = acc.decide()
    _, accepted = gaf.reference(rows[:, first:], tau)
    assert decision.accepted.tolist() == accepted
    assert 2 <= sum(accepted) < 6
    want = decision.weights @ rows
    close_to_sum(flat_grad(model), want, rows)


@pytest.mark.parametrize(
    ("wrap", "bad", "place"), each_pair([streamed, stacked], [math.nan, math.inf], [0, 1])
)
def test_a_left_out_parameter_that_is_not_finite_makes_its_row_absent(
    wrap: Callable, bad: float, place: int
) -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), wrap(gaf.GAF(0.5)), leave_out=lambda name, t: t is q)
    for i in range(3):
        acc.backward(p.sum() + (bad if i == place else 1.0) * q.sum())
    assert acc.decide().accepted.tolist() == [i != place for i in range(3)]
    assert q.grad.tolist() == [1, 1]


def test_a_left_out_parameter_of_any_finite_size_has_no_say() -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), gaf.GAF(0.5), leave_out=lambda name, t: t is q)
    for factor in (1e30, -1e30, 0.0):
        acc.backward(p.sum() + factor * q.sum())
    assert acc.step().accepted.tolist() == [True] * 3


def test_a_row_whose_deciding_part_is_zero_is_absent() -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), gaf.GAF(0.5), leave_out=lambda name, t: t is q)
    for factor in (0.0, 1.0, 1.0):
        acc.backward(factor * p.sum() + q.sum())
    assert acc.step().accepted.tolist() == [False, True, True]


def test_leave_out_may_not_leave_out_everything() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.5), leave_out=lambda name, t: True)
    with pytest.raises(ValueError, match="leave_out must leave at least one parameter"):
        acc.backward(p.sum())


def test_names_are_the_models_or_the_places_in_the_optimizer() -> None:
    seen: list[str] = []
    model, extra = nn.Sequential(nn.Linear(2, 1)), vector()
    optimizers = [SGD(model.parameters(), 0.1), SGD([extra], 0.1)]
    for named in (model, None):
        acc = gaf.Accumulator(
            optimizers,
            gaf.GAF(2.0),
            model=named,
            leave_out=lambda name, t: seen.append(name) is None and t is extra,
        )
        acc.backward(model(torch.ones(1, 2)).sum() + extra.sum())
    assert seen == [
        "0.weight",
        "0.bias",
        "0 of group 0 of optimizer 1",
        "0 of group 0 of optimizer 0",
        "1 of group 0 of optimizer 0",
        "0 of group 0 of optimizer 1",
    ]


class Net(nn.Module):
    """`module` is a name of its own here, and no wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.module, self.scale = (
            nn.Embedding(50, 8),
            nn.Linear(8, 4),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.module(self.embed(x).mean(1))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_part(model: Net) -> nn.Module:
    model.embed = compiled(model.embed)
    model.module = nn.DataParallel(compiled(model.module))
    return model


WRAPS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel, compiled": lambda m: compiled(nn.DataParallel(m)),
    "compiled, DataParallel": lambda m: nn.DataParallel(compiled(m)),
    "in part": in_part,
    "in part and whole": lambda m: compiled(in_part(m)),
}


def run(form: Callable, policy: gaf.GAF, **options: Any) -> tuple[gaf.Accumulator, nn.Module]:
    torch.manual_seed(0)
    model = Net()
    wrapped = form(model)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), policy, model=wrapped, **options)
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        x, y = (
            torch.randint(0, 50, (6, 3), generator=generator),
            torch.randint(0, 4, (6,), generator=generator),
        )
        acc.backward(cross_entropy(wrapped(x), y))
    acc.step()
    return acc, wrapped


@pytest.mark.parametrize("form", WRAPS.values(), ids=WRAPS)
def test_names_are_those_of_the_bare_model(form: Callable) -> None:
    torch.compiler.reset()
    names = ["scale", "embed.weight", "module.weight", "module.bias"]
    assert [name for name, _ in bare_names(form(Net()))] == names
    leave_out = {"leave_out": lambda name, p: name.startswith("embed")}
    plain, _ = run(lambda m: m, gaf.GAF(2.0), **leave_out)
    acc, wrapped = run(form, gaf.GAF(2.0), **leave_out)
    assert plain.last is not None
    assert acc.last is not None
    assert torch.equal(plain.last.distances, acc.last.distances)
    layered, _ = run(form, gaf.GAF(0.9, scope="layer"))
    assert list(layered.layers) == ["scale", "embed", "module"]
    next(p for name, p in bare_names(wrapped) if name == "module.bias").grad = torch.zeros(4)
    with pytest.raises(RuntimeError, match="parameter 'module.bias' must have no gradient"):
        acc.backward(wrapped(torch.ones(2, 2, dtype=torch.int64)).sum())


def test_names_within_an_averaged_model_are_the_models() -> None:
    averaged = AveragedModel(Net())
    assert [name for name, _ in bare_names(averaged)] == [n for n, _ in Net().named_parameters()]


@pytest.mark.parametrize("form", [lambda m: m, compiled], ids=["plain", "compiled"])
def test_a_leave_out_that_matches_nothing_is_refused(form: Callable) -> None:
    with pytest.raises(
        ValueError,
        match=r"true for at least one parameter; it is for none, and is given names such as "
        "'scale'. Leave it out, or match",
    ):
        run(form, gaf.GAF(2.0), leave_out=lambda name, p: name.startswith("embedding"))


def test_a_leave_out_that_has_matched_may_end_doing_so() -> None:
    """A warm-up: for some steps a part has no vote."""
    p, q = vector(4), vector(4)
    warm = [True]
    acc = gaf.Accumulator(
        SGD([p, q], 0.1), gaf.GAF(2.0), leave_out=lambda name, t: t is q and warm[0]
    )
    for _ in range(2):
        feed(acc, p, ROWS_OF_4)
        acc.step()
        warm[0] = False


def test_a_name_that_leaves_out_nothing_for_want_of_the_model_is_refused() -> None:
    model, optimizer = line()
    acc = gaf.Accumulator(optimizer, gaf.GAF(2.0), leave_out=lambda name, p: "bias" in name)
    with pytest.raises(
        ValueError,
        match="true for at least one parameter; it is for none.*'0 of group 0'. Pass model=",
    ):
        acc.backward(loss_of(model))
    acc = gaf.Accumulator(
        optimizer, gaf.GAF(2.0), leave_out=lambda name, p: "bias" in name, model=model
    )
    acc.backward(loss_of(model))
