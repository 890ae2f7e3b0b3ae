"""A backward pass gives each parameter one gradient, or raises and leaves no row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import gaf
from helpers.accumulating import (
    ENGINES,
    POLICIES,
    ROWS_OF_3,
    ROWS_OF_4,
    SCALED,
    FailsInBackward,
    feed,
    line,
    scaler_for,
    stacked,
    streamed,
    vector,
)
from helpers.pairs import each_pair


@ENGINES
@pytest.mark.parametrize("place", [0, 1])
def test_a_hook_that_takes_gradients_is_refused_and_the_row_does_not_count(
    wrap: Callable, place: int
) -> None:
    p, q = vector(4), vector(4)
    acc = gaf.Accumulator(SGD([p, q], 0.1), wrap(gaf.GAF(2.0)))
    for i in range(3):
        if i == place:
            hook = q.register_post_accumulate_grad_hook(lambda t: setattr(t, "grad", None))
            with pytest.raises(RuntimeError, match="that of '1 of group 0' was taken by a hook"):
                acc.backward(7 * (p * ROWS_OF_4[0]).sum() + q.sum())
            hook.remove()
        acc.backward((p * ROWS_OF_4[i]).sum() + q.sum())
    assert len(acc.decide().accepted) == 3
    assert p.grad is not None
    torch.testing.assert_close(p.grad, ROWS_OF_4.mean(0))


@pytest.mark.parametrize(
    ("policy", "wrap", "place"), each_pair(POLICIES, [streamed, stacked], [0, 1, 2])
)
def test_a_micro_batch_that_reaches_no_parameter_is_an_error_at_once_and_the_row_does_not_count(
    policy: Any, wrap: Callable, place: int
) -> None:
    p, other = vector(4), vector(4)
    acc = gaf.Accumulator(SGD([p], 0.1), wrap(policy))
    for i in range(3):
        if i == place:
            with pytest.raises(
                RuntimeError,
                match=r"must depend on the optimizer's parameters; none of the 1, such as "
                r"'0 of group 0', got a gradient. Make the",
            ):
                acc.backward((other * ROWS_OF_4[0]).sum())
            assert acc.waiting == (place > 0)
        acc.backward((p * ROWS_OF_4[i]).sum())
    update, decision = gaf.aggregate(ROWS_OF_4, policy)
    assert acc.decide().weights.tolist() == decision.weights.tolist()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, update)
    acc.step()
    assert acc.stats()["micro_gradients"] == 3


def test_an_optimizer_of_parameters_that_were_replaced_is_refused_under_every_scope() -> None:
    """As by load_state_dict(assign=True), or a copy of the model."""
    for scope in ("all", "layer"):
        model = nn.Linear(4, 2)
        acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(scope=scope), model=model)
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
        with pytest.raises(RuntimeError, match="none of the 2, such as '0 of group 0', got a grad"):
            acc.backward(model(ROWS_OF_4).sum())
        with pytest.raises(RuntimeError, match=r"needs at least one backward"):
            acc.step()


def test_retain_graph_lets_a_graph_be_used_again() -> None:
    p = vector()
    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(2.0))
    loss = (p * p).sum()
    acc.backward(loss, retain_graph=True)
    acc.backward(loss)
    acc.decide()
    assert p.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("when", [0, 1])
def test_a_gradient_from_elsewhere_is_refused_by_the_parameters_name(when: int) -> None:
    model = nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model)
    for _ in range(when):
        acc.backward(model(torch.ones(1, 2)).sum())
    model.bias.grad = torch.zeros(1)
    with pytest.raises(
        RuntimeError, match="parameter 'bias' must have no gradient before backward"
    ):
        acc.backward(model(torch.ones(1, 2)).sum())
    model.zero_grad()
    for _ in range(2):
        acc.backward(model(torch.ones(1, 2)).sum())
    assert acc.step().weights.tolist() == [1 / (2 + when)] * (2 + when)


def test_a_sparse_gradient_is_refused_and_the_accumulator_can_be_used_further() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    acc = gaf.Accumulator(SGD(model.parameters(), 0.1), gaf.GAF(2.0), model=model)
    with pytest.raises(
        TypeError, match=r"gradients must be dense; that of 'weight' is torch.sparse_coo"
    ):
        acc.backward(model(torch.tensor([0, 1])).sum())
    assert model.weight.grad is None
    model.sparse = False
    for _ in range(2):
        acc.backward(model(torch.tensor([0, 1])).sum())
    acc.decide()
    assert model.weight.grad[:, 0].tolist() == [1, 1, 0, 0, 0]


@ENGINES
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_exception_in_backward_loses_that_micro_batch_alone(wrap: Callable, place: int) -> None:
    p, q = vector(), vector()
    acc = gaf.Accumulator(SGD([p, q], 0.1), wrap(gaf.GAF(0.5)))
    for i in range(3):
        if i == place:
            with pytest.raises(ZeroDivisionError):
                acc.backward(7 * p.sum() + FailsInBackward.apply(q).sum())
        acc.backward((i + 1) * (p.sum() + q.sum()))
    assert acc.decide().weights.tolist() == [1 / 3] * 3
    assert p.grad.tolist() == q.grad.tolist() == [2, 2]


def test_a_reentrant_checkpoint_gives_its_gradients_or_is_refused() -> None:
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD([*inner.parameters(), *outer.parameters()], 0.1), gaf.GAF(2.0))
    try:
        for _ in range(2):
            acc.backward(
                outer(
                    checkpoint(inner, torch.ones(1, 2, requires_grad=True), use_reentrant=True)
                ).sum()
            )
    except RuntimeError as refusal:
        assert "use_reentrant=False" in str(refusal)  # noqa: PT017
    else:
        acc.decide()
        assert inner.weight.grad is not None


def test_a_checkpoint_that_is_not_reentrant_gives_its_gradients() -> None:
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 1)
    acc = gaf.Accumulator(SGD([*inner.parameters(), *outer.parameters()], 0.1), gaf.GAF(2.0))
    (want,) = torch.autograd.grad(outer(inner(torch.ones(1, 2))).sum(), inner.weight)
    for _ in range(2):
        acc.backward(
            outer(
                checkpoint(inner, torch.ones(1, 2, requires_grad=True), use_reentrant=False)
            ).sum()
        )
    acc.decide()
    assert torch.equal(inner.weight.grad, want)  # (g + g) / 2 is exact


def test_after_a_failed_first_backward_step_says_what_is_missing() -> None:
    acc = gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5))
    with pytest.raises(RuntimeError, match="does not require grad"):
        acc.backward(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"needs at least one backward\(\) before it"):
        acc.step()


def test_after_a_failed_first_backward_the_state_can_be_taken() -> None:
    acc = gaf.Accumulator(SGD([vector()], 0.1), gaf.GAF(0.5))
    with pytest.raises(RuntimeError, match="does not require grad"):
        acc.backward(torch.tensor(1.0))
    acc.state_dict()


def test_a_backward_pass_within_the_backward_pass_adds_its_gradient_as_in_plain_training() -> None:
    p = vector(2)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            with torch.enable_grad():
                (p * 2).sum().backward()
            return g

    acc = gaf.Accumulator(SGD([p], 0.1), gaf.GAF(0.9))
    for _ in range(2):
        acc.backward(Twice.apply(p * 3).sum())
    acc.decide()
    assert p.grad is not None
    assert p.grad.tolist() == [5.0, 5.0]


def test_frozen_parameters_alone_are_refused() -> None:
    model, optimizer = line()
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match="at least one parameter that requires a gradient; all are frozen"
    ):
        gaf.Accumulator(optimizer, gaf.GAF()).backward(torch.ones((), requires_grad=True) * 2)


@pytest.mark.usefixtures("unchecked")
@SCALED
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: 1.0, TypeError, r"of one number; got float 1.0. Pass what the loss function"),
        (lambda p: [p.sum()], TypeError, r"got list"),
        (lambda p: None, TypeError, r"got NoneType None"),
        (lambda p: {"loss": p.sum()}, TypeError, r"got dict"),
        (
            lambda p: p * 1,
            ValueError,
            r"one real number, .* \(3,\) of torch.float32. Use reduction=",
        ),
        (lambda p: p[:0] * 1, ValueError, r"got shape \(0,\)"),
        (lambda p: (p * 1j).sum(), ValueError, r"got shape \(\) of torch.complex64"),
        (lambda p: torch.tensor(3), ValueError, r"got shape \(\) of torch.int64"),
        (lambda p: p.sum().detach(), RuntimeError, r"does not require grad. Compute it outside of"),
    ],
)
def test_what_is_no_loss_is_named_with_its_value_and_the_fix(
    make: Callable, error: type[Exception], message: str, scaled: bool
) -> None:
    """And costs nothing: what waits goes on."""
    p = vector(3)
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF(2.0), scaler=scaler_for(scaled))
    feed(acc, p, ROWS_OF_3[:1])
    with pytest.raises(error, match=f"^Accumulator: .*{message}"):
        acc.backward(make(p))
    feed(acc, p, ROWS_OF_3[1:])
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS_OF_3.mean(0))


def test_a_loss_of_one_number_in_a_vector_is_one() -> None:
    p = vector(3)
    acc = gaf.Accumulator(SGD([p], 1.0), gaf.GAF(2.0))
    for row in ROWS_OF_3:
        acc.backward((p * row).sum(0, keepdim=True))
    acc.step()
    torch.testing.assert_close(p.detach(), 1 - ROWS_OF_3.mean(0))
