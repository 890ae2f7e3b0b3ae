"""What a policy, its callback or a changed policy does wrong is told, and spoils no later step."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gaf
from gaf.ranks.same_everywhere import describe_policy

ROWS = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])


def accumulator(policy: Any, **options: Any) -> tuple[nn.Linear, gaf.Accumulator]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, gaf.Accumulator(optimizer, policy, model=model, **options)


def add_rows(model: nn.Module, acc: gaf.Accumulator, n: int = 4) -> None:
    for i in range(n):
        acc.backward(model(torch.ones(2, 3) * (i + 1)).square().mean())


def without_diagonal(K: Tensor) -> Tensor:
    K.fill_diagonal_(0)
    return torch.softmax(K.mean(1), 0)


def test_a_rule_may_write_into_its_matrix() -> None:
    update, decision = gaf.aggregate(ROWS, without_diagonal)
    expected, _ = gaf.aggregate(ROWS, lambda K: without_diagonal(K.clone()))
    assert decision.stepped and decision.accepted.all() and decision.distances.isfinite().all()
    assert torch.equal(update, expected)
    model, acc = accumulator(without_diagonal)
    add_rows(model, acc)
    assert acc.step().stepped


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_aggregate_refuses_weights_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="must have finite weights"):
        gaf.aggregate(ROWS, lambda K: torch.tensor([bad, 1.0, 1.0]))


def no_weights(K: Tensor) -> gaf.Decision:
    zeros = torch.zeros(len(K), dtype=torch.float64)
    return gaf.Decision(zeros, zeros == 0, torch.tensor(True), zeros)


def test_a_step_without_any_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="must give some row a weight; all 3 are 0"):
        gaf.aggregate(ROWS, no_weights)
    model, acc = accumulator(no_weights)
    add_rows(model, acc)
    with pytest.raises(ValueError, match="must give some row a weight; all 4 are 0"):
        acc.step()


class WrongMerge:
    def __call__(self, K: Tensor) -> Tensor:
        return torch.full((len(K),), 1 / len(K))

    def merge(self, rows: Tensor, place: int) -> Tensor:
        return rows.median()  # of all coordinates, not of each


def test_a_merge_must_give_a_number_for_each_coordinate() -> None:
    with pytest.raises(ValueError, match=r"each of the 2 coordinates.*\(2,\); got shape \(\)"):
        gaf.aggregate(ROWS, WrongMerge())


class Raises:
    """Once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, K: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("no answer")
        return torch.full((len(K),), 1 / len(K))


@pytest.mark.parametrize("call", ["decide", "step"])
def test_a_policys_exception_ends_the_macro_batch(call: str) -> None:
    model, acc = accumulator(Raises())
    add_rows(model, acc)
    with pytest.raises(RuntimeError, match="no answer"):
        getattr(acc, call)()
    assert not acc.waiting and all(p.grad is None for p in model.parameters())
    add_rows(model, acc, 3)
    assert len(acc.step().weights) == 3


def test_an_on_alarm_that_raises_is_a_warning_and_the_step_is_taken() -> None:
    def on_alarm(alarm: dict[str, Any]) -> None:
        raise OSError("no network")

    model, acc = accumulator(gaf.Guard(on_alarm=on_alarm))
    add_rows(model, acc, 3)
    acc.backward(model(torch.ones(1, 3)).sum() * float("nan"))
    before = model.weight.detach().clone()
    with (
        pytest.warns(UserWarning, match="row 3: its gradient is not finite"),
        pytest.warns(UserWarning, match="on_alarm must not raise.*OSError: no network"),
    ):
        acc.step()
    assert len(acc.alarms) == 1 and not torch.equal(model.weight, before)
    add_rows(model, acc)
    assert acc.step().stepped


@pytest.mark.usefixtures("unchecked")
def test_a_new_policy_is_checked_and_copied_as_the_first_one() -> None:
    model, acc = accumulator(gaf.GAF(0.9), leave_out=lambda name, p: name == "bias")
    with pytest.raises(ValueError, match="scope 'layer' needs the model.*leave_out"):
        acc.policy = gaf.GAF(0.9, scope="layer")
    with pytest.raises(ValueError, match="must be 'all' or 'layer'; got 'group'"):
        acc.policy = gaf.GAF(0.9, scope="group")
    with pytest.raises(TypeError, match="policy must be a callable.*got 'abc'"):
        acc.policy = "abc"  # type: ignore[assignment]
    add_rows(model, acc, 1)
    with pytest.raises(RuntimeError, match=r"between steps.*Call step\(\) or discard\(\)"):
        acc.policy = gaf.Mean()
    assert acc.policy == gaf.GAF(0.9)
    acc.discard()
    adaptive = gaf.GAF("auto")
    acc.policy = adaptive
    assert acc.policy is not adaptive and repr(acc.policy) == repr(adaptive)


def test_partials_are_compared_by_what_they_hold() -> None:
    def rule(K: Tensor, p: float) -> Tensor:
        return K.diagonal() ** -p

    one, two, other = (functools.partial(rule, p=p) for p in (1.0, 1.0, 2.0))
    assert describe_policy(one) == describe_policy(two) != describe_policy(other)
    assert " at 0x" not in describe_policy(one)


class Limited:
    def __init__(self, limit: float, rank: int) -> None:
        self.limit, self.rank = limit, rank

    def __call__(self, K: Tensor) -> Tensor:
        return (K.diagonal() > self.limit).double()


def test_objects_without_a_repr_are_compared_by_their_real_numbers() -> None:
    one, two, other = Limited(0.1, 0), Limited(0.1, 1), Limited(0.9, 1)
    assert describe_policy(one) == describe_policy(two) == "Limited(limit=0.1)"
    assert describe_policy(other) == "Limited(limit=0.9)"


def test_what_one_policy_learned_is_no_state_of_another() -> None:
    model, guarded = accumulator(gaf.Guard())
    add_rows(model, guarded)
    guarded.step()
    _, plain = accumulator(gaf.Median())
    with pytest.raises(ValueError, match="Median.* learns nothing.*as it was when the state was"):
        plain.load_state_dict(guarded.state_dict())
